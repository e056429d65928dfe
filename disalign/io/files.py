"""JSON, missing files, and files that appear whole or not at all in places that can be written to."""

import errno
import functools
import glob
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from ..errors import InputError, first_line
from .locks import is_at, try_lock

#: The end of the names of files that are being written.
TEMPORARY = ".disalign-tmp"


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is a device, a pipe or a socket at the path."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def refuse_special(path: str | os.PathLike[str], what: str) -> None:
    """Refuse to read ``what`` from a device or a pipe, which may never end."""
    if is_special(path):
        raise InputError(f"expected {what} in a file, got {os.fspath(path)!r}, a device or a pipe; save it to a file")


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The content of a JSON file; ``what`` it holds is for the refusal ("annotations")."""
    path = os.fspath(path)
    refuse_special(path, what)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path!r}, but there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"expected {what} as JSON in {path!r}, but: {first_line(error)}") from None


@contextmanager
def atomic_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under ``path`` only once it is whole: written beside it, synced, then renamed.

    A link stays, and its target is replaced; a device or a pipe is written to as it is.

    Raises:
        InputError: it can't be written (no such place, read-only, disk full); what was at ``path`` is still there.
    """
    path = os.fspath(path)
    try:
        with open(path, mode) if is_special(path) else _beside(os.path.realpath(path), mode) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch.save wraps it in a RuntimeError.
        reason = error.__context__ if type(error) is RuntimeError else error
        if isinstance(reason, OSError):
            raise _no_place(path, reason) from error
        raise


@contextmanager
def _beside(path: str, mode: str) -> Iterator[IO[Any]]:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    with _new_file(folder, mode) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def _new_file(folder: str, mode: str) -> IO[Any]:
    """A temporary file of one's own, locked; until it is, another process may take it for a leftover."""
    while True:
        path = os.path.join(folder, f".{secrets.token_hex(8)}{TEMPORARY}")
        file = open(path, mode.replace("w", "x"))  # noqa: SIM115  # its user closes it
        if try_lock(file) and is_at(file, file.name):
            return file
        file.close()


def remove_leftovers(folder: str) -> None:
    """Remove what killed processes left half-written in a folder; a living one has its file locked."""
    for path in glob.iglob(os.path.join(glob.escape(folder), f".*{TEMPORARY}")):
        with suppress(OSError), open(path, "rb") as file:
            if try_lock(file):
                os.unlink(path)


def _no_place(path: str, error: OSError) -> InputError:
    reason = error.strerror or first_line(error)
    return InputError(f"expected a place to write {path!r}, but: {reason}; free it, or give another")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON (NaN refused), whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_file(path, "w") as file:
        file.write(text + "\n")


def missing_files(paths: Sequence[str]) -> list[str]:
    """Those that do not exist. Each folder is read once: seconds for iNaturalist's 437,513 files."""

    @functools.cache
    def names(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    return [path for path in paths if os.path.basename(path) not in names(os.path.dirname(path) or ".")]


def names_wherever(paths: Sequence[str]) -> list[str]:
    """Paths relative to the folder that all of them have in common, which may move; addresses stay as they are."""
    local = [os.path.dirname(os.path.abspath(path)) for path in paths if "://" not in path]
    root = os.path.commonpath(local or ["/"])
    return [path if "://" in path else os.path.relpath(path, root) for path in paths]


def require_folder(path: str | os.PathLike[str]) -> None:
    """Refuse, before the work, a folder that can't be made or written to: a file in its place, read-only, disk full."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        if not os.path.isdir(place):
            raise OSError(errno.ENOTDIR, f"{place!r} is not a folder")
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))  # a full disk still takes a file without content
    except OSError as error:
        raise _no_place(os.fspath(path), error) from None


def require_place(
    path: str | os.PathLike[str],
    reads: Iterable[str | os.PathLike[str]] = (),
    option: str = "--out",
    force: bool = False,
) -> None:
    """Refuse, before the work, a place for its result that can't be written to, is a folder, or is read by the work.

    What is there already is refused without ``force``, but a device or a pipe is written to as it is.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or not os.path.basename(path):
        raise InputError(f"expected the name of a file as {option}, got the folder {path!r}; add a name")
    if os.path.realpath(path) in map(os.path.realpath, reads):
        raise InputError(f"expected a file of its own as {option}, got {path!r}, which is read; name another")
    if is_special(path):
        return
    if os.path.exists(path) and not force:
        raise InputError(f"expected a new file as {option}, but {path!r} exists; add --force to replace it")
    require_folder(os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path) or ".")
