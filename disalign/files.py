"""Reading files, finding those that are missing, and places to write that are none."""

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Sequence

from .errors import InputError


def read_json(path, what: str):
    """The content of a JSON file.

    Args:
        path: the file.
        what: it holds, for the sentence ("annotations").

    Raises:
        InputError: no such file, or none that can be read.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path!r}, but there is no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"expected {what} as JSON in {path!r}, but: {error}") from None


def missing_files(paths: Sequence[str]) -> list[str]:
    """Those that do not exist. Each folder is read once: seconds for iNaturalist's 437,513 files."""
    folders: dict[str, set[str]] = {}
    absent = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in folders[folder]:
            absent.append(path)
    return absent


def require_folder(path) -> None:
    """Refuse, before the work, a folder that its results could not be written to. Nothing is made, nothing left.

    Raises:
        InputError: a file stands there or above, it is read-only, or the disk is full.
    """
    _require_room(os.fspath(path), os.path.abspath(path))


def _require_room(path, place):
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        if not os.path.isdir(place):
            raise OSError(errno.ENOTDIR, f"{place!r} is not a folder")
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))  # a full disk still takes a file without content
    except OSError as error:
        raise InputError(
            f"expected a place to write {path!r}, but: {error.strerror or error}; free it, or give another"
        ) from None


def require_place(path, reads: Iterable = (), option: str = "--out") -> None:
    """Refuse, before the work, a file that its result could not be written to, or that the work itself reads.

    Raises:
        InputError: see :func:`require_folder`; or a folder, or one of ``reads``, in the place of the file.
    """
    path = os.fspath(path)
    if os.path.isdir(path) or not os.path.basename(path):
        raise InputError(f"expected the name of a file as {option}, got the folder {path!r}; add a name")
    if os.path.realpath(path) in map(os.path.realpath, reads):
        raise InputError(f"expected a file of its own as {option}, got {path!r}, which is read; name another")
    _require_room(path, os.path.dirname(os.path.abspath(path)))
