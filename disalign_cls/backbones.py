"""Backbones by name: timm's, and the few that timm does not have, composed of its blocks."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models.resnet import BasicBlock, make_blocks
from torch import nn

from disalign.errors import InputError, some


def _cifar_resnet(depth: int, in_chans: int = 3) -> nn.Module:
    """The CIFAR ResNet of He et al. (2016, Sec. 4.2), 6n + 2 layers; shortcuts by 1x1 convolution as in timm."""
    widths, repeats = (16, 32, 64), ((depth - 2) // 6,) * 3
    stages, _ = make_blocks(
        (BasicBlock,) * 3, widths, repeats, inplanes=16, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d
    )
    stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    trunk = nn.Sequential(stem, *(stage for _, stage in stages))
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return _features(trunk, widths[-1])


def _small_cnn(in_chans: int = 1) -> nn.Module:
    """Three 3x3 convolutions for 8x8 digits."""

    def block(before, after):
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    return _features(nn.Sequential(*block(in_chans, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64)), 64)


def _features(layers: nn.Sequential, width: int) -> nn.Module:
    trunk: Any = layers.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    trunk.num_features = width
    return trunk


OWN: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": partial(_cifar_resnet, 20),
    "cifar_resnet32": partial(_cifar_resnet, 32),
    "small_cnn": _small_cnn,
    "resnext152_32x4d": partial(timm.create_model, "resnet152", num_classes=0, cardinality=32, base_width=4),
}


def build_backbone(name: str, pretrained: bool = False, **options: Any) -> Any:
    """A module (N, C, H, W) -> (N, num_features) by name.

    Args:
        name: any timm model, or one of ``cifar_resnet20``, ``cifar_resnet32``, ``small_cnn``, ``resnext152_32x4d``.
        pretrained: timm's weights for it (downloaded by timm).
        options: passed to the model.

    Raises:
        InputError: an unknown name, or ``pretrained`` for a model without public weights.
    """
    if name in OWN:
        if pretrained:
            raise InputError(f"expected pretrained=False for {name!r}, which has no public weights")
        return OWN[name](**options)
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, [*OWN, *timm.list_models()])
        raise InputError(f"expected the name of a timm model or one of {some(OWN)}, got {name!r}; close: {some(close)}")
    trunk = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    # The classifier's input size, where a layer lies between it and the trunk's own features (MobileNetV3).
    trunk.num_features = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return trunk
