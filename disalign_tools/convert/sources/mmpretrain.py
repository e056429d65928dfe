"""The ResNets of mmpretrain and mmcls."""

from torch import Tensor

from .frame import IMAGES, Content, Source, below, holds_matrix, linear, trunk


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    return Content("mmpretrain or mmcls", trunk(tensors, "backbone"), [linear(tensors, "head.fc")])


def known(tensors: dict[str, Tensor]) -> bool:
    return bool(below(tensors, "backbone")) and holds_matrix(tensors, "head.fc")


SOURCE = Source("mmpretrain", IMAGES, known, parse)
