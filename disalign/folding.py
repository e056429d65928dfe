"""A calibrated classifier as a stock one, where the confidence is one: it then runs without this package.

With confidence one, eq. 4 is magnitude_j * z_j + margin_j, linear in z, and a linear classifier absorbs it.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .freezing import unhold
from .functional import calibrate
from .modules import (
    Calibrated,
    CalibratedConv2d,
    CalibratedCosineClassifier,
    CalibratedLinear,
    CosineClassifier,
    sizes,
)
from .output_check import forget_check
from .stage_two import calibrations


def fold_tensors(
    weight: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    margin: Tensor,
    passthrough: int = 0,
    scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorb magnitude and margin of a calibration with confidence one (eq. 4) into a classifier's weight and bias.

    Computed in float64 and rounded once, to the weight's dtype.

    Args:
        weight: (K + passthrough, d) of a linear layer, or (K + passthrough, d, 1, 1) of a 1x1 convolution.
        bias: (K + passthrough,), or None.
        magnitude, margin: (K,).
        passthrough: trailing rows that are not calibrated (1 for a detector's background); theirs stay as they are.
        scale: of a cosine classifier (eq. 3), whose rows are then normalised; the result takes features of norm 1.

    Returns:
        Weight and bias, in the weight's shape and dtype.

    Raises:
        InputError: shapes that do not fit, or numbers that are or become infinite or NaN.
    """
    outputs = len(weight)
    k = outputs - passthrough
    if magnitude.shape != (k,) or margin.shape != (k,):
        raise InputError(
            f"expected magnitude and margin of length {k} for a classifier of {outputs} outputs ({passthrough} not "
            f"calibrated), got {tuple(magnitude.shape)} and {tuple(margin.shape)}; do they belong together?"
        )
    precise = weight.detach().double()
    if scale is not None:
        precise = torch.as_tensor(scale).detach().double() * F.normalize(precise, dim=1, eps=CosineClassifier.eps)
    offset = precise.new_zeros(outputs) if bias is None else bias.detach().double()
    magnitude, margin = magnitude.detach().double(), margin.detach().double()

    def fold(columns: Tensor, added: Tensor) -> Tensor:
        # The d weights of each class are d samples' scores of it; a weight takes no margin, the bias does.
        return calibrate(columns, columns.new_ones(len(columns), 1), magnitude, added, passthrough)

    rows = fold(precise.reshape(outputs, -1).T, torch.zeros_like(margin)).T.reshape(weight.shape)
    folded = rows.to(weight.dtype).contiguous(), fold(offset[None], margin)[0].to(weight.dtype)
    if not all(tensor.isfinite().all() for tensor in folded):
        raise InputError(
            f"expected a classifier whose folded weight and bias are finite in {weight.dtype}, got infinity or NaN; "
            "fold it in a wider type, or look for the fault in the checkpoint"
        )
    return folded


def fold_classifier(classifier: nn.Module) -> nn.Module:
    """A calibrated classifier with confidence one as stock torch modules, in the dtype of its weight.

    A linear one becomes an ``nn.Linear``. A cosine one becomes ``nn.RMSNorm``, which without parameters takes a feature
    to the norm sqrt(d), which the weight absorbs, and an ``nn.Linear``. It gives the same scores but
    for features of a norm below 1e-3, which RMSNorm still takes to norm 1, while :class:`disalign.CosineClassifier`
    lets their scores fade; zero features give the margin in both. It does not turn half-precision features to fp32.

    Args:
        classifier: a :class:`disalign.CalibratedLinear`, :class:`disalign.CalibratedConv2d` or
            :class:`disalign.CalibratedCosineClassifier`.

    Returns:
        ``nn.Linear``, ``nn.Conv2d``, or ``nn.Sequential(nn.RMSNorm, nn.Linear)``; features (N, d) -> scores (N, K).

    Raises:
        InputError: a learnt confidence, or a classifier of another type.

    Examples:
        >>> classifier = disalign.calibrate_classifier(nn.Linear(4, 3), confidence="one")
        >>> classifier.calibration.margin.data[:] = torch.tensor([0.0, 1.0, 2.0])  # as learnt
        >>> folded, features = disalign.fold_classifier(classifier), torch.randn(2, 4)
        >>> folded
        Linear(in_features=4, out_features=3, bias=True)
        >>> torch.allclose(folded(features), classifier(features), atol=1e-5)
        True
    """
    if not isinstance(classifier, CalibratedLinear | CalibratedConv2d | CalibratedCosineClassifier):
        raise InputError(
            "expected a CalibratedLinear, CalibratedConv2d or CalibratedCosineClassifier to fold, got "
            f"{type(classifier).__name__}; export the model instead"
        )
    calibration = classifier.calibration
    if calibration.confidence is not None:
        raise InputError(
            "expected a calibration with confidence 'one' to fold, got a learnt one, which blends by the input as no "
            "stock layer does; export the model instead (TorchScript, ONNX)"
        )
    width, outputs = sizes(classifier)
    scale = classifier.scale.detach().double() / width**0.5 if isinstance(classifier, CosineClassifier) else None
    bias: Tensor | None = cast(nn.Linear, classifier).bias if scale is None else None
    magnitude, margin, passthrough = calibration.magnitude, calibration.margin, calibration.passthrough
    weight, bias = fold_tensors(classifier.weight, bias, magnitude, margin, passthrough, scale)
    layer = nn.Conv2d(width, outputs, 1) if weight.dim() == 4 else nn.Linear(width, outputs)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    # Nothing beside the square of a norm that a cosine classifier divides by; zero stays zero.
    norm = nn.RMSNorm(width, eps=1e-20, elementwise_affine=False)
    stock = layer if scale is None else nn.Sequential(norm, layer)
    return stock.train(classifier.training)


def fold_model(model: nn.Module) -> nn.Module:
    """Replace a model's calibrated classifiers by stock ones, in place, all or none.

    No parameter begins to train, but the model follows ``train()`` again as any other.

    Args:
        model: after :func:`disalign.wrap_classifier` with ``confidence="one"``, for example.

    Returns:
        The same model (or the stock classifier, if the model is but one), whose state dict the stock model takes.

    Raises:
        InputError: nothing to fold, or something that can't be folded; see :func:`fold_classifier`.
    """
    found = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Calibrated)
    }
    distinct = set(found.values())
    total = len(calibrations(model))
    if not found or total != len(distinct):
        raise InputError(
            f"expected calibrated classifiers to fold, got {len(distinct)} for {total} calibrations; fold "
            "tensors with fold_tensors, or export the model instead"
        )
    folded = {module: fold_classifier(module) for module in distinct}
    for name, module in found.items():
        if not name:
            return folded[module]
        model.set_submodule(name, folded[module])
    unhold(model)
    forget_check(model)
    return model
