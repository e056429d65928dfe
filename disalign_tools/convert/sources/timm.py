"""Classifiers of timm, and those of torchvision whose names timm shares."""

import re

from torch import Tensor

from disalign import InputError
from disalign.errors import some

from .frame import IMAGES, Content, Source, holds_matrix, linear

#: Names of timm's and torchvision's classifiers.
LAST_LINEAR = ("fc", "classifier", "head", "head.fc", "last_linear", "head.l", "head.head.l", "head.fc.fc2", "head.fc2")
#: A second classifier: of distillation, or an auxiliary one.
SECOND = re.compile(r"(head_dist|aux_head|aux\d?|aux_?logits)\.", re.IGNORECASE)
#: Names that timm does not use.
TORCHVISION_ONLY = re.compile(r"features\.\d+\.\d+\.|trunk_output\.|encoder\.layers\.encoder_layer_|classifier\.\d+\.")


def parse(tensors: dict[str, Tensor], scale: float | None, classifier: str | None) -> Content:
    if foreign := [name for name in tensors if TORCHVISION_ONLY.match(name)]:
        raise InputError(
            f"expected timm's names, got torchvision's of an architecture that timm names otherwise ({some(foreign, 2)}"
            "); ResNet, ResNeXt, Wide ResNet and DenseNet share theirs, take timm's own weights for others"
        )
    candidates = (classifier,) if classifier else LAST_LINEAR
    found = [name for name in candidates if holds_matrix(tensors, name)]
    if len(found) != 1:
        raise InputError(
            f"expected one linear layer named {' or '.join(candidates)}, got {some(found) or 'none'}; name the last "
            f"with --classifier (the file's last names: {some(list(tensors)[-3:])})"
        )
    (layer,) = found
    others = {name: name for name in tensors if not name.startswith(f"{layer}.")}
    if second := [name for name in others if SECOND.match(name)]:
        raise InputError(
            f"expected one classifier, got a second beside {layer!r}: {some(second, 2)}; the model may score by both, "
            "so --drop it only if it is not used"
        )
    heading = f"torchvision or timm, classifier {layer!r}"
    return Content(heading, others, [linear(tensors, layer)], timm_name=layer)


def known(tensors: dict[str, Tensor]) -> bool:
    return any(holds_matrix(tensors, name) for name in LAST_LINEAR) or any(map(TORCHVISION_ONLY.match, tensors))


SOURCE = Source("timm", IMAGES, known, parse)
