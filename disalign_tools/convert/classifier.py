"""The classifier of a checkpoint: as its source computes it, as we do, and folded into a stock one.

Shapes: N samples, C scores (K classes and a detector's background), d the length of the feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from disalign import CosineClassifier, InputError, calibrate_classifier
from disalign.folding import EPS, fold_tensors, stock_cosine

#: Our names of a calibration's tensors, below the classifier's.
CALIBRATION = ("magnitude", "margin", "confidence.weight", "confidence.bias")


class Part(NamedTuple):
    """One tensor of the result: which of the source's it is, and what was done to it (nothing: the same numbers)."""

    tensor: Tensor
    source: str | None
    change: str = ""


@dataclass
class Classifier:
    """A classifier, in our words.

    Attributes:
        name: of the classifier in the source.
        parts: ``weight``, ``bias``, ``scale`` (cosine) and those of ``CALIBRATION`` that it has.
        formula: the source's own scores: float64 features (N, d) -> (N, C), from the source's raw tensors.
        place: its name in the result.
        calibration_place: its calibration's name in the result, if that is not ``{place}.calibration``.
        passthrough: trailing scores that are not calibrated.
        in_sequence: it is a folded cosine classifier, the linear layer in :func:`stock_cosine`.
    """

    name: str
    parts: dict[str, Part]
    formula: Callable[[Tensor], Tensor]
    place: str
    calibration_place: str | None = None
    passthrough: int = 0
    in_sequence: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """C, d."""
        return self.parts["weight"].tensor.shape[:2]

    @property
    def calibrated(self) -> bool:
        return any(word in self.parts for word in CALIBRATION)

    @property
    def cosine(self) -> bool:
        return "scale" in self.parts

    def named_parts(self) -> dict[str, Part]:
        """Name in the result -> part."""
        return {self._name(word): part for word, part in self.parts.items()}

    def _name(self, word):
        if word in CALIBRATION:
            return f"{self.calibration_place or f'{self.place}.calibration'}.{word}"
        return f"{self.place}.1.{word}" if self.in_sequence else f"{self.place}.{word}"

    @property
    def stock_line(self) -> str:
        """The code that makes room in the stock model for a folded cosine classifier."""
        outputs, width = self.shape
        return (
            f'model.set_submodule("{self.place}", nn.Sequential(nn.RMSNorm({width}, eps={EPS:g}, '
            f"elementwise_affine=False), nn.Linear({width}, {outputs})))"
        )

    def require_shapes(self) -> None:
        """Refuse tensors that do not belong together.

        Raises:
            InputError: they do not.
        """
        weight = self.parts["weight"].tensor
        if weight.dim() not in (2, 4) or not weight.numel() or weight[0, 0].numel() != 1:
            raise InputError(
                f"expected a weight of shape (C, d) or (C, d, 1, 1) in {self.name!r}, got {tuple(weight.shape)}; is it "
                "a classifier?"
            )
        outputs, width = self.shape
        sizes = dict.fromkeys(("magnitude", "margin"), outputs - self.passthrough)
        sizes |= {"weight": weight.numel(), "bias": outputs, "scale": 1, "confidence.weight": width}
        for word, part in self.parts.items():
            if part.tensor.numel() != sizes.get(word, 1):
                raise InputError(
                    f"expected {sizes.get(word, 1)} numbers in {part.source} beside a weight of shape "
                    f"{tuple(weight.shape)}, got {part.tensor.numel()}; do they belong together?"
                )

    def fold(self) -> None:
        """Make a classifier with confidence one a stock one, in place.

        Raises:
            InputError: its confidence is learnt, or there is nothing to fold.
        """
        tensors = {word: part.tensor for word, part in self.parts.items()}
        if "confidence.weight" in tensors:
            raise InputError(
                f"expected a calibration with confidence 'one' to fold, but that of {self.name!r} is learnt: it blends "
                "the scores by the input, as no stock layer does; export the model (python -m disalign_cls.export)"
            )
        if not (self.calibrated or self.cosine):
            raise InputError(
                f"expected a calibrated or cosine classifier to fold, but {self.name!r} is a stock one; leave out --fold"
            )
        outputs, width = self.shape
        classes, weight = outputs - self.passthrough, tensors["weight"]
        folded = fold_tensors(
            # Half precision would cost the scores three digits.
            weight.to(torch.promote_types(weight.dtype, torch.float32)),
            tensors.get("bias"),
            tensors.get("magnitude", torch.ones(classes)),
            tensors.get("margin", torch.zeros(classes)),
            self.passthrough,
            # RMSNorm takes a feature to norm sqrt(d).
            scale=float(tensors["scale"]) / width**0.5 if self.cosine else None,
        )
        self.in_sequence = self.cosine
        sources = ", ".join(part.source for part in self.parts.values() if part.source)
        self.parts = {word: Part(one, sources, "folded") for word, one in zip(("weight", "bias"), folded, strict=True)}

    def difference(self, tensors: dict[str, Tensor]) -> float:
        """Largest difference of the source's scores and ours, with the result's tensors, on random features.

        It is relative to the largest score.
        """
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(64, self.shape[1], dtype=torch.float64, generator=generator)
        theirs = self.formula(features)
        largest = float(theirs.abs().max())
        return float((theirs - self._scores(tensors, features)).abs().max()) / (largest or 1.0)

    def _scores(self, tensors, features):
        outputs, width = self.shape
        state = {}
        for word in self.parts:
            tensor = tensors[self._name(word)].double()
            # A 1x1 convolution is a linear layer of each pixel.
            state[f"calibration.{word}" if word in CALIBRATION else word] = (
                tensor[..., 0, 0] if tensor.dim() == 4 else tensor
            )
        if self.in_sequence:
            model = stock_cosine(width, outputs)
            state = {f"1.{name}": tensor for name, tensor in state.items()}
        else:
            model = CosineClassifier(width, outputs) if self.cosine else nn.Linear(width, outputs, "bias" in self.parts)
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
