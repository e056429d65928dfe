"""The classifiers of this repository."""

from torch import Tensor

from .. import formulas
from .frame import IMAGES, OURS, Content, Source, add_calibration, below, holds_matrix, linear, linear_or_cosine, trunk


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    cosine = "classifier.scale" in tensors
    layer = linear_or_cosine(tensors, "classifier", scale) if cosine else linear(tensors, "classifier")
    add_calibration(layer, tensors, "classifier.calibration", OURS, formulas.ours)
    heading = f"disalign_cls, stage {'two' if layer.calibrated else 'one'}"
    return Content(heading, trunk(tensors, "backbone"), [layer], names_known=True)


def known(tensors: dict[str, Tensor]) -> bool:
    return bool(below(tensors, "backbone")) and holds_matrix(tensors, "classifier")


SOURCE = Source("disalign_cls", IMAGES, known, parse)
