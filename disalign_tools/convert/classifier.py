"""The classifier of a checkpoint: as its source computes it, as we do, and folded into a stock one.

Shapes: N samples, C scores (K classes and a detector's background), d the length of the feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from disalign import CosineClassifier, InputError, calibrate_classifier, fold_classifier
from disalign.hand_over import require_tensors

#: Our names of a calibration's tensors.
CALIBRATION = ("magnitude", "margin", "confidence.weight", "confidence.bias")


class Part(NamedTuple):
    """One tensor of the result: its source tensor, and how it was changed (empty: the same numbers)."""

    tensor: Tensor
    source: str | None
    change: str = ""


@dataclass
class Classifier:
    """A classifier, under our names."""

    name: str  # in the source
    parts: dict[str, Part]  # "weight", "bias", "scale" (cosine) and those of CALIBRATION that it has
    formula: Callable[[Tensor], Tensor]  # float64 features (N, d) -> the source's own scores (N, C), by its raw tensors
    place: str  # its name in the result
    calibration_in: str = ""  # the module in the result that owns its calibration, if not itself
    passthrough: int = 0  # trailing scores that are not calibrated
    stock: nn.Module | None = None  # once folded

    @property
    def calibrated(self) -> bool:
        return any(word in self.parts for word in CALIBRATION)

    @property
    def cosine(self) -> bool:
        return "scale" in self.parts

    @property
    def stock_line(self) -> str:
        """The code that prepares the stock model for a folded cosine classifier; "" for any other."""
        if not isinstance(self.stock, nn.Sequential):
            return ""
        layers = ", ".join(f"nn.{layer}" for layer in self.stock)
        return f'model.set_submodule("{self.place}", nn.Sequential({layers}))'

    def named_parts(self) -> dict[str, Part]:
        """Name in the result -> part."""
        owners = dict.fromkeys(CALIBRATION, self.calibration_in or self.place)
        return {f"{owners.get(word, self.place)}.{self._below(word)}": part for word, part in self.parts.items()}

    def _below(self, word):
        """The name of a part below the classifier."""
        if word in CALIBRATION:
            return f"calibration.{word}"
        return f"1.{word}" if isinstance(self.stock, nn.Sequential) else word

    def _module(self):
        """The stock one, or ours without the source's numbers; in float64."""
        if self.stock is not None:
            return self.stock
        outputs, width = self.parts["weight"].tensor.shape[:2]
        bias = "bias" in self.parts
        if self.cosine:
            model = CosineClassifier(width, outputs)
        elif self.parts["weight"].tensor.dim() == 4:
            model = nn.Conv2d(width, outputs, 1, bias=bias)
        else:
            model = nn.Linear(width, outputs, bias)
        if self.calibrated:
            calibrate_classifier(
                model,
                passthrough=self.passthrough,
                learn_magnitude="magnitude" in self.parts,
                learn_margin="margin" in self.parts,
                confidence="learnt" if "confidence.weight" in self.parts else "one",
            )
        return model.double()

    def _loaded(self, tensors):
        """The module with the tensors of the parts."""
        model = self._module()
        model.load_state_dict({self._below(word): tensor for word, tensor in tensors.items()})
        return model

    def require_fit(self, where: str) -> None:
        """Refuse tensors that do not belong together."""
        shape = tuple(self.parts["weight"].tensor.shape)
        if len(shape) < 2 or shape[2:] not in ((), (1, 1)) or 0 in shape:
            raise InputError(
                f"expected a weight of shape (C, d) or (C, d, 1, 1) in {self.name!r}, got {shape}; is it a classifier?"
            )
        names = {self._below(word): part.source or word for word, part in self.parts.items()}
        target = {names.get(name, name): tensor for name, tensor in self._module().state_dict().items()}
        own = {part.source or word: part.tensor for word, part in self.parts.items()}
        require_tensors(own, target, f"tensors of {self.name!r}", where=where)

    def fold(self) -> None:
        """Make it a stock one, in place."""
        weight = self.parts["weight"].tensor
        sources = ", ".join(part.source for part in self.parts.values() if part.source)
        if not self.calibrated:
            self.parts["magnitude"] = Part(torch.ones(len(weight) - self.passthrough), None)  # the identity
        self.stock = fold_classifier(self._loaded({word: part.tensor for word, part in self.parts.items()}))
        # Half precision would cost the scores three digits.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        folded = zip(("weight", "bias"), self.stock.state_dict().values(), strict=True)
        self.parts = {word: Part(tensor.to(dtype), sources, "folded") for word, tensor in folded}

    def difference(self, tensors: dict[str, Tensor]) -> float:
        """Largest difference between the source's scores and ours, from ``tensors``, relative to the largest score."""
        shape = self.parts["weight"].tensor.shape[1:]  # (d,), or (d, 1, 1) of a 1x1 convolution
        features = torch.randn(64, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model = self._loaded({word: tensors[name] for word, name in zip(self.parts, self.named_parts(), strict=True)})
        with torch.no_grad():
            ours, theirs = model(features.reshape(64, *shape)).flatten(1), self.formula(features)
        return float((theirs - ours).abs().max() / (theirs.abs().max() or 1.0))
