"""The ResNets of mmpretrain and mmcls."""

from torch import Tensor

from .frame import IMAGES, Content, Source, below, holds_matrix, read_classifier, require_resnet, trunk


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    others = trunk(tensors, "backbone")
    require_resnet(others, "mmpretrain")
    return Content("mmpretrain or mmcls", others, [read_classifier(tensors, "head.fc", without_bias="zeros")])


SOURCE = Source(
    name="mmpretrain",
    task=IMAGES,
    what="an mmpretrain or mmcls model",
    mark="backbone.* and head.fc.weight",
    known=lambda tensors: bool(below(tensors, "backbone")) and holds_matrix(tensors, "head.fc"),
    parse=parse,
)
