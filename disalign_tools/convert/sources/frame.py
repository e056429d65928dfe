"""What the parsers of all sources share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from disalign import InputError
from disalign.errors import some

from .. import formulas, resnet
from ..classifier import CALIBRATION, Classifier, Part

#: What a model's scores are of.
IMAGES, BOXES, PIXELS = "images", "boxes", "pixels"

#: Our name of a calibration's tensor -> ours again; the official code's, below the classifier or its predictor.
OURS = {word: word for word in CALIBRATION}
OFFICIAL = {
    "magnitude": "logit_scale",
    "margin": "logit_bias",
    "confidence.weight": "confidence_layer.weight",
    "confidence.bias": "confidence_layer.bias",
}


@dataclass
class Content:
    """What a checkpoint holds.

    Attributes:
        heading: what it was taken for.
        others: name -> source's name of all tensors but the classifiers'; a classification trunk's in timm's names.
        classifiers: those whose scores are calibrated, or could be.
        names_known: the names of ``others`` are the target's for certain; else only building the model tells, but for a
            plain ResNet's.
        timm_name: the image classifier's in timm, where the source tells it.
        dropped: source's name -> why it has no place in the result.
        notes: sentences for the user.
    """

    heading: str
    others: dict[str, str]
    classifiers: list[Classifier]
    names_known: bool = False
    timm_name: str | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where checkpoints come from: one is ``known`` by its tensors, and read by ``parse(tensors, scale, classifier)``.

    Attributes:
        name: for --from.
        task: ``IMAGES``, ``BOXES`` or ``PIXELS``.
        what, mark: what it is and what it is known by, for the sentence.
    """

    name: str
    task: str
    what: str
    mark: str
    known: Callable[[dict[str, Tensor]], bool]
    parse: Callable[[dict[str, Tensor], float | None, str | None], Content]


def below(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """A module's tensors, without its name before theirs."""
    return {name.removeprefix(f"{place}."): t for name, t in tensors.items() if name.startswith(f"{place}.")}


def trunk(tensors: dict[str, Tensor], place: str) -> dict[str, str]:
    """Name below the module -> whole name."""
    return {name: f"{place}.{name}" for name in below(tensors, place)}


def rest(tensors: dict[str, Tensor], places: tuple[str, ...], taken: list[str]) -> dict[str, str]:
    """Name -> the same, of the tensors at certain ``places`` of a model that are not at ``taken`` ones."""
    return {name: name for name in tensors if name.startswith(places) and not name.startswith(tuple(taken))}


def holds_matrix(tensors: dict[str, Tensor], place: str) -> bool:
    """Whether there is a linear layer's weight."""
    weight = tensors.get(f"{place}.weight")
    return weight is not None and weight.dim() == 2


def require_resnet(others: dict[str, str], source: str) -> None:
    """Refuse other trunks.

    Raises:
        InputError: it is another.
    """
    if foreign := resnet.foreign(others):
        raise InputError(
            f"expected a plain ResNet or ResNeXt of {source}'s, whose names timm shares, but it also holds "
            f"{some(foreign, 3)}; other architectures of {source}'s can't be converted"
        )


def read_classifier(
    tensors: dict[str, Tensor],
    name: str,
    scale: float | None = None,
    without_bias: str = "linear",
    **options: Any,
) -> Classifier:
    """A linear or cosine classifier.

    Args:
        tensors: the source's.
        name: of the classifier.
        scale: --scale, of a cosine classifier that had a constant one.
        without_bias: what it is without a bias: ``"cosine"``, ``"linear"``, or linear with ``"zeros"`` in any case.
        options: further ones of :class:`Classifier`.

    Raises:
        InputError: a scale is missing, given in vain, or not one number.
    """
    own = below(tensors, name)
    weight, bias, learnt = own["weight"], own.get("bias"), own.get("scale")
    parts = {word: Part(own[word], f"{name}.{word}") for word in ("weight", "bias") if word in own}
    cosine = learnt is not None or (bias is None and without_bias == "cosine")
    if without_bias == "zeros" or not cosine:
        if without_bias == "zeros" and bias is None:
            parts["bias"] = Part(torch.zeros(len(weight), dtype=weight.dtype), None, "zeros")
        return Classifier(name, parts, lambda x: formulas.linear(x, weight, bias), name, **options)

    parts["scale"] = _scale(learnt, name, scale)
    value = float(parts["scale"].tensor)
    # Ours, known by a scale without dimensions, counts norms below 1e-3 as it; cvpods as torch does.
    eps = 1e-3 if learnt is not None and learnt.dim() == 0 else 1e-12
    return Classifier(name, parts, lambda x: formulas.cosine(x, weight, value, eps), name, **options)


def _scale(learnt, name, given):
    if learnt is None and given is None:
        raise InputError(
            f"expected the scale of the cosine classifier {name!r} (it has no bias) in the file, got none, since it "
            "was constant; give it: --scale 20 in the official configs"
        )
    if learnt is None:
        return Part(torch.tensor(float(given)), None, "--scale")
    if learnt.numel() != 1:
        raise InputError(f"expected one number as {name}.scale, got {tuple(learnt.shape)}; is the file whole?")
    if given is not None:
        raise InputError(f"expected no --scale, since the file has one ({float(learnt):g}); leave it out")
    return Part(learnt.reshape(()), f"{name}.scale")


def add_calibration(
    layer: Classifier,
    tensors: dict[str, Tensor],
    place: str,
    names: dict[str, str],
    formula: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
) -> None:
    """Add a classifier's calibration, if it has one.

    Args:
        layer: the classifier, altered in place.
        tensors: the source's.
        place: what the calibration's tensors lie below.
        names: our word for such a tensor -> its name below ``place``.
        formula: the source's scores of stage one's, the features, and the tensors below ``place``.

    Raises:
        InputError: half a calibration.
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
