"""The calibration on MMSegmentation's decode heads."""

from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from mmseg.models import decode_heads
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from disalign import AdaptiveCalibration, InputError
from disalign.errors import some

from .losses import GRWCrossEntropyLoss

#: Heads whose scores can't be calibrated this way -> why.
REFUSED = {
    "DDRHead": "it classifies at two depths and chooses among them by its training flag",
    "IterativeDecodeHead": "K-Net's classes are kernels, not a classifier of pixels",
    "KernelUpdateHead": "K-Net's classes are kernels, not a classifier of pixels",
    "Mask2FormerHead": "it classifies masks, not pixels",
    "MaskFormerHead": "it classifies masks, not pixels",
    "PIDHead": "it classifies in three branches and chooses among them by its training flag",
    "PointHead": "it classifies a choice of points, on top of another head's scores",
    "STDCHead": "it finds boundaries, not classes",
    "SegmenterMaskTransformerHead": "its scores are products of embeddings, not a classifier's",
    "SideAdapterCLIPHead": "it classifies masks, not pixels",
    "VPDDepthHead": "it estimates depth, not classes",
}
_COMPILED = ("CCHead", "PSAHead")


class DisAlignHead(BaseDecodeHead):
    """Mixin before a decode head that classifies by ``cls_seg``: its stage two (Sec. 3.2).

    For a head of your own: ``DisAlignMyHead = disalign_mmseg.calibrated(MyHead)``. Parameters keep their names;
    ``calibration.*`` is added, with a confidence per pixel.

    Args:
        calibration: options of :class:`disalign.AdaptiveCalibration`.
        options: the head's own.

    Shapes: features (N, d, h, w), scores (N, K, h, w).

    Raises:
        InputError: a head that can't be calibrated.
    """

    loss_decode: Any

    def __init__(self, *args: Any, calibration: dict | None = None, **options: Any) -> None:
        name = type(self).__name__.removeprefix("DisAlign")
        if name in _COMPILED and find_spec("mmcv._ext") is None:
            raise InputError(f"expected mmcv's compiled operators for {name}, got none; install an mmcv that has them")
        super().__init__(*args, **options)
        if self.out_channels != self.num_classes:
            raise InputError(
                f"expected one output of {name} for each of {self.num_classes} classes, got {self.out_channels}; a "
                "single sigmoid output has no margin between classes"
            )
        losses = self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]
        if len(losses) == 1:
            (self.loss_decode,) = losses
        elif any(isinstance(loss, GRWCrossEntropyLoss) for loss in losses):
            raise InputError(
                f"expected GRWCrossEntropyLoss alone in loss_decode, got {some(type(loss).__name__ for loss in losses)}"
                "; other losses do not know the class weights"
            )
        self.calibration = AdaptiveCalibration(
            self.num_classes, self.conv_seg.in_channels, spatial=True, **(calibration or {})
        )

    def cls_seg(self, feat: Tensor) -> Tensor:
        return self.calibration(super().cls_seg(feat), feat)

    def loss_by_feat(self, seg_logits: Any, batch_data_samples: Any) -> dict:
        """The head's loss, on calibrated scores; other outputs of the head (DAHead, EncHead) are frozen."""
        scores = seg_logits[0] if isinstance(seg_logits, tuple) else seg_logits
        if torch.is_grad_enabled() and not scores.requires_grad:
            raise InputError(
                f"expected {type(self).__name__} to classify by cls_seg, but its scores do not come from there; "
                "calibrate another head"
            )
        if self.sampler is not None or not isinstance(self.loss_decode, GRWCrossEntropyLoss):
            return super().loss_by_feat(seg_logits, batch_data_samples) | self.calibration.statistics()
        labels = self._stack_batch_gt(batch_data_samples)
        loss = self.loss_decode.upsampled(scores, labels, self.align_corners, self.ignore_index)
        return {self.loss_decode.loss_name: loss} | self.calibration.statistics()


def calibrated(head: type, module: str | None = None) -> type:
    """Register ``DisAlign<head>``, the head's stage two, and return it.

    Args:
        head: a decode head that classifies by ``cls_seg``.
        module: where the new class is stored by name, for pickle; default: ``head``'s module.

    Raises:
        InputError: not a decode head, or one whose scores can't be calibrated.
    """
    if head.__name__ in REFUSED:
        _refuse(head.__name__)
    if not issubclass(head, BaseDecodeHead):
        raise InputError(f"expected a decode head of mmseg's, got {head.__name__}")
    doc = f"{head.__name__} with a calibration on its scores; see :class:`DisAlignHead`."
    members = {"__doc__": doc, "__module__": module or head.__module__}
    return MODELS.register_module(module=type(f"DisAlign{head.__name__}", (DisAlignHead, head), members))


def _refuse(name: str) -> NoReturn:
    raise InputError(f"expected a head that classifies pixels, got {name}: {REFUSED[name]}; calibrate another head")


# DisAlignFCNHead, DisAlignUPerHead and so on.
HEADS = {}
for _name in sorted(set(decode_heads.__all__)):
    _head = getattr(decode_heads, _name)
    if _name in REFUSED:  # reported when a config names it
        MODELS.register_module(f"DisAlign{_name}", module=lambda head=_name, **_: _refuse(head))
    elif issubclass(_head, BaseDecodeHead):
        HEADS[f"DisAlign{_name}"] = calibrated(_head, __name__)
globals().update(HEADS)
