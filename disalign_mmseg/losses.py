"""The generalized re-weighted loss as MMSegmentation's heads call it."""

from typing import Any

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

import disalign
from disalign.counts import ClassCounts
from disalign.errors import InputError
from disalign.functional import grw_mean

from .upsampling import sampled_cross_entropy, upsampled_cross_entropy


@MODELS.register_module()
class GRWCrossEntropyLoss(disalign.GRWCrossEntropyLoss):
    """Generalized re-weighted cross-entropy (eq. 8-11) for a decode head's ``loss_decode``.

    Args:
        class_counts: anything :func:`disalign.load_class_counts` takes (``"ade20k"``, the path of objectInfo150.txt or
            of a JSON file, a list); or ``"dataset"``, given later through :meth:`set_class_counts`.
        rho: scale of eq. 11 (official: 0.2 on ADE20K).
        reduction: ``"weighted_mean"``, sum(w * ce) / sum(w); ``"mean"``, sum(w * ce) / N_valid (eq. 9).
        normalize, zero_count, sync: see :class:`disalign.GRWCrossEntropyLoss`.
        ignore_index: label of pixels that are ignored; the head's must be the same.
        loss_weight: factor of the loss.
        avg_non_ignore: ``False`` divides by the number of all pixels, ignored ones too, as the official code does on
            MMSegmentation 0.x; for reduction ``"mean"`` only.
        upsample: how :meth:`upsampled` resizes the head's logits to the label map's size: ``"fused"`` with the loss
            (:func:`.upsampling.upsampled_cross_entropy`), ``"plain"`` before it; the same in value and gradient.
        sampled_pixels: estimate the loss without bias from this many pixels of every image (official: all); see
            :func:`.upsampling.sampled_cross_entropy`. Torch has no deterministic form of its gradient on a GPU.
        loss_name: its name in the log.

    Raises:
        InputError: bad counts or options.
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = "dataset",
        rho: float = 0.2,
        *,
        reduction: str = "weighted_mean",
        normalize: str = "mean",
        zero_count: str = "error",
        sync: bool = True,
        ignore_index: int = 255,
        loss_weight: float = 1.0,
        avg_non_ignore: bool = True,
        upsample: str = "fused",
        sampled_pixels: int | None = None,
        loss_name: str = "loss_grw",
    ) -> None:
        if reduction not in (("weighted_mean", "mean") if avg_non_ignore else ("mean",)):
            raise InputError(
                f"expected reduction 'weighted_mean', or 'mean', alone with avg_non_ignore=False, got {reduction!r}"
            )
        if upsample not in ("fused", "plain"):
            raise InputError(f"expected upsample 'fused' or 'plain', got {upsample!r}")
        if sampled_pixels is not None and not (type(sampled_pixels) is int and sampled_pixels > 0):
            raise InputError(f"expected sampled_pixels as a whole number > 0 or None, got {sampled_pixels!r}")
        if sampled_pixels is not None and upsample == "plain":
            raise InputError("expected sampled_pixels without upsample='plain', since they are all that is upsampled")
        if not loss_name.startswith("loss_"):
            raise InputError(f"expected a loss_name that begins with 'loss_', or it is not trained, got {loss_name!r}")
        super().__init__(
            None if isinstance(class_counts, str) and class_counts == "dataset" else class_counts,
            rho,
            reduction=reduction,
            ignore_index=ignore_index,
            normalize=normalize,
            zero_count=zero_count,
            sync=sync,
        )
        self.loss_weight = loss_weight
        self.avg_non_ignore = avg_non_ignore
        self.upsample = upsample
        self.sampled_pixels = sampled_pixels
        self.loss_name = loss_name

    def metadata(self) -> dict:
        names = ("loss_weight", "avg_non_ignore", "upsample", "sampled_pixels")
        return super().metadata() | {name: getattr(self, name) for name in names}

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Any = None,
        avg_factor: Any = None,
        reduction_override: Any = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        """The exact loss of already upsampled logits, as stock heads call it.

        Args:
            cls_score: (N, K, H, W).
            label: (N, H, W) int64.
            weight, avg_factor, reduction_override: a pixel sampler's (OHEM), which is refused.
            ignore_index: the head's.

        Raises:
            InputError: no counts yet, a pixel sampler, another ignore index, wrong labels or number of classes.
        """
        if not (weight is None and avg_factor is None and reduction_override is None):
            raise InputError(
                "expected no pixel sampler, which would undo the balance of the classes, got one; set "
                "decode_head.sampler=None"
            )
        self._same_ignore_index(ignore_index)
        return self.loss_weight * super().forward(cls_score, label)

    def upsampled(
        self, seg_logits: Tensor, seg_label: Tensor, align_corners: bool, ignore_index: int | None = None
    ) -> Tensor:
        """The loss of a head's own logits, upsampled to the label map's size, or at its sampled pixels.

        Args:
            seg_logits: (N, K, h, w).
            seg_label: (N, H, W) or (N, 1, H, W) int64.
            align_corners, ignore_index: the head's.

        Raises:
            InputError: as :meth:`forward`.
        """
        label = seg_label.squeeze(1) if seg_label.dim() == 4 else seg_label
        self._same_ignore_index(ignore_index)
        self._move_weight(seg_logits.device)
        if self.sampled_pixels is not None:
            total = sampled_cross_entropy(
                seg_logits, label, self.weight, self.sampled_pixels, self.ignore_index, align_corners
            )
        elif self.upsample == "fused":
            total = upsampled_cross_entropy(seg_logits, label, self.weight, self.ignore_index, align_corners)
        else:
            resized = F.interpolate(seg_logits, label.shape[1:], mode="bilinear", align_corners=align_corners)
            return self(resized, label)
        return self.loss_weight * grw_mean(total, self._global_denominator(label))

    def _denominator(self, target: Tensor) -> Tensor:
        return super()._denominator(target) if self.avg_non_ignore else self.weight.new_tensor(target.numel())

    def _global_denominator(self, target: Tensor) -> Tensor:
        denominator = super()._global_denominator(target)
        return self._denominator(target) if denominator is None else denominator

    def _same_ignore_index(self, ignore_index: int | None) -> None:
        if ignore_index not in (None, self.ignore_index):
            raise InputError(f"expected loss_decode.ignore_index={ignore_index}, the head's, got {self.ignore_index}")
