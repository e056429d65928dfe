"""What a converted checkpoint looks like to each package that loads it."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import torch
from disalign.unpickling import load_arrays
from torch import Tensor

from disalign import InputError
from disalign.errors import some

from .classifiers import CALIBRATION
from .content import BOXES, IMAGES, PIXELS, Content
from .image_classifiers import is_whole_resnet
from .resnet_names import to_detectron2

#: Task of the source -> targets it goes to. (An image classifier goes to Detectron2 as a backbone to start from.)
FITTING = {IMAGES: ("cls", "timm", "d2"), BOXES: ("d2",), PIXELS: ("mmseg",)}
#: What a Detectron2 config must say for a backbone that has learnt from images as timm and torchvision show them.
BACKBONE_CONFIG = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
WHAT = {IMAGES: "an image classifier", BOXES: "a detector", PIXELS: "a segmentor"}


@dataclass(frozen=True)
class Target:
    """A package: ``arrange(content, classifier)`` gives the names, ``packed(tensors, meta)`` the file's content.

    ``classifier`` is the name of timm's, where it was given.
    """

    arrange: Callable
    packed: Callable[[dict, dict], dict]


def require_fit(content: Content, to: str) -> None:
    """Refuse a target that the source has nothing for.

    Raises:
        InputError: it has not.
    """
    if to in FITTING[content.task]:
        return
    fitting = " or ".join(f"--to {name}" for name in FITTING[content.task])
    sentence = f"expected {fitting} for {WHAT[content.task]} ({content.heading}), got --to {to}"
    if content.task == IMAGES and to == "mmseg":
        sentence += (
            "; MMSegmentation starts a backbone from it by itself: backbone.init_cfg=dict(type='Pretrained', "
            "checkpoint=FILE)"
        )
    raise InputError(sentence)


def to_cls(content: Content, classifier: str | None) -> dict[str, str | None]:
    """Names of disalign_cls -> the source's; None for what is new."""
    for layer in content.classifiers:
        layer.place, layer.calibration_place = "classifier", "classifier.calibration"
    return {f"backbone.{name}": source for name, source in _with_counters(content.others).items()}


def to_timm(content: Content, classifier: str | None) -> dict[str, str | None]:
    """timm's names -> the source's; None for what is new."""
    (layer,) = content.classifiers
    if layer.calibrated:
        drops = " ".join(f"--drop {part.source}" for word, part in layer.parts.items() if word in CALIBRATION)
        raise InputError(
            f"expected a stock classifier for timm, got a calibrated one, {layer.name!r}; --fold makes it stock if its "
            f"confidence is 'one', and its stage one is had with {drops}"
        )
    if layer.cosine:
        raise InputError(
            f"expected a stock classifier for timm, got a cosine one, {layer.name!r}; --fold makes it a norm and a "
            "linear layer"
        )
    layer.place = classifier or content.timm_name or _timm_classifier(content.others)
    return _with_counters(content.others)


def to_d2(content: Content, classifier: str | None) -> dict[str, str | None]:
    """Detectron2's names -> the source's; an image classifier's trunk becomes the backbone below an FPN."""
    if content.task == BOXES:
        return dict(content.others)
    renamed = {name: to_detectron2(name) for name in content.others}
    foreign = [name for name, new in renamed.items() if new is None]
    if foreign:
        raise InputError(
            f"expected a plain ResNet or ResNeXt for Detectron2's backbone, but it also holds {some(foreign, 3)}; "
            "Detectron2 has no other that takes these names"
        )
    return {f"backbone.bottom_up.{renamed[name]}": source for name, source in content.others.items()}


def to_mmseg(content: Content, classifier: str | None) -> dict[str, str | None]:
    """MMSegmentation's names -> the source's, which are the same."""
    return dict(content.others)


def _with_counters(others: dict[str, str]) -> dict[str, str | None]:
    """With the batch counters that BatchNorm has had since torch 0.4.1."""
    found: dict[str, str | None] = {}
    for name, source in others.items():
        found[name] = source
        counter = f"{name.removesuffix('running_var')}num_batches_tracked"
        if name.endswith(".running_var") and counter not in others:
            found[counter] = None
    return found


def _timm_classifier(others):
    if is_whole_resnet(others):
        return "fc"
    raise InputError(
        f"expected a plain ResNet, whose classifier timm calls fc, got {some(others, 3)}; name the model with "
        "--config, or the classifier with --classifier (model.default_cfg['classifier'])"
    )


def state_dict_and_meta(tensors: dict[str, Tensor], meta: dict) -> dict:
    """MMEngine's."""
    return {"state_dict": tensors, "meta": meta}


def model_and_counts(tensors: dict[str, Tensor], meta: dict) -> dict:
    """Detectron2's; ``disalign`` lies beside the model."""
    kept = {"disalign": meta["disalign"]} if "disalign" in meta else {}
    return {"model": tensors, "__author__": "disalign", **kept}


TARGETS = {
    "cls": Target(to_cls, state_dict_and_meta),
    "d2": Target(to_d2, model_and_counts),
    "mmseg": Target(to_mmseg, state_dict_and_meta),
    "timm": Target(to_timm, lambda tensors, meta: tensors),
}


def save(content: dict, file, arrays: bool) -> None:
    """Write to an open file: torch's format, or Detectron2's pickle of numpy arrays.

    Raises:
        InputError: a dtype that numpy does not have.
    """
    if not arrays:
        torch.save(content, file)
        return
    lacking = [name for name, tensor in content["model"].items() if tensor.dtype == torch.bfloat16]
    if lacking:
        raise InputError(f"expected dtypes that numpy has, got bfloat16 in {some(lacking, 3)}; give DEST as .pth")
    model = {name: tensor.numpy() for name, tensor in content["model"].items()}
    pickle.dump(content | {"model": model}, file, protocol=4)


def load(file, arrays: bool) -> dict[str, Tensor]:
    """The tensors of what :func:`save` wrote, read as safely as anybody else would."""
    content = load_arrays(file) if arrays else torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content.get(key), dict) else content
    return content
