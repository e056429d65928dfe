"""The formats of checkpoints: how each is known by its tensors' names, and who reads it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from disalign import InputError
from disalign.errors import some

from .content import Content, is_matrix
from .detectors_and_segmentors import CONV_SEG, PREDICTOR, parse_detectron2, parse_mmseg
from .image_classifiers import (
    LAST_LINEAR,
    TORCHVISION_ONLY,
    parse_balancing,
    parse_cvpods,
    parse_disalign_cls,
    parse_mmpretrain,
    parse_timm,
)


@dataclass(frozen=True)
class Format:
    """A source: ``known`` by its tensors, read by ``parse(tensors, scale, classifier)``."""

    what: str
    mark: str
    known: Callable[[dict], bool]
    parse: Callable[..., Content]


def detect(tensors: dict[str, Tensor], given: str | None, path: str, classifier: str | None) -> Format:
    """The format of a checkpoint.

    Raises:
        InputError: none fits, or the ``given`` one does not.
    """
    fitting = [name for name, one in FORMATS.items() if one.known(tensors)]
    if given:
        if given not in fitting and not (given == "timm" and classifier):
            hint = f"it looks like {fitting[0]}" if fitting else "it looks like none that is known"
            raise InputError(
                f"expected {FORMATS[given].what} in {path!r}, known by {FORMATS[given].mark}, got none; {hint}, leave "
                "out --from or give another"
            )
        return FORMATS[given]
    if not fitting and classifier:
        return FORMATS["timm"]
    if not fitting:
        raise InputError(
            f"expected a checkpoint of {some(FORMATS, len(FORMATS))} in {path!r}, but its tensors' names are of none "
            f"({some(tensors, 3)}); an image classifier's last linear layer can be named with --classifier"
        )
    return FORMATS[fitting[0]]


def _any(tensors, *prefixes):
    return any(name.startswith(prefixes) for name in tensors)


def _known_as_timm(tensors):
    others = any(one.known(tensors) for name, one in FORMATS.items() if name != "timm")
    named = any(is_matrix(tensors.get(f"{name}.weight")) for name in LAST_LINEAR)
    return not others and (named or any(map(TORCHVISION_ONLY.match, tensors)))


#: Name for --from -> format.
FORMATS = {
    "cvpods": Format(
        "a cvpods classifier",
        "network.linear.weight",
        lambda tensors: "network.linear.weight" in tensors,
        parse_cvpods,
    ),
    "classifier-balancing": Format(
        "a classifier-balancing checkpoint",
        "feat_model and classifier",
        lambda tensors: _any(tensors, "feat_model."),
        parse_balancing,
    ),
    "detectron2": Format(
        "a Detectron2 or cvpods R-CNN",
        "roi_heads.box_predictor.cls_score.weight and no torchvision names",
        lambda tensors: any(map(PREDICTOR.fullmatch, tensors)) and not _any(tensors, "rpn.head.", "backbone.body."),
        parse_detectron2,
    ),
    "mmseg": Format(
        "an MMSegmentation model",
        "decode_head.conv_seg.weight",
        lambda tensors: any(map(CONV_SEG.fullmatch, tensors)),
        parse_mmseg,
    ),
    "disalign_cls": Format(
        "a model of disalign_cls",
        "backbone.* and classifier.weight",
        lambda tensors: _any(tensors, "backbone.") and is_matrix(tensors.get("classifier.weight")),
        parse_disalign_cls,
    ),
    "mmpretrain": Format(
        "an mmpretrain or mmcls model",
        "backbone.* and head.fc.weight",
        lambda tensors: _any(tensors, "backbone.") and is_matrix(tensors.get("head.fc.weight")),
        parse_mmpretrain,
    ),
    "timm": Format(
        "a torchvision or timm classifier",
        "its last linear layer (fc, classifier, head, head.fc, ...)",
        _known_as_timm,
        parse_timm,
    ),
}
