"""The equations of DisAlign (CVPR 2021) as pure functions; each stands here and nowhere else.

Shapes: N samples, K classes, ``*`` any number of spatial dimensions (none for images and boxes, H x W for pixels).
"""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, some

REDUCTIONS = ("weighted_mean", "mean", "sum", "none")


def calibrate(
    logits: Tensor,
    confidence: Tensor,
    magnitude: Tensor,
    margin: Tensor,
    passthrough: int = 0,
) -> Tensor:
    """Blend the calibrated scores with the original ones (eq. 4-5).

    With s_j = magnitude_j * z_j + margin_j, the result is confidence * s_j + (1 - confidence) * z_j. It is computed as
    an interpolation, z + confidence * (s - z), which rounds to exactly z at magnitude 1, margin 0; the form above does
    not. Half-precision scores are calibrated in fp32.

    Args:
        logits: (N, C, *) stage-one scores z.
        confidence: (N, 1, *) values in [0, 1], sigma(x) of eq. 5.
        magnitude: (K,) alpha of eq. 4; 1 leaves the score as it is.
        margin: (K,) beta of eq. 4; 0 leaves the score as it is.
        passthrough: trailing columns that are not calibrated, C - K (1 for a detector's background).

    Returns:
        (N, C, *) calibrated scores, in the dtype that the inputs promote to.

    Raises:
        InputError: shapes that do not fit.

    Examples:
        >>> logits, confidence = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5]])
        >>> disalign.calibrate(logits, confidence, magnitude=torch.tensor([1.0, 2.0]), margin=torch.tensor([0.0, 1.0]))
        tensor([[2., 2.]])
    """
    k = logits.shape[1] - passthrough
    if not torch.jit.is_scripting() and not torch.jit.is_tracing():
        _check_shapes(logits, confidence, magnitude, margin, k)
    result = torch.promote_types(torch.promote_types(logits.dtype, magnitude.dtype), confidence.dtype)
    precise = torch.promote_types(result, torch.float32)
    per_class = [1, k] + [1] * (logits.dim() - 2)
    z = logits[:, :k].to(precise)
    s = torch.addcmul(margin.to(precise).view(per_class), magnitude.to(precise).view(per_class), z)  # eq. 4
    calibrated = torch.lerp(z, s, confidence.to(precise)).to(result)  # eq. 5
    if passthrough == 0:
        return calibrated
    return torch.cat([calibrated, logits[:, k:].to(result)], dim=1)


def _check_shapes(logits: Tensor, confidence: Tensor, magnitude: Tensor, margin: Tensor, k: int) -> None:
    if magnitude.shape != (k,) or margin.shape != (k,):
        raise InputError(
            f"expected magnitude and margin of length {k} for logits of shape {tuple(logits.shape)}, got "
            f"{tuple(magnitude.shape)} and {tuple(margin.shape)}; passthrough counts the other trailing columns"
        )
    if confidence.shape != (logits.shape[0], 1, *logits.shape[2:]):
        raise InputError(
            f"expected a confidence of shape {(logits.shape[0], 1, *logits.shape[2:])} for logits of shape "
            f"{tuple(logits.shape)}, got {tuple(confidence.shape)}"
        )


