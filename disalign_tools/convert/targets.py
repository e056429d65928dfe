"""What a converted checkpoint looks like to each package that loads it."""

import pickle
from typing import IO, Any

import torch
from torch import Tensor

from disalign import InputError
from disalign.errors import some
from disalign.hand_over import weights_of
from disalign.io.unpickling import load_arrays

from . import resnet
from .classifier import CALIBRATION, Part
from .sources.frame import Content

#: Target -> the other entries of its files.
TARGETS = {"cls": ("dataset_meta", "disalign"), "d2": ("disalign",), "mmseg": ("dataset_meta", "disalign"), "timm": ()}
#: Detectron2 settings for a backbone trained on images as timm and torchvision normalise them.
BACKBONE_CONFIG = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
#: Tables that timm now computes.
COMPUTED = (".relative_position_index", ".attn_mask")


def of_images(others: dict[str, Part], content: Content, to: str, classifier: str) -> dict[str, Part]:
    """An image classifier's trunk under the target's names; its classifier gets its place, in timm ``classifier``."""
    if to == "d2":
        return _as_backbone(others, content)
    (layer,) = content.classifiers
    if to == "timm" and (layer.calibrated or layer.cosine):
        drops = "".join(f" --drop {part.source}" for word, part in layer.parts.items() if word in CALIBRATION)
        raise InputError(
            f"expected a stock classifier for timm, got a calibrated or cosine one, {layer.name!r}; --fold makes it "
            "stock unless its confidence is learnt" + (f", and you get its stage one with{drops}" if drops else "")
        )
    layer.place = "classifier" if to == "cls" else classifier
    weight = layer.parts["weight"].tensor
    if not layer.cosine:
        layer.parts.setdefault("bias", Part(torch.zeros(len(weight), dtype=weight.dtype), None, "zeros"))
    for name in [name for name in others if name.endswith(COMPUTED)]:
        content.dropped[content.others[name]] = "timm computes it"
        del others[name]
    # The batch counters that BatchNorm has had since torch 0.4.1.
    norms = [name.removesuffix("running_var") for name in others if name.endswith(".running_var")]
    counters = {f"{norm}num_batches_tracked": Part(torch.tensor(0), None, "0") for norm in norms}
    return {f"backbone.{name}" if to == "cls" else name: part for name, part in (counters | others).items()}


def _as_backbone(others, content):
    """A trunk becomes the backbone below an FPN."""
    if foreign := resnet.foreign(others):
        raise InputError(
            f"expected a plain ResNet or ResNeXt as Detectron2's backbone, which has no place for {some(foreign, 3)}; "
            "convert another"
        )
    layer = content.classifiers.pop()
    sources = [part.source for part in layer.parts.values() if part.source]
    content.dropped |= dict.fromkeys(sources, "a backbone has no classifier")
    content.notes.append(
        "like most image classifiers this backbone was trained on RGB images; in Detectron2 set "
        + ", ".join(f"{key} {value}" for key, value in BACKBONE_CONFIG.items())
    )
    return {f"backbone.bottom_up.{resnet.to_detectron2(name)}": part for name, part in others.items()}


def save(to: str, result: dict[str, Part], meta: dict[str, Any], file: IO[bytes], arrays: bool) -> None:
    """Write to an open file: torch's format, or Detectron2's pickle of numpy arrays."""
    # Copies, since torch saves a view with its whole storage.
    tensors = {name: part.tensor.detach().clone().contiguous() for name, part in result.items()}
    content: dict[str, Any] = {"state_dict": tensors, "meta": meta}
    if to == "timm":
        content = tensors
    elif to == "d2":
        content = {"model": tensors, "__author__": "disalign", **meta}
    if not arrays:
        torch.save(content, file)
    elif lacking := [name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16]:
        raise InputError(f"expected dtypes that numpy has, got bfloat16 in {some(lacking, 3)}; give DEST as .pth")
    else:
        pickle.dump(content | {"model": {name: tensor.numpy() for name, tensor in tensors.items()}}, file, protocol=4)


def load(file: IO[bytes], arrays: bool) -> dict[str, Tensor]:
    """The tensors that :func:`save` wrote, read with ``weights_only`` or a restricted unpickler."""
    content = load_arrays(file) if arrays else torch.load(file, map_location="cpu", weights_only=True)
    return dict(weights_of(content)[0])
