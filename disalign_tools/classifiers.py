"""The classifier of a checkpoint: as its source computes it, as we do, and folded into a stock one.

Shapes: N samples, C scores (K classes and a detector's background), d the length of the feature.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from disalign import CosineClassifier, InputError, calibrate_classifier
from disalign.folding import EPS, fold_tensors, stock_cosine

#: Our names of a calibration's tensors, below the classifier's.
CALIBRATION = ("magnitude", "margin", "confidence.weight", "confidence.bias")


@dataclass
class Part:
    """One tensor of a classifier: where it comes from, and what was done to it (nothing: the same numbers)."""

    tensor: Tensor
    source: str | None
    change: str = ""


@dataclass
class ScoreLayer:
    """A classifier, in our words.

    Attributes:
        name: of the classifier in the source.
        parts: ``weight``, ``bias``, ``scale`` (cosine) and those of ``CALIBRATION`` that it has.
        formula: the source's own scores: float64 features (N, d) -> (N, C), from the source's raw tensors.
        passthrough: trailing scores that are not calibrated.
        place, calibration_place: names of the classifier and of its calibration in the result.
        in_sequence: it is a folded cosine classifier, the linear layer in :func:`stock_cosine`.
    """

    name: str
    parts: dict[str, Part]
    formula: Callable[[Tensor], Tensor]
    passthrough: int = 0
    place: str = "classifier"
    calibration_place: str = "classifier.calibration"
    in_sequence: bool = False

    @property
    def width(self) -> int:
        """d."""
        return self.parts["weight"].tensor.shape[1]

    @property
    def outputs(self) -> int:
        """C."""
        return self.parts["weight"].tensor.shape[0]

    @property
    def calibrated(self) -> bool:
        return any(word in self.parts for word in CALIBRATION)

    @property
    def cosine(self) -> bool:
        return "scale" in self.parts

    def names(self) -> dict[str, str]:
        """Word -> name in the result."""
        linear = f"{self.place}.1" if self.in_sequence else self.place
        return {word: f"{self.calibration_place if word in CALIBRATION else linear}.{word}" for word in self.parts}

    @property
    def stock_line(self) -> str:
        """The code that makes room in the stock model for a folded cosine classifier."""
        return (
            f'model.set_submodule("{self.place}", nn.Sequential(nn.RMSNorm({self.width}, eps={EPS:g}, '
            f"elementwise_affine=False), nn.Linear({self.width}, {self.outputs})))"
        )

    def scores(self, tensors: dict[str, Tensor], features: Tensor) -> Tensor:
        """Our own scores (N, C) of float64 features (N, d), with the result's tensors."""
        state = {}
        for word, name in self.names().items():
            tensor = tensors[name].double()  # a 1x1 convolution is a linear layer of each pixel
            state[f"calibration.{word}" if word in CALIBRATION else word] = (
                tensor.flatten(1) if tensor.dim() == 4 else tensor
            )
        if self.in_sequence:
            model = stock_cosine(self.width, self.outputs)
            state = {f"1.{name}": tensor for name, tensor in state.items()}
        else:
            model = CosineClassifier(self.width, self.outputs) if self.cosine else nn.Linear(self.width, self.outputs)
            if "bias" not in self.parts:
                model.bias = None
            if self.calibrated:
                calibrate_classifier(
                    model,
                    passthrough=self.passthrough,
                    magnitude="magnitude" in self.parts,
                    margin="margin" in self.parts,
                    confidence="learnt" if "confidence.weight" in self.parts else "one",
                )
        model.double().load_state_dict(state)
        with torch.no_grad():
            return model(features)

    def difference(self, tensors: dict[str, Tensor]) -> float:
        """Largest difference of the source's scores and ours on random features, relative to the largest score."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(64, self.width, dtype=torch.float64, generator=generator)
        theirs = self.formula(features)
        largest = float(theirs.abs().max())
        return float((theirs - self.scores(tensors, features)).abs().max()) / (largest or 1.0)


def require_shapes(layer: ScoreLayer) -> None:
    """Refuse a classifier whose tensors do not belong together.

    Raises:
        InputError: they do not.
    """
    weight = layer.parts["weight"].tensor
    if weight.dim() not in (2, 4) or not weight.numel() or weight[0, 0].numel() != 1:
        raise InputError(
            f"expected a weight of shape (C, d) or (C, d, 1, 1) in {layer.name!r}, got {tuple(weight.shape)}; is it a "
            "classifier?"
        )
    classes = layer.outputs - layer.passthrough
    sizes = {"bias": layer.outputs, "scale": 1, "magnitude": classes, "margin": classes}
    sizes |= {"confidence.weight": layer.width, "confidence.bias": 1}
    for word, part in layer.parts.items():
        if part.tensor.numel() != sizes.get(word, part.tensor.numel()):
            raise InputError(
                f"expected {sizes[word]} numbers in {part.source} beside a weight of shape {tuple(weight.shape)}, got "
                f"{part.tensor.numel()}; do they belong together?"
            )


def fold(layer: ScoreLayer) -> None:
    """Make a classifier with confidence one a stock one, in place.

    Raises:
        InputError: its confidence is learnt, or there is nothing to fold.
    """
    parts = layer.parts
    if "confidence.weight" in parts:
        raise InputError(
            f"expected a calibration with confidence 'one' to fold, but that of {layer.name!r} is learnt: it blends "
            "the scores by the input, as no stock layer does; export the model (python -m disalign_cls.export)"
        )
    if not (layer.calibrated or layer.cosine):
        raise InputError(
            f"expected a calibrated or cosine classifier to fold, but {layer.name!r} is a stock one; leave out --fold"
        )
    weight, outputs = parts["weight"], layer.outputs
    # Half precision would cost the scores three digits.
    precise = weight.tensor.to(torch.promote_types(weight.tensor.dtype, torch.float32))
    classes = outputs - layer.passthrough
    folded = fold_tensors(
        precise,
        parts["bias"].tensor if "bias" in parts else None,
        parts["magnitude"].tensor if "magnitude" in parts else torch.ones(classes),
        parts["margin"].tensor if "margin" in parts else torch.zeros(classes),
        layer.passthrough,
        # RMSNorm takes a feature to norm sqrt(d).
        scale=float(parts["scale"].tensor) / layer.width**0.5 if layer.cosine else None,
    )
    layer.in_sequence = layer.cosine
    sources = ", ".join(part.source for part in parts.values() if part.source)
    layer.parts = {
        word: Part(tensor, sources, "folded") for word, tensor in zip(("weight", "bias"), folded, strict=True)
    }
