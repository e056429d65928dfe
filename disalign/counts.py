"""Class counts from any common form as one int64 tensor."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InputError, first_line, some
from .io.files import refuse_special

#: What :func:`load_class_counts` takes.
ClassCounts = Tensor | npt.NDArray[Any] | Sequence[float] | Mapping[Any, float] | str | os.PathLike[str]

#: Benchmarks whose counts are shipped (``disalign/data/NAME.json``, with their source).
BUNDLED = ("imagenet_lt", "inaturalist2018", "places_lt", "lvis_v0.5", "lvis_v1", "ade20k")


def load_class_counts(source: ClassCounts, unit: str | None = None) -> Tensor:
    """Training examples per class, index = contiguous label.

    Args:
        source: a list, array or tensor of K counts; a mapping, or a pandas Series, label -> count that covers 0..K-1; a
            JSON file that holds one of these, alone or under ``"train_counts"``; ADE20K's ``objectInfo150.txt``, whose
            printed shares of all pixels count in units of 1/10,000 (0.1576 is 1576, exactly); or a bundled name
            (:data:`BUNDLED`).
        unit: ``None`` for the file's own unit (images for classification, instances for LVIS, pixels for ADE20K), or
            ``"images"`` for its ``"image_counts"`` (``objectInfo150.txt``: its column Train).

    Returns:
        (K,) int64. Zeros are kept: :func:`disalign.generalized_reweight` decides about them.

    Raises:
        InputError: an unknown name, a missing or malformed file, labels with gaps, or counts that are not whole numbers
            >= 0.

    Examples:
        >>> disalign.load_class_counts({1: 20, 0: 100, 2: 3})
        tensor([100,  20,   3])
        >>> disalign.load_class_counts("lvis_v1").shape
        torch.Size([1203])
    """
    if isinstance(source, (str, os.PathLike)):
        counts = _read(source, unit)
    elif unit is not None:
        raise InputError(f"expected a unit only for a file or a bundled name, got {unit!r} for {type(source).__name__}")
    else:
        # A pandas Series is in the order of its index, which need not be the labels' (value_counts).
        counts = source.to_dict() if hasattr(source, "to_dict") and hasattr(source, "index") else source
    return _from_values(_in_label_order(counts) if isinstance(counts, Mapping) else counts)


def bundled(name: str) -> dict[str, Any]:
    """The whole shipped record of a benchmark: counts, class names, unit and source (facts; see docs/datasets.md).

    Raises:
        InputError: a name that is not bundled.
    """
    if name not in BUNDLED:
        raise InputError(f"expected a bundled name among {some(BUNDLED, 10)}, got {name!r}")
    record: dict[str, Any] = json.loads(resources.files("disalign").joinpath("data", f"{name}.json").read_text())
    return record


def _read(source: str | os.PathLike[str], unit: str | None) -> Any:
    if unit not in (None, "images"):
        raise InputError(f"expected unit None or 'images', got {unit!r}")
    path = os.fspath(source)
    record = bundled(path) if source in BUNDLED else _read_file(path)
    key = "image_counts" if unit else "train_counts"
    if isinstance(record, dict) and key in record:
        return record[key]
    if unit:
        raise InputError(f"expected {key!r} in {path!r}, which counts only one unit; ask for that one")
    return record


def _read_file(path: str) -> Any:
    refuse_special(path, "class counts")
    try:
        text = Path(path).read_text(encoding="utf-8")
        return _object_info(text, path) if text.lstrip().startswith("Idx") else json.loads(text)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"expected a JSON file or a bundled name among {some(BUNDLED, 10)}, got {path!r}, and there is no such file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"expected class counts as JSON in {path!r}, but: {first_line(error)}") from None


def _object_info(text: str, path: str) -> dict[str, list[int]]:
    """ADE20K's table of its classes: tab separated, with a header, and spaces after some fields."""
    header, *rows = ([field.strip() for field in line.split("\t")] for line in text.splitlines() if line.strip())
    with suppress(KeyError, ValueError):
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        in_order = [int(index) for index in columns["Idx"]] == list(range(1, len(rows) + 1))
        if in_order and all(re.fullmatch(r"[01]\.\d{4}", share) for share in columns["Ratio"]):
            return {
                "train_counts": [int(share.replace(".", "")) for share in columns["Ratio"]],
                "image_counts": [int(number) for number in columns["Train"]],
            }
    raise InputError(
        f"expected the columns Idx (1, 2, ...), Ratio (with 4 decimals) and Train in {path!r}, as ADE20K's "
        "objectInfo150.txt has them; take the file that comes with the data set"
    )


def _in_label_order(mapping: Mapping[Any, Any]) -> list[Any]:
    try:
        by_label = {int(label): count for label, count in mapping.items() if int(label) == float(label)}
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"expected labels 0..K-1 as keys of the class counts, got {some(mapping)}") from None
    gaps = sorted(set(range(len(mapping))) ^ set(by_label))
    if gaps:
        raise InputError(
            f"expected labels 0..{len(mapping) - 1} without gaps as keys of the class counts; missing or out of place: "
            f"{some(gaps)}; give an absent class the count 0"
        )
    return [by_label[label] for label in range(len(by_label))]


def _from_values(values: Any) -> Tensor:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError):
        raise InputError(f"expected one number per class, got {type(values).__name__} that is none") from None
    if array.dtype.kind not in "biuf" or array.ndim != 1 or array.size == 0:
        kind = type(values).__name__
        raise InputError(f"expected one number per class, got {kind} of {array.dtype} and shape {array.shape}")
    numbers = array.astype(np.float64)
    whole = (numbers >= 0) & (numbers < 2**63) & (numbers == np.floor(numbers)) & (array.dtype.kind != "b")
    bad = np.flatnonzero(~whole)
    if bad.size:
        raise InputError(
            f"expected counts that are whole numbers >= 0, got {some(array[bad].tolist())} at class {some(bad)}"
        )
    return torch.from_numpy(array.astype(np.int64))
