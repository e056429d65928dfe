"""The generalized re-weighted loss as a module."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .counts import ClassCounts, load_class_counts
from .errors import InputError
from .functional import REDUCTIONS, check_background_weight, class_weights, grw_cross_entropy, grw_denominator


class GRWCrossEntropyLoss(nn.Module):
    """Generalized re-weighted cross-entropy (eq. 8-11), :func:`disalign.functional.grw_cross_entropy` with its weights.

    The weights are a non-persistent buffer: a checkpoint never overrides ``rho``. :meth:`metadata` is what to keep.

    Args:
        class_counts: anything :func:`disalign.load_class_counts` takes; ``None`` if the counts are known only later,
            through :meth:`set_class_counts`.
        rho: scale of eq. 11 (official: 1.2 classification, 0.8 LVIS, 0.2 ADE20K).
        reduction, ignore_index: see :func:`disalign.functional.grw_cross_entropy`.
        normalize, zero_count: see :func:`disalign.functional.generalized_reweight`.
        background_weight: weight of one more class behind the K counted ones, a detector's background (official: 1), or
            ``"balanced"``; see :func:`disalign.functional.class_weights`.
        sync: in distributed training divide a mean by the global batch's denominator, so that the gradient, which DDP
            averages over ranks, does not depend on the number of GPUs. Every rank must then call the loss, an empty
            batch included. Off in evaluation (``eval()`` or ``torch.no_grad()``).

    Shapes: logits (N, K, *), or (N, K + 1, *) with a background; target (N, *) int64; returns a scalar, or (N, *) for
    reduction ``"none"``.

    Raises:
        InputError: bad counts or options, or a call before the counts are known.

    Examples:
        >>> loss = disalign.GRWCrossEntropyLoss(class_counts=[6, 3, 2, 1], rho=1.0)
        >>> loss.weight
        tensor([0.3333, 0.6667, 1.0000, 2.0000])
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        rho: float = 1.2,
        *,
        reduction: str = "weighted_mean",
        ignore_index: int = -100,
        normalize: str = "mean",
        zero_count: str = "error",
        sync: bool = True,
        background_weight: float | str | None = None,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise InputError(f"expected a reduction among {', '.join(REDUCTIONS)}, got {reduction!r}")
        if background_weight is not None:
            check_background_weight(background_weight)
        self.rho = rho
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.normalize = normalize
        self.zero_count = zero_count
        self.sync = sync
        self.background_weight = background_weight
        self.class_counts: Tensor | None = None
        self.weight: Tensor  # None until the counts are known
        self.register_buffer("weight", None, persistent=False)
        if class_counts is not None:
            self.set_class_counts(class_counts)

    def set_class_counts(self, class_counts: ClassCounts) -> None:
        """Compute the weights from anything :func:`disalign.load_class_counts` takes."""
        counts = load_class_counts(class_counts)
        weight = class_weights(counts, self.rho, self.normalize, self.zero_count, self.background_weight)
        self.class_counts = counts
        self.weight = weight if self.weight is None else weight.to(self.weight.device)

    def metadata(self) -> dict[str, Any]:
        """Plain values to keep beside a checkpoint: the counts and how they became weights."""
        return {
            "class_counts": None if self.class_counts is None else self.class_counts.tolist(),
            "rho": self.rho,
            "normalize": self.normalize,
            "zero_count": self.zero_count,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "sync": self.sync,
            "background_weight": self.background_weight,
        }

    @torch.jit.unused  # by an exported model
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self._move_weight(logits.device)
        return grw_cross_entropy(
            logits, target, self.weight, self.reduction, self.ignore_index, self._global_denominator(target)
        )

    def _move_weight(self, device: torch.device) -> None:
        if self.weight is None:
            raise InputError("expected class counts before the first loss, got none; call set_class_counts(...) first")
        if self.weight.device != device:
            self.weight = self.weight.to(device)

    def _denominator(self, target: Tensor) -> Tensor:
        return grw_denominator(target, self.weight, self.reduction, self.ignore_index)

    def _global_denominator(self, target: Tensor) -> Tensor | None:
        averaged = self.reduction in ("weighted_mean", "mean")
        training = self.training and torch.is_grad_enabled()
        if not (averaged and training and self.sync and dist.is_available() and dist.is_initialized()):
            return None
        denominator = self._denominator(target)
        dist.all_reduce(denominator)
        # DDP averages the ranks' gradients; dividing by the mean denominator makes that average the global mean.
        return denominator / dist.get_world_size()

    def extra_repr(self) -> str:
        return f"rho={self.rho}, reduction={self.reduction!r}, normalize={self.normalize!r}, sync={self.sync}"
