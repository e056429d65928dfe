"""Detectors and segmentors, whose tensors keep their names but for the official calibration's.

Each ``parse`` takes the tensors, --scale and --classifier.
"""

import re

from disalign import InputError

from . import formulas
from .classifiers import Part
from .content import BOXES, PIXELS, Content, below, own_layer, require

#: First words of the tensors of a Detectron2 model (sem_seg_head: PanopticFPN's), of an MMSegmentation model.
DETECTOR = ("backbone.", "proposal_generator.", "roi_heads.", "sem_seg_head.")
SEGMENTOR = ("backbone.", "neck.", "decode_head.", "auxiliary_head.")

PREDICTOR = re.compile(r"(roi_heads\.box_predictor(?:\.\d+)?)\.cls_score\.weight")


def parse_detectron2(tensors, scale, classifier):
    bases = [match[1] for name in tensors if (match := PREDICTOR.fullmatch(name))]
    layers = [_box_layer(tensors, base, scale) for base in bases]
    kinds = {
        "DisAlign": any(f"{base}.logit_scale" in tensors for base in bases),
        "disalign_d2, stage two": any(".calibration." in name for name in tensors),
        "cosine": any(layer.cosine for layer in layers),
        "cascade": len(bases) > 1,
    }
    heading = "Detectron2 or cvpods detection" + "".join(f", {kind}" for kind, it_is in kinds.items() if it_is)
    taken = {part.source for layer in layers for part in layer.parts.values()}
    consumed = {name for base in bases for name in tensors if _is_calibration(name, base)} | taken
    others = {name: name for name in tensors if name.startswith(DETECTOR) and name not in consumed}
    notes = []
    if kinds["DisAlign"]:
        notes.append(
            "the official LVIS configs see BGR images of 0 to 255 with Detectron2's default mean and deviation 1, and "
            "a stride in the 1x1 convolution (MODEL.RESNETS.STRIDE_IN_1X1 True, Detectron2's default); if yours "
            "differ, the file can't tell"
        )
    return Content(BOXES, others, layers, heading, notes)


def _is_calibration(name, base):
    return name.startswith((f"{base}.logit_", f"{base}.confidence_layer.", f"{base}.cls_score."))


def _box_layer(tensors, base, scale):
    place = f"{base}.cls_score"
    own = below(tensors, base)
    official = [name for name in own if name.startswith(("logit_", "confidence_layer."))]
    layer = own_layer(tensors, place, f"{place}.calibration", passthrough=1, scale=scale, cosine_has_bias=False)
    if not official:
        return layer
    require(own, base, ("logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias"))
    stage_one = layer.formula

    def formula(x):
        confidence = formulas.sigmoid(x, own["confidence_layer.weight"], own["confidence_layer.bias"])
        return formulas.blended(stage_one(x), confidence, own["logit_scale"], own["logit_bias"])

    layer.formula = formula
    layer.parts |= {
        "magnitude": Part(own["logit_scale"].flatten(), f"{base}.logit_scale"),
        "margin": Part(own["logit_bias"].flatten(), f"{base}.logit_bias"),
        "confidence.weight": Part(own["confidence_layer.weight"], f"{base}.confidence_layer.weight"),
        "confidence.bias": Part(own["confidence_layer.bias"], f"{base}.confidence_layer.bias"),
    }
    return layer


CONV_SEG = re.compile(r"(decode_head(?:\.\d+)?)\.conv_seg\.weight")


def parse_mmseg(tensors, scale, classifier):
    bases = [match[1] for name in tensors if (match := CONV_SEG.fullmatch(name))]
    base = max(bases, key=lambda name: int(name.partition(".")[2] or 0))  # of several in a row the last is calibrated
    official = [name for name in tensors if name.startswith((f"{base}.logit_", f"{base}.confidence_layer."))]
    if official:
        raise InputError(
            "expected a confidence sigmoid(v.x + b) for each pixel, but the official segmentation head puts BatchNorm "
            "and ReLU before the sigmoid, which ours can't carry; convert its frozen stage one: add "
            f"--drop '{base}.logit_*' --drop '{base}.confidence_layer.*', and train stage two anew"
        )
    layer = own_layer(tensors, f"{base}.conv_seg", f"{base}.calibration")
    taken = {part.source for part in layer.parts.values()}
    others = {name: name for name in tensors if name.startswith(SEGMENTOR) and name not in taken}
    heading = f"MMSegmentation{', disalign_mmseg, stage two' if layer.calibrated else ''}"
    return Content(PIXELS, others, [layer], heading)
