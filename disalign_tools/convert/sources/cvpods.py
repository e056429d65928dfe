"""The classifiers of cvpods, the official DisAlign's among them."""

import torch
from torch import Tensor

from disalign import InputError

from .. import formulas, resnet
from ..classifier import Part
from .frame import IMAGES, OFFICIAL, Content, Source, add_calibration, below, linear_or_cosine

LAYER = "network.linear"
NOTE = (
    "the official ImageNet-LT configs use RGB images normalised as timm's, with the stride in the 3x3 convolution; if "
    "yours set INPUT.FORMAT BGR or STRIDE_IN_1X1 True, the file can't tell"
)


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    names = below(tensors, "network")
    others = {renamed: f"network.{name}" for name in names if (renamed := resnet.to_torchvision(name))}
    layer = linear_or_cosine(tensors, LAYER, scale)
    add_calibration(layer, tensors, LAYER, OFFICIAL, formulas.cvpods_classification)
    if layer.calibrated and layer.cosine:
        raise InputError(
            f"expected the confidence of {LAYER!r} to see the feature, but cvpods' DisAlignNormalizedLinear gives it "
            "the feature divided by its norm, which ours can't carry; convert its frozen stage one: add "
            f"--drop '{LAYER}.logit_*' --drop '{LAYER}.confidence_layer.*', and train stage two anew"
        )
    if layer.calibrated:
        # (1 + confidence * s) z is eq. 5 with a magnitude of 1 + s; in half precision 1 + s would lose digits.
        s, source, _ = layer.parts["magnitude"]
        magnitude = (1 + s.double()).to(torch.promote_types(s.dtype, torch.float32))
        layer.parts["magnitude"] = Part(magnitude, source, "+ 1")
    heading = "cvpods classification" + ", DisAlign" * layer.calibrated + ", cosine" * layer.cosine
    return Content(heading, others, [layer], notes=[NOTE])


SOURCE = Source("cvpods", IMAGES, lambda tensors: f"{LAYER}.weight" in tensors, parse)
