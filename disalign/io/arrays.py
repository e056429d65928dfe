"""A folder of arrays with one row an example: .npy files that are mapped, and a record with their checksums."""

import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, first_line
from .files import read_json, require_folder, write_json

#: The file that makes a folder one of arrays.
RECORD = "record.json"
#: Rows that share a checksum.
BLOCK = 1024
_AGAIN = "delete the folder and collect the features again"

Arrays = Mapping[str, npt.NDArray[Any]]
#: Name of an array -> dtype and the shape of one row.
Shapes = Mapping[str, Sequence[Any]]


def checksum(arrays: Arrays, block: int) -> int:
    """CRC-32 of one block of rows, over all arrays."""
    found = 0
    for name in sorted(arrays):
        rows = np.ascontiguousarray(arrays[name][block * BLOCK : (block + 1) * BLOCK])
        found = zlib.crc32(rows.view(np.uint8).data, found)
    return found


def write_record(
    path: str | os.PathLike[str],
    rows: int,
    shapes: Shapes,
    checksums: Mapping[int, int],
    facts: Mapping[str, Any],
) -> None:
    """Say what lies in a folder's arrays: the checksums of the blocks that are there, and plain ``facts``."""
    about = {
        "format": 1,
        "rows": rows,
        "arrays": {name: [np.dtype(dtype).str, *shape] for name, (dtype, *shape) in sorted(shapes.items())},
        "block": BLOCK,
        "checksums": {str(block): checksums[block] for block in sorted(checksums)},
        "facts": dict(facts),
    }
    write_json(path, about)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A record of :func:`write_record`, its blocks as numbers.

    Raises:
        InputError: there is none, or another file in its place.
    """
    record = read_json(path, "a record of features")
    try:
        if record["format"] != 1 or record["block"] != BLOCK or not isinstance(record["facts"], dict):
            raise ValueError("it is of another version")
        shapes = {str(name): (np.dtype(dtype), *map(int, shape)) for name, (dtype, *shape) in record["arrays"].items()}
        found = {int(block): int(value) for block, value in record["checksums"].items()}
        return {"rows": int(record["rows"]), "arrays": shapes, "checksums": found, "facts": record["facts"]}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"expected a record of features in {os.fspath(path)!r}, but: {first_line(error)}; {_AGAIN}"
        ) from None


def number_of_blocks(rows: int) -> int:
    return -(-rows // BLOCK)


def changed_blocks(arrays: Arrays, checksums: Mapping[int, int]) -> list[int]:
    """Blocks whose rows are not what they were when the checksums were taken."""
    return [block for block, expected in checksums.items() if checksum(arrays, block) != expected]


def open_arrays(folder: str | os.PathLike[str], record: Mapping[str, Any], mode: str) -> dict[str, npt.NDArray[Any]]:
    """Map the arrays that a record names; mode ``"c"`` keeps changes from the files, ``"r+"`` writes them.

    Raises:
        InputError: one is missing, truncated, or not as the record says.
    """
    arrays = {}
    for name, (dtype, *shape) in record["arrays"].items():
        path = os.path.join(folder, f"{name}.npy")
        try:
            array = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
            if array.dtype != dtype or array.shape != (record["rows"], *shape):
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not {dtype} of {record['rows']} rows")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"expected features in {path!r}, but: {first_line(error)}; {_AGAIN}") from None
        arrays[name] = array
    return arrays


def create_arrays(folder: str | os.PathLike[str], rows: int, shapes: Shapes) -> None:
    """New arrays of zeros in a folder."""
    for name, (dtype, *shape) in shapes.items():
        path = os.path.join(folder, f"{name}.npy")
        np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (rows, *shape))


def read_arrays(folder: str | os.PathLike[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Map a folder that holds all of its blocks, each with the checksum it was written with; and its facts.

    Raises:
        InputError: no such folder, a pass that has not ended, or files that are truncated or changed.
    """
    record = read_record(Path(folder) / RECORD)
    arrays = open_arrays(folder, record, "c")
    changed, blocks = len(changed_blocks(arrays, record["checksums"])), number_of_blocks(record["rows"])
    if changed or len(record["checksums"]) != blocks:
        raise InputError(
            f"expected the features that were written to {os.fspath(folder)!r}, but {changed} of {blocks} blocks of "
            f"rows changed since; {_AGAIN}"
        )
    return arrays, record["facts"]


def require_new(folder: str | os.PathLike[str]) -> None:
    """Refuse a place for arrays that can't be written to, or holds anything but hidden files."""
    require_folder(folder)
    if os.path.isdir(folder) and any(not name.startswith(".") for name in os.listdir(folder)):
        raise InputError(f"expected a new or empty folder for features, got {os.fspath(folder)!r}; give another")


