"""What the counters share: files read in threads, those that can't be read, and checksums."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from disalign.errors import InputError, first_line, some

try:
    from PIL import UnidentifiedImageError
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"counting needs Pillow and tqdm, but there is no {error.name}; install them with pip install pillow tqdm",
        name=error.name,
    ) from error


class Unreadable(NamedTuple):
    """A file that can't be read, by its name below the source, and why."""

    file: str
    reason: str


@contextmanager
def read_each(function: Callable, files: Sequence[str], workers: int, progress: str) -> Iterator[Iterable]:
    """``function(path)`` of each file, in order, with a progress bar on a terminal; the end of the context ends it.

    Threads will do: Pillow decodes without Python's lock.

    Args:
        function: what it raises stops all, if it is an :class:`InputError`; anything else is the file's fault.
        files: paths.
        workers: threads; 0: none of its own.
        progress: the bar's name.

    Yields:
        An iterator over what the function returns, or the reasons why files can't be read, as ``str``.
    """

    def outcome(path):
        try:
            return function(path)
        except InputError:
            raise
        except UnidentifiedImageError:
            return "not an image"
        except Exception as error:  # a broken file can break a reader anywhere
            return getattr(error, "strerror", None) or first_line(error)

    pool = ThreadPoolExecutor(workers) if workers else None
    try:
        outcomes = (pool.map if pool else map)(outcome, files)
        with tqdm(
            outcomes, desc=progress, total=len(files), unit="file", mininterval=1, disable=None, leave=False
        ) as bar:
            yield bar
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def require_readable(unreadable: Sequence[Unreadable], files: int, where: str, skip: bool) -> None:
    """Refuse files that can't be read: any, or all of them with ``skip``.

    Raises:
        InputError: names the first ones, and says how many they are.
    """
    if not unreadable or (skip and len(unreadable) < files):
        return
    hint = "fetch them again" if skip else "fetch them again, or leave them out with --skip-corrupt"
    raise InputError(
        f"expected whole files in {where}, but {len(unreadable)} of {files} can't be read: "
        f"{some((f'{file} ({reason})' for file, reason in unreadable), 3)}; {hint}"
    )


def checksum_of_bytes(paths: Iterable[str]) -> str:
    """SHA-256 of the files' content, one after the other: ``cat FILE ... | sha256sum``."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def checksum_of_lines(lines: Iterable[tuple[object, str]]) -> str:
    """SHA-256 of a text with a line ``what  name`` per file (two spaces, UTF-8, newlines), as sha256sum prints it."""
    digest = hashlib.sha256()
    for what, name in lines:
        digest.update(f"{what}  {name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def below(folder: str, path: str) -> str:
    """A file's name below a folder, with ``/`` on every system."""
    return os.path.relpath(path, folder).replace(os.sep, "/")


#: More classes than any benchmark has by far: a label beyond is a mistake, and not worth the memory.
MOST_CLASSES = 1_000_000


def number_of_classes(largest: int, num_classes: int | None, where: str) -> int:
    """K as given, or the largest label + 1.

    Raises:
        InputError: a label that nobody can mean.
    """
    if num_classes is None and largest >= MOST_CLASSES:
        raise InputError(f"expected labels below {MOST_CLASSES} in {where}, got {largest}; is it a label at all?")
    return largest + 1 if num_classes is None else num_classes
