"""What a checkpoint holds, whatever its format; and the pieces that several formats share."""

from dataclasses import dataclass, field

import torch

from disalign import InputError
from disalign.errors import some

from . import formulas
from .classifiers import CALIBRATION, Part, ScoreLayer

IMAGES, BOXES, PIXELS = "images", "boxes", "pixels"


@dataclass
class Content:
    """What a checkpoint holds.

    Attributes:
        task: ``IMAGES``, ``BOXES`` or ``PIXELS``: what its scores are of.
        others: name -> source's name of all tensors but the classifiers'; a classification trunk's in timm's names.
        classifiers: those whose scores are calibrated, or could be.
        heading: what it was taken for.
        timm_name: the image classifier's in timm, where the source tells it.
        trunk_known: its names are timm's for certain; else only building the model tells.
    """

    task: str
    others: dict[str, str]
    classifiers: list[ScoreLayer]
    heading: str
    notes: list[str] = field(default_factory=list)
    timm_name: str | None = None
    trunk_known: bool = True


def own_layer(tensors, place, calibration_place, passthrough=0, scale=None, cosine_has_bias=True):
    """A classifier in our names, which are the frameworks' own.

    Args:
        tensors: the source's.
        place, calibration_place: names of the two modules.
        passthrough: trailing scores that are not calibrated.
        scale: of a cosine classifier, where the file lacks it.
        cosine_has_bias: a classifier without bias is not a cosine one for that.
    """
    own, calibration = below(tensors, place), below(tensors, calibration_place)
    weight, bias = own["weight"], own.get("bias")
    parts = {"weight": Part(weight, f"{place}.weight")}
    if bias is not None:
        parts["bias"] = Part(bias, f"{place}.bias")
    if "scale" in own or (bias is None and not cosine_has_bias):
        parts["scale"] = scale_part(own, place, scale)
    parts |= {
        word: Part(calibration[word], f"{calibration_place}.{word}") for word in CALIBRATION if word in calibration
    }
    if calibration:
        require_whole(calibration, calibration_place)

    # Ours, known by a scale without dimensions, counts norms below 1e-3 as it; cvpods as torch does.
    eps = 1e-3 if "scale" in own and own["scale"].dim() == 0 else 1e-12

    def formula(x):
        if "scale" in parts:
            z = formulas.cosine(x, weight, float(parts["scale"].tensor), eps)
        else:
            z = formulas.linear(x, weight, bias)
        if not calibration:
            return z
        confidence = 1.0
        if "confidence.weight" in calibration:
            confidence = formulas.sigmoid(x, calibration["confidence.weight"], calibration["confidence.bias"])
        k = len(weight) - passthrough
        magnitude, margin = calibration.get("magnitude", torch.ones(k)), calibration.get("margin", torch.zeros(k))
        return formulas.blended(z, confidence, magnitude, margin)

    return ScoreLayer(place, parts, formula, passthrough, place, calibration_place)


def require_whole(calibration, place):
    """Refuse half a confidence, or a confidence alone."""
    learnt = [word for word in ("confidence.weight", "confidence.bias") if word in calibration]
    if len(learnt) == 1 or not ({"magnitude", "margin"} & set(calibration)):
        raise InputError(
            f"expected a whole calibration at {place!r}, got only {some(calibration)}; is the file whole, or a "
            "--drop too much?"
        )


def scale_part(own, layer, scale):
    """The scale of a cosine classifier, as a number without dimensions."""
    if "scale" in own:
        if own["scale"].numel() != 1:
            raise InputError(
                f"expected one number as {layer}.scale, got {tuple(own['scale'].shape)}; is the file whole?"
            )
        if scale is not None:
            raise InputError(f"expected no --scale, since the file has one ({float(own['scale']):g}); leave it out")
        return Part(own["scale"].reshape(()), f"{layer}.scale")
    if scale is None:
        raise InputError(
            f"expected the scale of the cosine classifier {layer!r} (it has no bias) in the file, got none, since it "
            "was constant; give it: --scale 20 in the official configs"
        )
    return Part(torch.tensor(float(scale)), None, "--scale")


def below(tensors, place):
    """A module's tensors, without its name before theirs."""
    return {name.removeprefix(f"{place}."): t for name, t in tensors.items() if name.startswith(f"{place}.")}


def require(own, place, words):
    """Refuse a module that lacks some of its tensors."""
    missing = [f"{place}.{word}" for word in words if word not in own]
    if missing:
        raise InputError(f"expected {some(missing)} beside the others of {place!r}, got none; is the file whole?")


def is_matrix(tensor):
    """Whether it is a linear layer's weight."""
    return tensor is not None and tensor.dim() == 2
