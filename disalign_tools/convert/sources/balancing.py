"""classifier-balancing: linear classifiers, cRT, learnable weight scaling."""

from torch import Tensor

from disalign import InputError
from disalign.errors import some

from .. import formulas
from .frame import IMAGES, Content, Source, add_calibration, below, linear, trunk


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    own = below(tensors, "classifier")
    if not {"fc.weight", "fc.bias"} <= own.keys():
        raise InputError(
            "expected a linear classifier of classifier-balancing (fc.weight, fc.bias), got "
            f"{some(own) or 'no tensors'}; its others have no counterpart here (its cosine one divides by 1 + norm of "
            "the feature; nearest mean, meta-embedding): train stage one anew"
        )
    layer = linear(tensors, "classifier.fc")
    # Eq. 4's magnitude, with confidence one.
    add_calibration(layer, tensors, "classifier", {"magnitude": "scales"}, formulas.weight_scaling)
    heading = "classifier-balancing" + ", learnable weight scaling" * layer.calibrated
    return Content(heading, trunk(tensors, "feat_model"), [layer])


SOURCE = Source("classifier-balancing", IMAGES, lambda tensors: bool(below(tensors, "feat_model")), parse)
