"""A folder of arrays with one row an example: .npy files that are mapped, and a record with their checksums."""

import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, first_line, some
from .files import atomic_file, read_json, require_folder, write_json

#: The file that makes a folder one of arrays.
RECORD = "record.json"
#: The file that tells of a pass into a folder that has not ended.
BEGUN = "begun.json"
#: Rows that share a checksum.
BLOCK = 1024
log = logging.getLogger("disalign")

NO_ROWS = "expected rows to learn from, got none; are there labels in the data?"
_AGAIN = "delete the folder and collect the features again"

Arrays = Mapping[str, npt.NDArray[Any]]
#: Name of an array -> dtype and the shape of one row.
Shapes = Mapping[str, Sequence[Any]]


def checksum(arrays: Arrays, block: int) -> int:
    """CRC-32 of one block of rows, over all arrays."""
    return _crc({name: array[block * BLOCK : (block + 1) * BLOCK] for name, array in arrays.items()})


def _crc(arrays: Arrays) -> int:
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, found)
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
    """Map the arrays that a record names; mode ``"c"`` keeps changes from the files, ``"r"`` refuses them.

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


def save_arrays(folder: str | os.PathLike[str], rows: int, pieces: Iterable[Arrays], facts: Mapping[str, Any]) -> None:
    """Write pieces of arrays, ``rows`` in all, one after another; the record that makes them count appears last."""
    shapes: dict[str, tuple[Any, ...]] = {}
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for piece in pieces:
            for name, array in piece.items():
                if name not in files:
                    shapes[name] = (array.dtype, *array.shape[1:])
                    files[name] = stack.enter_context(atomic_file(Path(folder) / f"{name}.npy"))
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": (rows, *array.shape[1:])}
                    np.lib.format.write_array_header_2_0(files[name], header)
                files[name].write(np.ascontiguousarray(array).view(np.uint8).data)
    arrays = open_arrays(folder, {"rows": rows, "arrays": shapes}, "r")
    checksums = {block: checksum(arrays, block) for block in range(number_of_blocks(rows))}
    write_record(Path(folder) / RECORD, rows, shapes, checksums, facts)


class Parts:
    """A folder that one or more processes fill part by part, and that a killed one leaves in order.

    Each part is a file of its own, which appears whole, until all are there and :meth:`finish` makes them one.

    Args:
        folder: for the arrays.
        number: of parts.
        facts: for the record. An earlier pass goes on if its ``facts["source"]`` is the same.
        layout: plain values that say what is in which part; an earlier pass goes on if they are the same.
    """

    def __init__(self, folder: str | os.PathLike[str], number: int, facts: Mapping[str, Any], layout: Any) -> None:
        self.folder, self.number, self.facts, self.layout = Path(folder), number, facts, layout

    def prepare(self) -> None:
        """First rank, before all others: take the folder, or what an earlier pass left in it.

        Raises:
            InputError: other files in the folder, or arrays of another source.
        """
        begun, record = self.folder / BEGUN, self.folder / RECORD
        if record.exists():
            self._go_on(read_record(record)["facts"], {})
            try:
                read_arrays(self.folder)
                self._remove_parts()
                return
            except InputError as error:
                log.warning("%s; they are collected again", error)
                self._begin()
                record.unlink()
        elif any(self.folder.glob("part-*.npz")) and begun.exists():
            self._go_on(read_json(begun, "the source of features"), {"layout": self.layout})
        else:
            if not begun.exists():
                require_new(self.folder)
            self._begin()

    def missing(self) -> list[int]:
        """The parts that are not there yet, or not whole."""
        if (self.folder / RECORD).exists():
            return []
        return [part for part in range(self.number) if self.read(part) is None]

    def read(self, part: int) -> Arrays | None:
        """One part, before :meth:`finish`; ``None`` if it is not whole."""
        try:
            with open(self._path(part), "rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
            return arrays if arrays.pop("crc") == _crc(arrays) else None
        # RuntimeError: zipfile's, of what a broken file asks for.
        except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile):
            return None

    def write(self, part: int, arrays: Arrays) -> None:
        with atomic_file(self._path(part)) as file:
            np.savez(file, crc=np.int64(_crc(arrays)), **arrays)  # type: ignore[arg-type]

    def finish(self) -> None:
        """First rank, after all others: make the parts one. They stay until that is done."""
        if (self.folder / RECORD).exists():
            return
        rows = 0
        for part in range(self.number):
            with np.load(self._path(part), allow_pickle=False) as found:
                rows += len(found["y"])
        if not rows:
            raise InputError(NO_ROWS)
        save_arrays(self.folder, rows, (self.read(part) or {} for part in range(self.number)), self.facts)
        self._remove_parts()

    def _begin(self) -> None:
        write_json(self.folder / BEGUN, {**self.facts, "layout": self.layout})

    def _remove_parts(self) -> None:
        for path in (self.folder / BEGUN, *self.folder.glob("part-*.npz")):
            path.unlink(missing_ok=True)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06}.npz"

    def _go_on(self, facts: Any, also: Mapping[str, Any]) -> None:
        """Take over the facts of an earlier pass, if it had the same source, and ``also`` the same of these."""
        source = facts.get("source") if isinstance(facts, dict) else None
        theirs = {**facts, **source} if isinstance(source, dict) else {}
        ours = json.loads(json.dumps({**self.facts["source"], **also}))
        other = [name for name, value in ours.items() if theirs.get(name) != value]
        if other:
            raise InputError(
                f"expected features of this trunk and data in {str(self.folder)!r}, got some of another "
                f"{some(other)}; give another folder, or delete this one"
            )
        self.facts = facts


def require_room(folder: str | os.PathLike[str], size: float) -> None:
    """Refuse a folder on a disk with less room than ``size`` bytes."""
    room = shutil.disk_usage(folder).free
    if size > room:
        raise InputError(
            f"expected {size / 2**20:,.0f} MiB free for the features in {os.fspath(folder)!r}, got "
            f"{room / 2**20:,.0f}; free some, give another folder, or keep fp16"
        )
