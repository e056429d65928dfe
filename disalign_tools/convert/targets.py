"""What a converted checkpoint looks like to each package that loads it."""

import pickle
from typing import IO, Any

import torch
from torch import Tensor

from disalign import InputError
from disalign.errors import some
from disalign.io.unpickling import load_arrays

from . import resnet
from .classifier import CALIBRATION, Part
from .sources.frame import IMAGES, Content, Task

#: Target -> what its files hold beside the weights.
TARGETS = {"cls": ("dataset_meta", "disalign"), "d2": ("disalign",), "mmseg": ("dataset_meta", "disalign"), "timm": ()}
#: What a Detectron2 config must say for a backbone that has learnt from images as timm and torchvision show them.
BACKBONE_CONFIG = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}


def require_fit(task: Task, heading: str, to: str) -> None:
    """Refuse a target that has no use for such a model."""
    if to in task.targets:
        return
    sentence = f"expected --to {' or --to '.join(task.targets)} for {task.what} ({heading}), got --to {to}"
    if (task, to) == (IMAGES, "mmseg"):
        sentence += (
            "; MMSegmentation starts a backbone from it by itself: backbone.init_cfg=dict(type='Pretrained', "
            "checkpoint=FILE)"
        )
    raise InputError(sentence)


def arrange(content: Content, task: Task, to: str, classifier: str | None) -> dict[str, str | None]:
    """Give an image classifier its place, which may be the ``classifier`` named; and the others their names.

    Returns:
        Name in the result -> the source's, of all tensors but the classifiers'; None for what is new.
    """
    if task != IMAGES:
        return dict(content.others)
    if to == "d2":
        return _as_backbone(content)
    (layer,) = content.classifiers
    if to == "timm":
        _require_stock(layer)
        layer.place = classifier or content.timm_name or _timm_classifier(content.others)
    else:
        layer.place = "classifier"
    if not layer.cosine and "bias" not in layer.parts:
        weight = layer.parts["weight"].tensor
        layer.parts["bias"] = Part(torch.zeros(len(weight), dtype=weight.dtype), None, "zeros")
    # The batch counters that BatchNorm has had since torch 0.4.1.
    norms = [name.removesuffix("running_var") for name in content.others if name.endswith(".running_var")]
    names = dict.fromkeys(f"{norm}num_batches_tracked" for norm in norms) | content.others
    return {f"backbone.{name}" if to == "cls" else name: source for name, source in names.items()}


def _as_backbone(content):
    """A trunk becomes the backbone below an FPN."""
    if foreign := resnet.foreign(content.others):
        raise InputError(
            f"expected a plain ResNet or ResNeXt for Detectron2's backbone, but it also holds {some(foreign, 3)}; "
            "Detectron2 has no other that takes these names"
        )
    (layer,) = content.classifiers
    content.classifiers.clear()
    sources = [part.source for part in layer.parts.values() if part.source]
    content.dropped = dict.fromkeys(sources, "a backbone has no classifier")
    content.notes.append(
        "for Detectron2 this is a backbone to start stage one from; like most image classifiers it has seen RGB "
        f"images: set {', '.join(f'{key} {value}' for key, value in BACKBONE_CONFIG.items())}"
    )
    return {f"backbone.bottom_up.{resnet.to_detectron2(name)}": source for name, source in content.others.items()}


def _require_stock(layer):
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


def _timm_classifier(others):
    if resnet.is_whole(others):
        return "fc"
    raise InputError(
        f"expected a plain ResNet, whose classifier timm calls fc, got {some(others, 3)}; name the model with "
        "--config, or the classifier with --classifier (model.default_cfg['classifier'])"
    )


def save(to: str, tensors: dict[str, Tensor], meta: dict[str, Any], file: IO[bytes], arrays: bool) -> None:
    """Write to an open file: torch's format, or Detectron2's pickle of numpy arrays."""
    content: dict[str, Any] = {"state_dict": tensors, "meta": meta}
    if to == "timm":
        content = dict(tensors)
    elif to == "d2":
        content = {"model": tensors, "__author__": "disalign", **meta}
    if not arrays:
        torch.save(content, file)
    elif lacking := [name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16]:
        raise InputError(f"expected dtypes that numpy has, got bfloat16 in {some(lacking, 3)}; give DEST as .pth")
    else:
        pickle.dump(content | {"model": {name: tensor.numpy() for name, tensor in tensors.items()}}, file, protocol=4)


def load(file: IO[bytes], arrays: bool) -> dict[str, Tensor]:
    """The tensors of what :func:`save` wrote, read as safely as anybody else would."""
    content = load_arrays(file) if arrays else torch.load(file, map_location="cpu", weights_only=True)
    return next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
