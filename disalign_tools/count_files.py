"""What the counters share: files read in threads, those that can't be read, and checksums."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from disalign.errors import InputError, first_line, some

try:
    from PIL import UnidentifiedImageError
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"counting needs Pillow and tqdm, but there is no {error.name}; install them with pip install pillow tqdm",
        name=error.name,
    ) from error


def read_files(
    files: Sequence[tuple[str, str]], read: Callable, add: Callable, workers: int, skip_corrupt: bool, progress: str
) -> dict:
    """Read each file in threads (Pillow decodes without Python's lock), with a progress bar on a terminal.

    Args:
        files: the folder given and the path of each.
        read: gets a path, returns what the checksum says of the file (its SHA-256 or size) and what ``add`` gets. An
            :class:`InputError` stops all; anything else is the file's fault.
        add: gets the place of a file in ``files`` and what was read, in this order.
        workers: threads; 0: none of its own.
        skip_corrupt: leave out files that can't be read.
        progress: the bar's name.

    Returns:
        ``files`` (number of those read), ``images`` (the same), ``skipped`` (the others: name and reason) and
        ``checksum``: SHA-256 of a text with a line ``what  name`` for each, as sha256sum prints it, sorted by name,
        folder after folder.

    Raises:
        InputError: files that can't be read: any, or with ``skip_corrupt`` all of them.
    """

    def outcome(path):
        try:
            return read(path) if os.stat(path).st_size else "empty"
        except InputError:
            raise
        except UnidentifiedImageError:
            return "not an image"
        except Exception as error:  # a broken file can break a reader anywhere
            return getattr(error, "strerror", None) or first_line(error)

    pool = ThreadPoolExecutor(workers) if workers else None
    lines: dict[str, list[tuple[str, object]]] = {folder: [] for folder, _ in files}
    skipped: list[dict] = []
    try:
        outcomes = (pool.map if pool else map)(outcome, [path for _, path in files])
        with tqdm(
            outcomes, desc=progress, total=len(files), unit="file", mininterval=1, disable=None, leave=False
        ) as bar:
            for place, ((folder, path), found) in enumerate(zip(files, bar, strict=True)):
                name = os.path.relpath(path, folder).replace(os.sep, "/")
                if isinstance(found, str):
                    skipped.append({"file": name, "reason": found})
                else:
                    lines[folder].append((name, found[0]))
                    add(place, found[1])
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    if len(skipped) == len(files) or (skipped and not skip_corrupt):
        hint = "" if skip_corrupt else ", or leave them out with --skip-corrupt"
        raise InputError(
            f"expected whole files in {some(map(repr, lines))}, but {len(skipped)} of {len(files)} can't be read: "
            f"{named(skipped)}; fetch them again{hint}"
        )
    text = "".join(f"{what}  {name}\n" for one in lines.values() for name, what in sorted(one))
    read_ones = len(files) - len(skipped)
    checksum = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return {"files": read_ones, "images": read_ones, "skipped": skipped, "checksum": checksum}


def named(skipped: Sequence[dict]) -> str:
    """The first files that can't be read, and why, for a sentence."""
    return some((f"{one['file']} ({one['reason']})" for one in skipped), 3)


def checksum_of_bytes(paths: Iterable[str]) -> str:
    """SHA-256 of the files' content, one after the other: ``cat FILE ... | sha256sum``."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
