"""disalign_mmseg's own segmentors, and its loss on scores that are upsampled already or in strips."""

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from torch import nn

from disalign_mmseg import GRWCrossEntropyLoss

from .adapters import COUNTS, Adapter, below, labels

BACKBONE = dict(
    type="ResNetV1c",
    depth=18,
    base_channels=4,
    stem_channels=4,
    strides=(1, 2, 1, 1),
    norm_cfg=dict(type="BN"),
)
FCN = dict(
    type="FCNHead",
    in_channels=32,
    channels=6,
    num_convs=1,
    num_classes=len(COUNTS),
    norm_cfg=dict(type="BN"),
)
ASPP = dict(
    type="ASPPHead",
    in_channels=32,
    channels=6,
    dilations=(1, 2),
    num_classes=len(COUNTS),
    norm_cfg=dict(type="BN"),
)


def segmentor(head, calibrated):
    stage = ""
    if calibrated:
        stage, loss = "DisAlign", dict(type="GRWCrossEntropyLoss")
        head = dict(head, type=f"DisAlign{head['type']}", loss_decode=loss)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(ConfigDict(type=f"{stage}EncoderDecoder", backbone=BACKBONE, decode_head=head))


def scores(model, images):
    before = []
    handle = model.calibrated_head.conv_seg.register_forward_hook(lambda *args: before.append(args[-1]))
    after = model(images, mode="tensor")
    handle.remove()
    return before[0], after


class Upsampled(nn.Module):
    """The loss of a head's scores as the head asks for it."""

    def __init__(self, *args, **options):
        super().__init__()
        self.loss = GRWCrossEntropyLoss(*args, **options)

    def forward(self, logits, labels):
        return self.loss.upsampled(logits, labels, align_corners=False)


def adapter(head, loss):
    return Adapter(
        name=f"{head['type']}, {loss.__name__}",
        class_counts=COUNTS,
        stage_one=lambda: segmentor(head, calibrated=False),
        stage_two=lambda: segmentor(head, calibrated=True),
        batch=lambda n: (torch.randn(n, 3, 16, 32), labels(n, 2, 4, num_classes=5, ignore_index=255)),
        scores=scores,
        loss=loss,
        trainable=below("decode_head.calibration"),
        ignore_index=255,
    )


ADAPTERS = [adapter(FCN, loss=GRWCrossEntropyLoss), adapter(ASPP, loss=Upsampled)]
