"""Reading what others wrote, safely, and writing files whole or not at all."""

from .checkpoints import load_file
from .files import atomic_file, missing_files, read_json, require_folder, require_place, write_json

__all__ = [
    "atomic_file",
    "load_file",
    "missing_files",
    "read_json",
    "require_folder",
    "require_place",
    "write_json",
]
