"""Models of MMSegmentation."""

import re

from torch import Tensor

from disalign import InputError

from .. import formulas
from .frame import OURS, PIXELS, Content, Source, add_calibration, linear, rest

#: First words of a model's tensors.
PLACES = ("backbone.", "neck.", "decode_head.", "auxiliary_head.")
CONV_SEG = re.compile(r"(decode_head(?:\.(\d+))?)\.conv_seg\.weight")


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    found = [match for match in map(CONV_SEG.fullmatch, tensors) if match]
    base = max(found, key=lambda match: int(match[2] or 0))[1]  # of several in a row the last is calibrated
    if any(name.startswith((f"{base}.logit_", f"{base}.confidence_layer.")) for name in tensors):
        raise InputError(
            "expected a confidence sigmoid(v.x + b) for each pixel, but the official segmentation head puts BatchNorm "
            "and ReLU before the sigmoid, which ours can't carry; convert its frozen stage one: add "
            f"--drop '{base}.logit_*' --drop '{base}.confidence_layer.*', and train stage two anew"
        )
    layer = linear(tensors, f"{base}.conv_seg", calibration_in=base)
    add_calibration(layer, tensors, f"{base}.calibration", OURS, formulas.ours)
    others = rest(tensors, PLACES, [f"{base}.conv_seg.", f"{base}.calibration."])
    heading = "MMSegmentation" + ", disalign_mmseg, stage two" * layer.calibrated
    return Content(heading, others, [layer], names_known=True)


SOURCE = Source("mmseg", PIXELS, lambda tensors: any(map(CONV_SEG.fullmatch, tensors)), parse)
