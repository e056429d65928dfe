"""R-CNNs of Detectron2 and cvpods, the official DisAlign's among them; only its calibration changes names."""

import re

from torch import Tensor

from .. import formulas
from .frame import BOXES, OFFICIAL, OURS, Content, Source, add_calibration, below, linear_or_cosine, rest

#: First words of a model's tensors (sem_seg_head: PanopticFPN's).
PLACES = ("backbone.", "proposal_generator.", "roi_heads.", "sem_seg_head.")
PREDICTOR = re.compile(r"(roi_heads\.box_predictor(?:\.\d+)?)\.cls_score\.weight")
NOTE = (
    "the official LVIS configs use BGR images of 0 to 255 with Detectron2's default mean and deviation 1, and set "
    "MODEL.RESNETS.STRIDE_IN_1X1 True, Detectron2's default; if yours differ, the file can't tell"
)


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    bases = [match[1] for name in tensors if (match := PREDICTOR.fullmatch(name))]
    layers, taken = [], []
    for base in bases:
        layer = linear_or_cosine(tensors, f"{base}.cls_score", scale, passthrough=1)
        add_calibration(layer, tensors, f"{base}.cls_score.calibration", OURS, formulas.ours)
        add_calibration(layer, tensors, base, OFFICIAL, formulas.cvpods_detection)
        layers.append(layer)
        taken += [f"{base}.cls_score.", f"{base}.logit_", f"{base}.confidence_layer."]
    official = any(f"{base}.logit_scale" in tensors for base in bases)
    heading = "Detectron2 or cvpods detection" + ", DisAlign" * any(layer.calibrated for layer in layers)
    return Content(heading, rest(tensors, PLACES, taken), layers, names_known=True, notes=[NOTE] * official)


def known(tensors: dict[str, Tensor]) -> bool:
    torchvisions = below(tensors, "rpn.head") or below(tensors, "backbone.body")
    return not torchvisions and any(map(PREDICTOR.fullmatch, tensors))


SOURCE = Source("detectron2", BOXES, known, parse)
