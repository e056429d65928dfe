"""Sums over all rows of features, and the L-BFGS that minimises them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .features import Features

#: Numbers of the widest tensor of a chunk, of which some ten live at a time, in fp64: 80 MB on a CPU.
CHUNK = {"cpu": 1 << 20}
CHUNK_ON_DEVICES = 1 << 25


class Chunk(NamedTuple):
    """Some rows on the classifier's device: :class:`Features`' arrays, ``x`` in fp32 or better."""

    x: Tensor
    y: Tensor
    weights: Tensor
    bilinear: Tensor | None

    def scores(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, C) scores of the rows; ``score`` goes from features (m, d) to (m, C), and a pixel's are interpolated."""
        if self.bilinear is None:
            return score(self.x)
        cells: Tensor = score(self.x.flatten(0, 1)).unflatten(0, self.bilinear.shape)
        return (cells * self.bilinear.to(cells)[..., None]).sum(1)


#: From a classifier and a chunk of rows to a scalar, or a few.
Loss = Callable[[nn.Module, Chunk], Tensor]


@dataclass(frozen=True)
class Part:
    """Rows of features, and the classifier whose scores of them count."""

    classifier: nn.Module
    features: Features
    #: (n,) int64; ``None`` for all, which are then not copied.
    rows: Tensor | None = None

    def chunks(self) -> Iterator[Chunk]:
        """All rows, in distributed training this rank's share of them, a few at a time."""
        weight = cast(Tensor, self.classifier.weight)
        rows = torch.arange(len(self.features)) if self.rows is None else self.rows
        if dist.is_available() and dist.is_initialized():
            rows = rows.tensor_split(dist.get_world_size())[dist.get_rank()]
        widest = max(weight.shape[:2]) * math.prod(self.features.x.shape[1:-1])
        size = max(1, CHUNK.get(weight.device.type, CHUNK_ON_DEVICES) // widest)
        for chosen in rows.split(size):  # one empty chunk where there are no rows, so that all ranks sum alike
            whole = self.rows is None and len(chosen)
            where: Any = slice(int(chosen[0]), int(chosen[-1]) + 1) if whole else chosen
            yield Chunk(
                self.features.x[where].to(weight),
                self.features.y[where].to(weight.device),
                self.features.weights[where].to(weight.device),
                None if self.features.bilinear is None else self.features.bilinear[where].to(weight.device),
            )


def total(parts: Sequence[Part], loss: Loss) -> Tensor:
    """The fp64 sum of a loss over all rows; without gradients."""
    with torch.no_grad():
        found = [loss(part.classifier, chunk).double() for part in parts for chunk in part.chunks()]
    return _over_ranks(torch.stack(found).sum(0))


def total_and_gradients(parts: Sequence[Part], loss: Loss, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The fp64 sum of a loss over all rows, and its gradients."""
    sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in (torch.zeros(()), *parameters)]
    sums[0] = sums[0].to(parameters[0].device)
    for part in parts:
        for chunk in part.chunks():
            value = loss(part.classifier, chunk)
            for summed, found in zip(sums, (value.detach(), *torch.autograd.grad(value, parameters)), strict=True):
                summed += found
    found, *gradients = [_over_ranks(summed) for summed in sums]
    return found, gradients


def _over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


@dataclass(frozen=True)
class Solution:
    """``start`` and ``end`` of the objective, how often it was evaluated, and whether the solver ended by itself."""

    start: float
    end: float
    evaluations: int
    converged: bool


def minimise(
    parameters: Sequence[nn.Parameter],
    evaluate: Callable[[], tuple[Tensor, list[Tensor]]],
    penalty: Callable[[Sequence[Tensor]], Tensor],
    tolerance: float = 1e-7,
    most: int = 1000,
) -> Solution:
    """Full-batch L-BFGS with strong Wolfe line search, in place, from the parameters' present values.

    Args:
        parameters: to learn, of any dtype; the solver itself works in fp64.
        evaluate: the objective's first term at the parameters' values, and its gradients.
        penalty: its second term, a function of the values in fp64.
        tolerance: of the largest absolute gradient.
        most: evaluations.
    """
    values = [parameter.detach().double().requires_grad_() for parameter in parameters]
    found: list[float] = []

    def objective() -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        loss, gradients = evaluate()
        second = penalty(values)
        pulls = torch.autograd.grad(second, values, allow_unused=True, materialize_grads=True)
        for value, gradient, pull in zip(values, gradients, pulls, strict=True):
            value.grad = gradient + pull
        found.append(float(loss + second.detach()))
        return loss + second.detach()

    optimizer = torch.optim.LBFGS(
        values,
        max_iter=most,
        max_eval=most,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return Solution(found[0], min(found), len(found), len(found) < most)
