"""Reading a checkpoint without running code from it."""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from ..errors import InputError, first_line, some
from .files import refuse_special
from .unpickling import load_arrays, records_left_out

_REFUSED = "re-save it with torch.save(model.state_dict(), ...), or convert it with --trust-checkpoint, if you trust it"


def load_file(path: str | os.PathLike[str], left_out: Iterable[str] = ()) -> Any:
    """Read a checkpoint without ever running code from it.

    Torch files are read with ``weights_only``; a ``.pkl`` of numpy arrays by
    :func:`disalign.io.unpickling.load_arrays`. A ``.pkl`` may be either: its content tells.

    Args:
        path: the file.
        left_out: full names of classes and functions whose objects the file may hold and that are left out, see
            :func:`disalign.io.unpickling.records_left_out`.

    Returns:
        What it holds, on the CPU, numpy arrays as tensors.

    Raises:
        InputError: a missing or truncated file, or one that holds anything else than tensors and plain values.
    """
    path = os.fspath(path)
    refuse_special(path, "a checkpoint")
    try:
        if zipfile.is_zipfile(path):
            _verify(path)
        if path.endswith(".pkl") and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                content = load_arrays(file)
            if content != torch.serialization.MAGIC_NUMBER:
                return content
        with records_left_out(left_out), warnings.catch_warnings():
            # A warning about files that torch then reads, or refuses with an error of its own.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"expected a checkpoint at {path!r}, but there is no such file") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected only tensors and plain values in {path!r}, but {_what_else(path, error)}; {_REFUSED}"
        ) from None
    except Exception as error:  # a broken file can break a reader anywhere
        raise InputError(
            f"expected a checkpoint at {path!r}, but it can't be read ({first_line(error).split('. ')[0]}); is it "
            "truncated or of another format?"
        ) from None


def _verify(path: str) -> None:
    """Compare the checksums that torch writes, and does not read."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{record.filename} is compressed; convert TorchScript by --trust-checkpoint")
            if record.CRC:  # torch can be told to leave them out
                with archive.open(record) as file:
                    while file.read(1 << 20):
                        pass


def _what_else(path: str, error: Exception) -> str:
    if zipfile.is_zipfile(path):
        with suppress(Exception):  # it reads the file again
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                return f"it also holds {some(names)}"
    # torch's own message advises switching weights_only off; ours keeps the name it found.
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"it also holds {found[1]}"
    said = first_line(error)
    return "torch's safe reader can't read it" if said.startswith("Weights only load failed") else said
