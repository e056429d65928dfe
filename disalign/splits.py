"""Groups of classes by how much training data they have, and means over them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from .counts import ClassCounts, load_class_counts
from .errors import InputError

Groups = dict[str, Tensor]


def many_medium_few(class_counts: ClassCounts, many: float = 100, few: float = 20) -> Groups:
    """Classification's groups: many > 100 training images, medium 20-100, few < 20 (Sec. 4.1, after OLTR).

    Args:
        class_counts: anything :func:`disalign.load_class_counts` takes.
        many, few: the thresholds; medium is ``few <= n <= many``.

    Returns:
        ``{"many", "medium", "few"}`` -> (K,) bool.

    Examples:
        >>> disalign.many_medium_few([101, 100, 20, 19])["medium"]
        tensor([False,  True,  True, False])
    """
    return _three_groups(load_class_counts(class_counts), ("many", "medium", "few"), above=many, least=few)


def head_body_tail(
    class_counts: Sequence[float] | npt.NDArray[Any] | Tensor,
    head: float = 0.01,
    tail: float = 0.001,
    total: float | None = None,
) -> Groups:
    """Segmentation's groups by share of all pixels: head > 1 %, body > 0.1 %, tail <= 0.1 % (Sec. 4.2).

    Args:
        class_counts: (K,) pixels per class, or shares of all pixels (any real numbers).
        head, tail: the thresholds, as shares.
        total: all pixels, unlabelled ones too; default: the labelled ones, or 1 if ``class_counts`` are shares.

    Returns:
        ``{"head", "body", "tail"}`` -> (K,) bool. With ADE20K's printed ratios: 20, 55 and 75 classes.

    Examples:
        >>> disalign.head_body_tail([98_000, 1_000, 900, 100])["body"]
        tensor([False,  True,  True, False])
    """
    shares = torch.as_tensor(class_counts, dtype=torch.float64)
    if total is None:
        total = 1.0 if float(shares.sum()) <= 1.0 + 1e-9 else float(shares.sum())
    # A share that is the threshold up to fp32's rounding is the threshold: ADE20K's class 76 is printed as 0.0010.
    shares = shares / total * (1 - 1e-6)
    return {"head": shares > head, "body": (shares > tail) & (shares <= head), "tail": shares <= tail}


def frequent_common_rare(image_counts: ClassCounts, frequent: float = 100, rare: float = 10) -> Groups:
    """LVIS's own groups by number of training images: f > 100, c 11-100, r <= 10.

    Args:
        image_counts: images (not instances) per class, anything :func:`disalign.load_class_counts` takes.
        frequent, rare: the thresholds.

    Returns:
        ``{"f", "c", "r"}`` -> (K,) bool.

    Examples:
        >>> disalign.frequent_common_rare([101, 100, 11, 10])["c"]
        tensor([False,  True,  True, False])
    """
    counts = load_class_counts(image_counts)
    return _three_groups(counts, ("f", "c", "r"), above=frequent, least=math.floor(rare) + 1)


def _three_groups(counts: Tensor, names: tuple[str, str, str], above: float, least: float) -> Groups:
    if least > above:
        raise InputError(f"expected the lower threshold at or below the upper, got {least} and {above}")
    return dict(zip(names, (counts > above, (counts >= least) & (counts <= above), counts < least), strict=True))


def group_means(values: Sequence[float] | Tensor, groups: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Mean of a per-class figure over each group.

    Args:
        values: (K,) figures; NaN for a class that was not evaluated, which then does not count.
        groups: name -> (K,) bool.

    Returns:
        Name -> mean, or ``None`` for a group without any evaluated class: not available, never 0.

    Raises:
        InputError: a group of another number of classes.

    Examples:
        >>> groups = disalign.many_medium_few([500, 50, 30, 5])
        >>> disalign.group_means([90.0, 60.0, 40.0, float("nan")], groups)
        {'many': 90.0, 'medium': 50.0, 'few': None}
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    means: dict[str, float | None] = {}
    for name, members in groups.items():
        if members.shape != values.shape:
            raise InputError(f"expected {values.numel()} classes in group {name!r}, got {members.numel()}")
        evaluated = values[members & ~values.isnan()]
        means[name] = float(evaluated.mean()) if evaluated.numel() else None
    return means
