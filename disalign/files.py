"""Reading files, and finding those that are missing."""

import json
import os
from collections.abc import Sequence

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