def generalized_reweight(
    class_counts: Tensor,
    rho: float,
    normalize: str = "mean",
    zero_count: str = "error",
) -> Tensor:
    """Class weights of the reference distribution (eq. 11), w_c = (1/r_c)^rho / sum_k (1/r_k)^rho.

    Computed in log space and float64, so that no rho overflows. Counts and frequencies give the same weights.

    Args:
        class_counts: (K,) training counts (or frequencies), any real dtype.
        rho: scale of eq. 11, >= 0; 0 weighs every class alike, 1 inversely to its frequency.
        normalize: ``"sum"``, the weights sum to 1 (the paper); ``"mean"``, they average 1 (what the official code
            trains with, and needed beside a background class of weight 1).
        zero_count: ``"error"`` refuses a class that has no training example; ``"exclude"`` gives it weight 0 and leaves
            it out of the normalisation.

    Returns:
        (K,) fp32 weights.

    Raises:
        InputError: counts that are empty, negative, not finite or all zero; a zero count under ``"error"``; a rho that
            is negative or not finite; an unknown option.

    Examples:
        >>> counts = torch.tensor([6, 3, 2, 1])
        >>> disalign.generalized_reweight(counts, rho=1.0)
        tensor([0.3333, 0.6667, 1.0000, 2.0000])
        >>> disalign.generalized_reweight(counts, rho=1.0, normalize="sum")
        tensor([0.0833, 0.1667, 0.2500, 0.5000])
    """
    counts = torch.as_tensor(class_counts).to(torch.float64)
    if normalize not in ("mean", "sum") or zero_count not in ("error", "exclude"):
        raise InputError(
            f"expected normalize 'mean' or 'sum' and zero_count 'error' or 'exclude', got {normalize!r}, {zero_count!r}"
        )
    if not (isinstance(rho, numbers.Real) and not isinstance(rho, bool) and math.isfinite(rho) and rho >= 0):
        raise InputError(f"expected a finite rho >= 0, got {rho!r}")
    if counts.dim() != 1 or counts.numel() == 0:
        raise InputError(f"expected one count per class, got a tensor of shape {tuple(counts.shape)}")
    if not (torch.isfinite(counts).all() and (counts >= 0).all() and (counts > 0).any()):
        raise InputError(
            "expected class counts that are finite, not negative and not all zero; count the classes again"
        )
    present = counts > 0
    if zero_count == "error" and not present.all():
        empty = (~present).nonzero().flatten().tolist()
        raise InputError(
            f"expected at least one training example per class, got none for class {some(empty)}; remove these classes "
            "or pass zero_count='exclude'"
        )
    log_weights = -rho * counts[present].log()
    kept = (log_weights - log_weights.max()).exp()
    kept = kept / (kept.mean() if normalize == "mean" else kept.sum())
    weights = torch.zeros_like(counts)
    weights[present] = kept
    return weights.float()


def class_weights(
    class_counts: Tensor,
    rho: float,
    normalize: str = "mean",
    zero_count: str = "error",
    background_weight: float | str | None = None,
) -> Tensor:
    """:func:`generalized_reweight`, and behind it the weight of a detector's background, if there is one.

    Args:
        class_counts, rho, normalize, zero_count: as there; counts n, weights w.
        background_weight: a number (official: 1, beside foreground weights that average 1); or ``"balanced"``,
            sum(n w) / sum(n): the classes' mean weight over their examples, which leaves the balance of foreground and
            background as it is in the data.

    Returns:
        (K,) fp32 weights, or (K + 1,) with a background.

    Raises:
        InputError: as there, and see :func:`check_background_weight`.
    """
    weight = generalized_reweight(class_counts, rho, normalize, zero_count)
    if background_weight is None:
        return weight
    check_background_weight(background_weight)
    if background_weight == "balanced":
        counts = torch.as_tensor(class_counts).to(torch.float64)
        background_weight = float((counts * weight).sum() / counts.sum())
    return torch.cat([weight, torch.tensor([float(background_weight)])])


def check_background_weight(value: float | str) -> None:
    """Refuse what is no weight of a background.

    Raises:
        InputError: it is neither ``"balanced"`` nor a finite number >= 0.
    """
    number = isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0
    if not (number or value == "balanced"):
        raise InputError(f"expected a finite background weight >= 0, or 'balanced', got {value!r}")


