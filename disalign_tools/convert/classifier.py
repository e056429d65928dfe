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

#: Our names of a calibration's tensors.
CALIBRATION = ("magnitude", "margin", "confidence.weight", "confidence.bias")


class Part(NamedTuple):
    """One tensor of the result: which of the source's it is, and what was done to it (nothing: the same numbers)."""

    tensor: Tensor
    source: str | None
    change: str = ""


@dataclass
class Classifier:
    """A classifier, in our words."""

    name: str  # in the source
    parts: dict[str, Part]  # "weight", "bias", "scale" (cosine) and those of CALIBRATION that it has
    formula: Callable[[Tensor], Tensor]  # float64 features (N, d) -> the source's own scores (N, C), by its raw tensors
    place: str  # its name in the result
    calibration_in: str = ""  # the module in the result that owns its calibration, if not itself
    passthrough: int = 0  # trailing scores that are not calibrated
    in_sequence: bool = False  # it is a folded cosine classifier, the linear layer in stock_cosine

    @property
    def shape(self) -> tuple[int, int]:
        """C, d."""
        outputs, width = self.parts["weight"].tensor.shape[:2]
        return outputs, width

    @property
    def calibrated(self) -> bool:
        return any(word in self.parts for word in CALIBRATION)

    @property
    def cosine(self) -> bool:
        return "scale" in self.parts

    def name_below(self, word: str) -> str:
        """The name of a part below the classifier."""
        return f"calibration.{word}" if word in CALIBRATION else f"1.{word}" if self.in_sequence else word

    def named_parts(self) -> dict[str, Part]:
        """Name in the result -> part."""
        owners = dict.fromkeys(CALIBRATION, self.calibration_in or self.place)
        return {f"{owners.get(word, self.place)}.{self.name_below(word)}": part for word, part in self.parts.items()}

    @property
    def stock_line(self) -> str:
        """The code that makes room in the stock model for a folded cosine classifier."""
        outputs, width = self.shape
        return (
            f'model.set_submodule("{self.place}", nn.Sequential(nn.RMSNorm({width}, eps={EPS:g}, '
            f"elementwise_affine=False), nn.Linear({width}, {outputs})))"
        )

    def require_shapes(self) -> None:
        """Refuse tensors that do not belong together."""
        weight = self.parts["weight"].tensor
        if weight.dim() not in (2, 4) or not weight.numel() or weight[0, 0].numel() != 1:
            raise InputError(
                f"expected a weight of shape (C, d) or (C, d, 1, 1) in {self.name!r}, got {tuple(weight.shape)}; is it "
                "a classifier?"
            )
        outputs, width = self.shape
        sizes = {"weight": weight.numel(), "bias": outputs, "confidence.weight": width}
        sizes |= dict.fromkeys(("magnitude", "margin"), outputs - self.passthrough)
        for word, part in self.parts.items():
            size = sizes.get(word, 1)
            if part.tensor.numel() != size:
                raise InputError(
                    f"expected {size} numbers in {part.source} beside a weight of shape {tuple(weight.shape)}, got "
                    f"{part.tensor.numel()}; do they belong together?"
                )

    def fold(self) -> None:
        """Make it a stock one, in place."""
        tensors = {word: part.tensor for word, part in self.parts.items()}
        if "confidence.weight" in tensors:
            raise InputError(
                f"expected a calibration with confidence 'one' to fold, but that of {self.name!r} is learnt: it blends "
                "the scores by the input, as no stock layer does; export the model (python -m disalign_cls.export)"
            )
        if not (self.calibrated or self.cosine):
            raise InputError(
                f"expected a calibrated or cosine classifier, but {self.name!r} is a stock one; leave out --fold"
            )
        weight, (outputs, width) = tensors["weight"], self.shape
        folded = fold_tensors(
            # Half precision would cost the scores three digits.
            weight.to(torch.promote_types(weight.dtype, torch.float32)),
            tensors.get("bias"),
            tensors.get("magnitude", torch.ones(outputs - self.passthrough)),
            tensors.get("margin", torch.zeros(outputs - self.passthrough)),
            self.passthrough,
            # RMSNorm takes a feature to norm sqrt(d).
            scale=float(tensors["scale"]) / width**0.5 if self.cosine else None,
        )
        self.in_sequence = self.cosine
        sources = ", ".join(part.source for part in self.parts.values() if part.source)
        self.parts = {word: Part(one, sources, "folded") for word, one in zip(("weight", "bias"), folded, strict=True)}

    def difference(self, tensors: dict[str, Tensor]) -> float:
        """Largest difference of the source's scores and ours, with the result's tensors, relative to the largest score.

        Of 64 random features, in float64.
        """
        outputs, width = self.shape
        features = torch.randn(64, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model: nn.Module
        if self.in_sequence:
            model = stock_cosine(width, outputs)
        else:
            model = CosineClassifier(width, outputs) if self.cosine else nn.Linear(width, outputs, "bias" in self.parts)
        if self.calibrated:
            calibrate_classifier(
                model,
                passthrough=self.passthrough,
                learn_magnitude="magnitude" in self.parts,
                learn_margin="margin" in self.parts,
                confidence="learnt" if "confidence.weight" in self.parts else "one",
            )
        state = {
            self.name_below(word): tensors[name] for word, name in zip(self.parts, self.named_parts(), strict=True)
        }
        # A 1x1 convolution is a linear layer of each pixel.
        state = {name: tensor[..., 0, 0] if tensor.dim() == 4 else tensor for name, tensor in state.items()}
        model.double().load_state_dict(state)
        with torch.no_grad():
            ours, theirs = model(features), self.formula(features)
        return float((theirs - ours).abs().max() / (theirs.abs().max() or 1.0))
