"""Reading what others wrote, safely, and writing files whole or not at all."""

from .checkpoints import load_file
from .files import atomic_file, missing_files, names_wherever, read_json, require_folder, require_place, write_json
from .locks import locked_folder

__all__ = [
    "atomic_file",
    "load_file",
    "locked_folder",
    "missing_files",
    "names_wherever",
    "read_json",
    "require_folder",
    "require_place",
    "write_json",
]