def check_labels(target: Tensor, num_classes: int, ignore_index: int | None = -100) -> Tensor:
    """Refuse labels outside [0, num_classes) that are not ``ignore_index``; on the CPU only, where the check is free.

    Returns:
        The labels as int64: uint8 ones would choose among the classes as a mask does.

    Raises:
        InputError: there are such labels, or probabilities in their place.
    """
    if target.is_floating_point():
        raise InputError(
            f"expected one whole label per sample, got {target.dtype} of shape {tuple(target.shape)}; leave out mixup "
            "and other soft labels in stage two"
        )
    target = target.long()
    if target.device.type != "cpu":
        return target
    outside = (target < 0) | (target >= num_classes)
    wrong = target[outside if ignore_index is None else outside & (target != ignore_index)]
    if wrong.numel():
        ignored = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise InputError(
            f"expected labels in [0, {num_classes}){ignored}, got {some(wrong.tolist())}; "
            "check the annotations or the number of classes"
        )
    return target


def grw_denominator(target: Tensor, weight: Tensor, reduction: str, ignore_index: int = -100) -> Tensor:
    """What :func:`grw_cross_entropy` divides the summed loss by.

    Args:
        target: (N, *) whole labels.
        weight: (K,) class weights.
        reduction: ``"mean"`` for the number of valid labels; otherwise their summed weights.
        ignore_index: label that is left out.

    Returns:
        A scalar of weight's dtype; 0 if nothing is valid.

    Raises:
        InputError: see :func:`check_labels`.
    """
    target = check_labels(target, len(weight), ignore_index)
    valid = target != ignore_index
    if reduction == "mean":
        return valid.sum().to(weight.dtype)
    # Clamped rather than selected: a selection would make a GPU wait.
    return (weight[target.clamp(0, len(weight) - 1)] * valid).sum()


def grw_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    reduction: str = "weighted_mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy against the re-weighted reference distribution (eq. 8-10), in fp32 or better.

    Args:
        logits: (N, K, *) calibrated scores; bf16 and fp16 are taken too.
        target: (N, *) labels in [0, K), of any whole dtype, or ``ignore_index``.
        weight: (K,) class weights, see :func:`generalized_reweight`.
        reduction: ``"weighted_mean"``, sum(w * ce) / sum(w) (torch's own; official classification and detection);
            ``"mean"``, sum(w * ce) / N_valid (the paper's eq. 9); ``"sum"``; ``"none"``.
        ignore_index: label of samples or pixels that do not count.
        denominator: divides the sum instead of this batch's own, for a mean over more than this batch (all ranks, or
            all pixels).

    Returns:
        A scalar, or (N, *) for ``"none"``. An empty or all-ignored batch gives 0 with zero gradients.

    Raises:
        InputError: an unknown reduction, a weight of wrong length, or a wrong label (see :func:`check_labels`).

    Examples:
        >>> logits, target, weight = torch.zeros(3, 2), torch.tensor([0, 1, -100]), torch.tensor([0.5, 1.5])
        >>> disalign.grw_cross_entropy(logits, target, weight, reduction="none")
        tensor([0.3466, 1.0397, 0.0000])
        >>> disalign.grw_cross_entropy(logits, target, weight)
        tensor(0.6931)
    """
    num_classes = logits.shape[1]
    if reduction not in REDUCTIONS:
        raise InputError(f"expected a reduction among {some(REDUCTIONS)}, got {reduction!r}")
    if weight.shape != (num_classes,):
        raise InputError(
            f"expected {num_classes} class weights for logits of shape {tuple(logits.shape)}, got "
            f"{tuple(weight.shape)}; do the class counts belong to this dataset?"
        )
    target = check_labels(target, num_classes, ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = weight.to(logits.dtype)
    losses = F.cross_entropy(logits, target, weight=weight, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses
    if reduction == "sum" and denominator is None:
        return losses.sum()
    if denominator is None:
        denominator = grw_denominator(target, weight, reduction, ignore_index)
    return grw_mean(losses.sum(), denominator)


def grw_mean(total: Tensor, denominator: Tensor | float) -> Tensor:
    """The summed loss over its denominator, both scalars; the sum itself, which is 0, if nothing is valid."""
    denominator = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    # Weights so small that their inverse overflows count as none.
    something = denominator > torch.finfo(total.dtype).tiny
    return total / torch.where(something, denominator, torch.ones_like(denominator))
