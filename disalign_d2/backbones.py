"""A small backbone for runs without a GPU: configs/d2/shapes and the tests."""

from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet


@BACKBONE_REGISTRY.register()
def build_small_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet with two basic blocks per stage, and its FPN.

    Reads ``MODEL.RESNETS`` (NORM, STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, OUT_FEATURES) and ``MODEL.FPN``. As in every
    ResNet, each stage halves the resolution and doubles the channels; there are as many as OUT_FEATURES needs.
    """
    settings = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, settings.STEM_OUT_CHANNELS, settings.NORM)
    count = max(int(name.removeprefix("res")) for name in settings.OUT_FEATURES) - 1
    widths = [settings.STEM_OUT_CHANNELS, *(settings.RES2_OUT_CHANNELS * 2**index for index in range(count))]
    stages = [
        ResNet.make_stage(
            BasicBlock, 2, stride_per_block=[stride, 1], in_channels=width, out_channels=wider, norm=settings.NORM
        )
        for stride, (width, wider) in zip([1, *[2] * (count - 1)], pairwise(widths), strict=True)
    ]
    return FPN(
        bottom_up=ResNet(stem, stages, out_features=settings.OUT_FEATURES),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