class Filling:
    """A folder of arrays that one or more processes fill block by block, and that a killed one leaves in order.

    A block counts once its checksum is in a record: each rank writes its own, and :meth:`finish` makes them one.

    Args:
        folder: for the arrays.
        rows, shapes: of them.
        facts: for the record. An earlier pass goes on if its ``facts["source"]`` is the same.
        rank: of this process; the methods for the first rank are called before or after all others are done.
    """

    def __init__(
        self, folder: str | os.PathLike[str], rows: int, shapes: Shapes, facts: Mapping[str, Any], rank: int = 0
    ) -> None:
        self.folder, self.rows, self.facts, self.rank = Path(folder), rows, facts, rank
        self.shapes = {name: (np.dtype(dtype), *shape) for name, (dtype, *shape) in shapes.items()}
        self._checksums: dict[int, int] = {}

    def prepare(self, known: Arrays) -> None:
        """First rank: make the arrays, the ``known`` ones filled, or look what an earlier pass left of them.

        Raises:
            InputError: other files in the folder, arrays of another source, or too little room.
        """
        records = self._records()
        if not records:
            require_new(self.folder)
        for record in records:
            self._require_same_source(record)
            self.facts = record["facts"]
        self._checksums = {block: value for record in records for block, value in record["checksums"].items()}
        try:
            for block in changed_blocks(self.open("r+"), self._checksums):
                del self._checksums[block]
        except InputError:  # missing or truncated
            self._checksums = {}
            self._require_room(self.size())
            self._write(self._own_path())  # first: from now on the files in this folder are ours
            create_arrays(self.folder, self.rows, self.shapes)
        whole = len(self._checksums) == number_of_blocks(self.rows)
        if not whole:
            arrays = self.open("r+")
            for name, rows in known.items():
                arrays[name][:] = rows
                arrays[name].flush()  # type: ignore[attr-defined]
        self._keep(self.folder / RECORD if whole else self._own_path())

    def open(self, mode: str) -> dict[str, npt.NDArray[Any]]:
        """Map the arrays, see :func:`open_arrays`."""
        return open_arrays(self.folder, {"rows": self.rows, "arrays": self.shapes}, mode)

    def missing(self) -> list[int]:
        """The blocks that no rank has filled yet."""
        done = {block for record in self._records() for block in record["checksums"]}
        return [block for block in range(number_of_blocks(self.rows)) if block not in done]

    def filled(self, arrays: Arrays, block: int) -> None:
        """Record a block that this rank has written to the arrays."""
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        self._checksums[block] = checksum(arrays, block)
        self._write(self._own_path())

    def finish(self) -> None:
        """First rank: make the records of all ranks one, which tells that the arrays are whole."""
        self._checksums = {block: value for record in self._records() for block, value in record["checksums"].items()}
        self._keep(self.folder / RECORD)

    def _own_path(self) -> Path:
        return self.folder / f"rank{self.rank}.{RECORD}"

    def _write(self, path: Path) -> None:
        write_record(path, self.rows, self.shapes, self._checksums, self.facts)

    def _keep(self, path: Path) -> None:
        """Write this record, and remove those that it comprises."""
        self._write(path)
        for other in self._paths():
            if other != path:
                other.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{RECORD}"))

    def _records(self) -> list[dict[str, Any]]:
        return [read_record(path) for path in self._paths()]

    def _require_same_source(self, record: Mapping[str, Any]) -> None:
        ours = {**self.facts["source"], "rows": self.rows, "arrays": self.shapes}
        theirs = {**record["facts"].get("source", {}), "rows": record["rows"], "arrays": record["arrays"]}
        other = [name for name, value in ours.items() if theirs.get(name) != value]
        if other:
            raise InputError(
                f"expected features of this trunk and data in {str(self.folder)!r}, got some of another "
                f"{', '.join(other)}; give another folder, or delete this one"
            )

    def size(self) -> int:
        """Bytes of the arrays."""
        row: int = sum(dtype.itemsize * math.prod(shape) for dtype, *shape in self.shapes.values())
        return self.rows * row

    def _require_room(self, need: int) -> None:
        room = shutil.disk_usage(self.folder).free
        if need > room:
            raise InputError(
                f"expected {need / 2**20:,.0f} MiB free for the features in {str(self.folder)!r}, got "
                f"{room / 2**20:,.0f}; free some, give another folder, or keep fp16"
            )
