"""The classifiers of this repository."""

from torch import Tensor

from .. import formulas
from .frame import IMAGES, OURS, Content, Source, add_calibration, below, holds_matrix, read_classifier, trunk


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    layer = read_classifier(tensors, "classifier", scale)
    add_calibration(layer, tensors, "classifier.calibration", OURS, formulas.ours)
    heading = f"disalign_cls, stage {'two' if layer.calibrated else 'one'}"
    return Content(heading, trunk(tensors, "backbone"), [layer], names_known=True)


SOURCE = Source(
    name="disalign_cls",
    task=IMAGES,
    what="a model of disalign_cls",
    mark="backbone.* and classifier.weight",
    known=lambda tensors: bool(below(tensors, "backbone")) and holds_matrix(tensors, "classifier"),
    parse=parse,
)
