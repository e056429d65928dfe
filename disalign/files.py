"""Which of many files are missing."""

import os
from collections.abc import Sequence


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
