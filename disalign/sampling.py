"""A part of a training set that shows rare classes more often, with weights that undo it."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import InputError


def repeat_factors(classes: Sequence[Collection[int]], threshold: float = 1e-3) -> Tensor:
    """(N,) fp64 repeat factor of each image, max over its classes c of max(1, sqrt(threshold / f_c)).

    f_c is the share of images that show class c (Gupta et al., LVIS, 2019, Appendix B.2).

    Args:
        classes: of each image, those that it shows.
        threshold: of f_c, below which a class is rare.
    """
    images: dict[int, int] = {}
    for shown in classes:
        for label in set(shown):
            images[label] = images.get(label, 0) + 1
    factor = {label: max(1.0, math.sqrt(threshold * len(classes) / count)) for label, count in images.items()}
    return torch.tensor([max((factor[label] for label in shown), default=1.0) for shown in classes]).double()


def inclusion_probabilities(factors: Tensor, number: int) -> Tensor:
    """(N,) fp64 probabilities min(1, c * factor) that sum to ``number``; all 1 where there are no more images.

    Args:
        factors: (N,) positive.
        number: of images wanted.

    Raises:
        InputError: none is wanted.
    """
    if number < 1:
        raise InputError(f"expected 1 or more images of the training set, got {number}")
    if number >= len(factors):
        return torch.ones(len(factors), dtype=torch.float64)
    found = torch.zeros(len(factors), dtype=torch.float64)
    # Those that c would take above 1 are sure; c is shared among the others.
    while True:
        rest = found < 1
        share = factors[rest].double() * ((number - int((~rest).sum())) / factors[rest].double().sum())
        found[rest] = share.clamp(max=1)
        if (share <= 1).all():
            return found


def systematic_sample(probabilities: Tensor, seed: int = 0) -> Tensor:
    """(n,) int64 images in ascending order, each drawn with its probability; n is the sum of these, rounded up or down.

    The images are shuffled, laid out as intervals of the lengths of their probabilities, and hit by points one apart.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(probabilities), generator=generator)
    ends = probabilities[order].double().cumsum(0)
    offset = torch.rand((), dtype=torch.float64, generator=generator)
    points = (ends + offset).floor()
    hit = points > torch.cat([offset.floor()[None], points[:-1]])
    return order[hit].sort().values


def draw_images(
    classes: Sequence[Collection[int]], number: int, threshold: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(n,) int64 images drawn by their :func:`repeat_factors`, and the (N,) fp64 probabilities of all."""
    probabilities = inclusion_probabilities(repeat_factors(classes, threshold), number)
    return systematic_sample(probabilities, seed), probabilities


def seed_of(seed: int, item: int) -> int:
    """A seed of an item's own, of the 32 bits that torch's generator takes.

    Raises:
        InputError: a negative ``seed``.
    """
    if seed < 0:
        raise InputError(f"expected a seed >= 0, got {seed}")
    return int(np.random.SeedSequence((seed, item)).generate_state(1)[0])
