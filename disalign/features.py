"""Features and labels of a dataset from a frozen trunk: in memory, or memory-mapped from a folder."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .counts import ClassCounts, load_class_counts
from .errors import InputError, first_line, some
from .functional import check_labels
from .io.arrays import BLOCK, read_arrays, require_new, save_arrays
from .io.images import MOST_CLASSES

#: What has one row an example.
ARRAYS = ("x", "y", "weights", "groups", "bilinear")
DTYPES = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Features and labels of N examples: what :func:`disalign.fit` learns from.

    :meth:`from_arrays`, :meth:`open` and :func:`disalign.collect` build one from validated input.

    Attributes:
        x: (N, d) fp16, fp32 or fp64, what the classifier sees; memory-mapped where it comes from a folder.
        y: (N,) int64 labels in [0, K), or K where there is a ``background``.
        weights: (N,) fp64 importance weights; all 1 unless examples were sampled with unequal probabilities.
        class_counts: (K,) int64 examples per class of the *whole* training set, of which this may be a part.
        groups: (N,) int64 group of each row; rows of one group (views of an image, frames of a film) always fall into
            the same fold. ``None`` if rows are independent.
        bilinear: (N, G) weights of the G cells of a feature map that a pixel's scores are interpolated from; ``x`` is
            then (N, G, d). ``None`` if ``x`` is (N, d).
        totals: (K,) fp64, or (K + 1,) with a background: the sum of the weights of each label over the whole training
            set, if it is known and the rows are a sample of that set; ``None`` to sum the rows' weights.
        background: whether label K is a detector's background, which ``class_counts`` does not include.
        provenance: the trunk, data, date and library versions that the features come from, as plain values.
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    class_counts: Tensor
    groups: Tensor | None = None
    background: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    bilinear: Tensor | None = None
    totals: Tensor | None = None

    @classmethod
    def from_arrays(
        cls,
        x: Tensor | npt.NDArray[Any],
        y: Tensor | npt.NDArray[Any] | Sequence[int],
        weights: Tensor | npt.NDArray[Any] | Sequence[float] | None = None,
        class_counts: ClassCounts | None = None,
        groups: Tensor | npt.NDArray[Any] | Sequence[int] | None = None,
        background: bool = False,
        provenance: Mapping[str, Any] | None = None,
        bilinear: Tensor | npt.NDArray[Any] | None = None,
        totals: Tensor | npt.NDArray[Any] | Sequence[float] | None = None,
    ) -> "Features":
        """Build from existing arrays; ``x`` is not copied.

        ``class_counts`` defaults to the counts in ``y``; pass it if ``y`` is a subset of the training set, or lacks the
        last classes.

        Raises:
            InputError: arrays of other shapes or dtypes, labels outside [0, K), NaN or infinity (the rows are named),
                or negative weights.

        Examples:
            >>> features = disalign.Features.from_arrays(torch.randn(6, 4), [0, 0, 0, 1, 1, 2])
            >>> features
            Features(6 x 4 float32, 3 classes)
            >>> features.class_counts
            tensor([3, 2, 1])
        """
        x, y, background = as_tensor(x), as_tensor(y), bool(background)
        if x.dim() != 2 + (bilinear is not None) or x.dtype not in DTYPES or not x.numel():
            raise InputError(
                f"expected features of shape {'(N, d)' if bilinear is None else '(N, G, d)'} in fp16, fp32 or fp64, "
                f"one row an example, got {x.dtype} of shape {tuple(x.shape)}; pool or flatten them"
            )
        if bilinear is not None:
            bilinear = as_tensor(bilinear)
            if bilinear.shape != x.shape[:2]:
                raise InputError(
                    f"expected bilinear weights of shape {tuple(x.shape[:2])}, one for each cell of a row, got "
                    f"{tuple(bilinear.shape)}"
                )
            require_finite_rows(bilinear)
        _require_rows(x, y, "labels")
        counts = None if class_counts is None else load_class_counts(class_counts)
        labels = min(int(y.max()) + 1, MOST_CLASSES) if counts is None else len(counts) + background
        y = check_labels(y.cpu(), labels, ignore_index=None)
        weights = torch.ones(len(y)) if weights is None else as_tensor(weights)
        _require_rows(x, weights, "weights")
        weights = weights.double().cpu()
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
            raise InputError("expected weights that are finite, not negative and not all zero; correct them")
        if groups is not None:
            groups = as_tensor(groups).cpu()
            _require_rows(x, groups, "groups")
            if groups.is_floating_point():
                raise InputError(f"expected whole numbers as groups, got {groups.dtype}; number them")
            groups = groups.long()
        require_finite_rows(x)
        if counts is None:
            counts = load_class_counts(torch.bincount(y)[: labels - background])
        if totals is not None:
            totals = as_tensor(totals).double()
            if totals.shape != (labels,) or not (totals.isfinite().all() and (totals >= 0).all() and totals.any()):
                raise InputError(f"expected totals of {labels} labels, finite, not negative and not all zero")
        return cls(x, y, weights, counts, groups, background, dict(provenance or {}), bilinear, totals)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Features":
        """Memory-map a folder written by :meth:`save` or :func:`disalign.collect`, read-only.

        Raises:
            InputError: the folder holds no features, an unfinished pass, or truncated or modified files.
        """
        arrays, facts = read_arrays(folder)
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if not {"x", "y"} <= tensors.keys() <= set(ARRAYS):
            raise InputError(f"expected features x and labels y in {os.fspath(folder)!r}, got {some(tensors)}")
        kept: dict[str, Any] = {
            name: facts.get(name) for name in ("class_counts", "background", "provenance", "totals")
        }
        if not isinstance(kept["provenance"], dict):
            raise InputError(
                f"expected the provenance of features in {os.fspath(folder)!r} as a JSON object; collect anew"
            )
        return cls.from_arrays(**tensors, **kept)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write to a new folder: .npy files, and last a record with their checksums."""
        require_new(folder)
        facts = {"class_counts": self.class_counts.tolist(), "background": self.background}
        facts["totals"] = None if self.totals is None else self.totals.tolist()
        facts["provenance"] = json.loads(json.dumps(dict(self.provenance), default=str))
        arrays = {name: getattr(self, name) for name in ARRAYS}
        found = {name: tensor.cpu().numpy() for name, tensor in arrays.items() if tensor is not None}
        save_arrays(folder, len(self), [found], facts)

    def __len__(self) -> int:
        return len(self.y)

    def part(self, rows: Tensor) -> "Features":
        """A subset of the rows, with the class counts of the same training set and its own ``totals``.

        ``rows`` are (n,) int64 or (N,) bool; they are copied.
        """
        arrays = {name: getattr(self, name) for name in ARRAYS}
        found = {name: tensor[rows] for name, tensor in arrays.items() if tensor is not None}
        return replace(self, totals=None, **found)

    def __repr__(self) -> str:
        kind = str(self.x.dtype).removeprefix("torch.")
        shape = " x ".join(f"{size:,}" for size in self.x.shape)
        return f"Features({shape} {kind}, {len(self.class_counts)} classes)"


