"""Code for the parsers of all sources."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disalign import InputError
from disalign.errors import some

from .. import formulas
from ..classifier import CALIBRATION, Classifier, Part

#: Our name of a calibration's tensor -> ours again; the official code's, below the classifier or its predictor.
OURS = {word: word for word in CALIBRATION}
OFFICIAL = {
    "magnitude": "logit_scale",
    "margin": "logit_bias",
    "confidence.weight": "confidence_layer.weight",
    "confidence.bias": "confidence_layer.bias",
}


#: Targets of image classifiers (in Detectron2 as a backbone to start from), detectors and segmentors.
IMAGES, BOXES, PIXELS = ("cls", "timm", "d2"), ("d2",), ("mmseg",)


@dataclass
class Content:
    """The content of a checkpoint."""

    heading: str  # what it was taken for
    others: dict[str, str]  # name -> source's name of all tensors but the classifiers'; an image classifier's in timm's
    classifiers: list[Classifier]  # those that are calibrated, or could be
    names_known: bool = False  # the others' are the target's for certain; else only a plain ResNet's are
    timm_name: str = ""  # the image classifier's in timm, where the source tells it
    dropped: dict[str, str] = field(default_factory=dict)  # source's name -> why it has no place in the result
    notes: list[str] = field(default_factory=list)  # sentences for the user


class Source(NamedTuple):
    """Where checkpoints come from: ``known`` by their tensors, read by ``parse(tensors, scale, classifier)``."""

    name: str
    targets: tuple[str, ...]
    known: Callable[[dict[str, Tensor]], bool]
    parse: Callable[[dict[str, Tensor], float | None, str | None], Content]


def below(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """A module's tensors, without the module's prefix."""
    return {name.removeprefix(f"{place}."): t for name, t in tensors.items() if name.startswith(f"{place}.")}


def trunk(tensors: dict[str, Tensor], place: str) -> dict[str, str]:
    """Name below a module -> whole name."""
    return {name: f"{place}.{name}" for name in below(tensors, place)}


def rest(tensors: dict[str, Tensor], places: tuple[str, ...], taken: list[str]) -> dict[str, str]:
    """Name -> the same name, for those that begin with one of ``places`` and none of ``taken``."""
    return {name: name for name in tensors if name.startswith(places) and not name.startswith(tuple(taken))}


def holds_matrix(tensors: dict[str, Tensor], place: str) -> bool:
    """Whether there is a linear layer's weight."""
    return f"{place}.weight" in tensors and tensors[f"{place}.weight"].dim() == 2


def linear(tensors: dict[str, Tensor], name: str, **options: Any) -> Classifier:
    """A linear classifier; ``options`` are further ones of :class:`Classifier`."""
    own = below(tensors, name)
    parts = {word: Part(tensor, f"{name}.{word}") for word, tensor in own.items() if word in ("weight", "bias")}
    return Classifier(name, parts, lambda x: formulas.linear(x, own["weight"], own.get("bias")), name, **options)


def linear_or_cosine(tensors: dict[str, Tensor], name: str, scale: float | None, **options: Any) -> Classifier:
    """A linear classifier or, without a bias, a cosine one, whose ``scale`` is given if it was constant."""
    layer, own = linear(tensors, name, **options), below(tensors, name)
    learnt = own.get("scale")
    if learnt is None and "bias" in own:
        return layer
    if (learnt is None) == (scale is None):
        got = "neither; give it: --scale 20 in the official configs" if learnt is None else "both; give no --scale"
        raise InputError(f"expected the scale of the cosine classifier {name!r} in the file or by --scale, got {got}")
    part = Part(torch.tensor(scale), None, "--scale") if learnt is None else Part(learnt.squeeze(), f"{name}.scale")
    layer.parts = {"weight": layer.parts["weight"], "scale": part}
    # Ours, recognised by a 0-d scale, clamps norms at 1e-3; cvpods as torch does.
    eps = 1e-3 if learnt is not None and learnt.dim() == 0 else 1e-12
    layer.formula = lambda x: formulas.cosine(x, own["weight"], float(part.tensor), eps)
    return layer


def add_calibration(
    layer: Classifier,
    tensors: dict[str, Tensor],
    place: str,
    names: dict[str, str],
    formula: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
) -> None:
    """Add a classifier's calibration, if it has one, whose tensors have ``names`` (our words -> theirs) at ``place``.

    ``formula`` gives the source's scores from stage one's, the features and the tensors below ``place``.
    """
    own = below(tensors, place)
    found = [word for word, name in names.items() if name in own]
    learnt = [word for word in found if word.startswith("confidence")]
    # Ours may lack magnitude or margin, or the two of the confidence.
    whole = len(found) == len(names) or (names is OURS and len(learnt) != 1 and len(learnt) < len(found))
    if found and not whole:
        raise InputError(
            f"expected a whole calibration at {place!r}, got only {some(names[word] for word in found)}; is the file "
            "whole, or a --drop too much?"
        )
    if found:
        stage_one = layer.formula
        layer.formula = lambda x: formula(stage_one(x), x, own)
        for word in found:
            tensor = own[names[word]]
            layer.parts[word] = Part(tensor if word in learnt else tensor.flatten(), f"{place}.{names[word]}")