def as_tensor(values: Any) -> Tensor:
    """An array as a tensor, sharing its memory where possible; treat it as read-only.

    Raises:
        InputError: values that are no numbers.
    """
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        if not array.dtype.isnative or min(array.strides, default=0) < 0 or array.dtype == np.uint16:
            array = np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else array.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise InputError(f"expected arrays of numbers, got {type(values).__name__}: {first_line(error)}") from None


def _require_rows(x: Tensor, values: Tensor, what: str) -> None:
    if values.shape != (len(x),):
        raise InputError(f"expected {len(x)} {what}, one for each row of the features, got shape {tuple(values.shape)}")


def require_finite_rows(x: Tensor, rows: Sequence[int] | None = None) -> None:
    """Refuse features with NaN or infinity; ``rows`` are the numbers of the rows, for the message."""
    # In blocks: x may not fit in memory.
    finite = torch.cat([block.isfinite().flatten(1).all(1) for block in x.split(BLOCK)])
    wrong = (~finite).nonzero().flatten().tolist()
    if wrong:
        named = wrong if rows is None else [rows[place] for place in wrong]
        raise InputError(
            f"expected finite features, got NaN or infinity in {len(wrong)} rows: {some(named)}; leave these examples "
            "out, or use a wider dtype"
        )
