"""Related methods as ways to fill magnitude and margin (Sec. 3.3), each with its equation and source.

Those in closed form return an :class:`AdaptiveCalibration` of confidence one, s_j = magnitude_j z_j + margin_j, for a
classifier's scores z of K classes; a detector's background behind them is left alone. It is called with scores and
features, as a learnt one is. Those that learn take :class:`disalign.Features` and return a classifier, calibrated by
:func:`disalign.fit` or trained anew.
"""

import copy
import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .counts import ClassCounts, load_class_counts
from .errors import InputError, some
from .features import Features
from .fitting import fit, log_weights
from .functional import generalized_reweight
from .modules import AdaptiveCalibration, Calibrated, CosineClassifier, plain_classifier, sizes
from .probes import class_means, new_classifier, train_classifier


def tau_normalize(classifier: nn.Module, tau: float = 1.0, background: bool = False) -> AdaptiveCalibration:
    """magnitude_j = ||w_j||^-tau (Kang et al., "Decoupling representation and classifier", 2020).

    A bias is scaled like the rest of its score; theirs have none.

    Args:
        classifier: linear; of a cosine classifier the weights' norms have no influence.
        tau: 0 leaves the scores, 1 gives all classes' weights the norm 1.
        background: the last output is a background's.

    Raises:
        InputError: another classifier, or weights of norm 0.

    Examples:
        >>> classifier = nn.Linear(2, 2)
        >>> classifier.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> disalign.methods.tau_normalize(classifier).magnitude.detach()
        tensor([0.2000, 2.0000])
    """
    return _filled(classifier, background, magnitude=_norms(classifier, background) ** -tau)


def logit_adjust(
    classifier: nn.Module,
    class_counts: ClassCounts,
    strength: float = 1.0,
    target_prior: Tensor | None = None,
    zero_count: str = "error",
) -> AdaptiveCalibration:
    """margin_j = -strength ln r_j + const. (Menon et al., "Long-tail learning via logit adjustment", 2021).

    The constant is that of eq. 11's weights, which average 1, and matters beside a background alone.

    Args:
        classifier: any, of K outputs, or K + 1 with a background.
        class_counts: training counts r, anything :func:`disalign.load_class_counts` takes.
        strength: 0 leaves the scores, 1 turns posteriors under r into those under equal classes.
        target_prior: (K,) frequencies to expect in place of equal ones.
        zero_count: of a class without examples: ``"error"``, or ``"exclude"`` to leave its margin at 0.

    Raises:
        InputError: counts that do not fit the classifier, or are 0; a prior that is not positive.

    Examples:
        >>> disalign.methods.logit_adjust(nn.Linear(4, 3), class_counts=[100, 10, 1]).margin.detach()
        tensor([-3.6109, -1.3083,  0.9943])
    """
    counts, background = _counts_of(classifier, class_counts)
    if not (math.isfinite(strength) and strength >= 0):
        raise InputError(f"expected a finite strength >= 0, got {strength!r}")
    margin = log_weights(generalized_reweight(counts, strength, zero_count=zero_count).double())
    if target_prior is not None:
        prior = torch.as_tensor(target_prior, dtype=torch.float64)
        if prior.shape != counts.shape or not (prior > 0).all():
            raise InputError(f"expected {len(counts)} positive frequencies as target_prior, got {some(prior.tolist())}")
        margin = margin + (prior / prior.mean()).log()
    return _filled(classifier, background, margin=margin)


def norcal(classifier: nn.Module, image_counts: ClassCounts, gamma: float = 0.6) -> AdaptiveCalibration:
    """margin_j = -gamma ln n_j, the background as it is (Pan et al., "On model calibration for long-tailed object
    detection and instance segmentation", 2021): exp(z_j) / n_j^gamma, normalised with the background's exp(z).

    Args:
        classifier: of K outputs and a background.
        image_counts: n, the training images with each class.
        gamma: theirs is 0.6 on LVIS v1.
    """
    counts, background = _counts_of(classifier, image_counts)
    _require_examples(counts)
    return _filled(classifier, background, margin=-gamma * counts.double().log())


def vs(classifier: nn.Module, class_counts: ClassCounts, tau: float = 1.0, gamma: float = 0.15) -> AdaptiveCalibration:
    """magnitude_j = (n_j / n_max)^-gamma, margin_j = -magnitude_j tau ln r_j: the VS loss mirrored (Kini et al.,
    "Label-imbalanced and group-sensitive classification under overparameterization", 2021).

    Their loss is the cross-entropy of (n_j / n_max)^gamma z_j + tau ln r_j; of the result these are stage one's scores.
    Beside a background ln r_j is less a constant, as in :func:`logit_adjust`.

    Args:
        classifier: any.
        class_counts: n.
        tau, gamma: theirs; 0 and 0 leave the scores.
    """
    counts, background = _counts_of(classifier, class_counts)
    _require_examples(counts)
    n = counts.double()
    magnitude = (n / n.max()) ** -gamma
    margin = log_weights(generalized_reweight(counts, tau).double()) if background else -tau * (n / n.sum()).log()
    return _filled(classifier, background, magnitude, magnitude * margin)


def rebalance(classifier: nn.Module, features: Tensor, weights: Tensor | None = None) -> AdaptiveCalibration:
    """margin_j = -ln mean(p_j): the mean prediction over unlabelled examples stands for the classes' frequencies.

    Args:
        classifier: any, without a background.
        features: (N, d); no labels and no counts are needed.
        weights: (N,) of the rows; default: 1.
    """
    weight = cast(Tensor, classifier.weight)
    weights = torch.ones(len(features)) if weights is None else weights
    mean = torch.zeros(sizes(classifier)[1], dtype=torch.float64, device=weight.device)
    with torch.no_grad():
        for rows, own in zip(features.split(4096), (weights / weights.sum()).split(4096), strict=True):
            mean += own.to(mean) @ classifier(rows.to(weight)).double().softmax(dim=1)
    return _filled(classifier, False, margin=-mean.clamp(min=torch.finfo(torch.float64).tiny).log())


def shrink(calibration: AdaptiveCalibration, class_counts: ClassCounts, rho: float = 1.0) -> AdaptiveCalibration:
    """A copy whose margins are pulled to logit adjustment's, the more the fewer examples: empirical Bayes.

    With d_j = margin_j - ln w_j (eq. 11 at ``rho``), m their mean and 1 / n_j the variance of a logarithm of n_j
    counted examples, the classes' own variance is t = max(0, mean((d_j - m)^2 - 1 / n_j)), and margin_j becomes
    ln w_j + m + t / (t + 1 / n_j) (d_j - m), as in Efron and Morris, "Stein's estimation rule and its competitors"
    (1973).

    Args:
        calibration: a learnt one, on any device.
        class_counts: n.
        rho: that it was learnt with.
    """
    counts = load_class_counts(class_counts)
    _require_examples(counts)
    if len(counts) != calibration.num_classes:
        raise InputError(f"expected {calibration.num_classes} counts for this calibration, got {len(counts)}")
    anchor, noise = log_weights(generalized_reweight(counts, rho).double()), 1 / counts.double()
    own = calibration.margin.detach().double().cpu() - anchor
    spread = ((own - own.mean()).square() - noise).mean().clamp(min=0)
    shrunk = copy.deepcopy(calibration)
    with torch.no_grad():
        shrunk.margin.copy_(anchor + own.mean() + spread / (spread + noise) * (own - own.mean()))
    return shrunk


def lws(features: Features, classifier: nn.Module, rho: float = 1.0, **options: Any) -> Calibrated:
    """The magnitude alone, confidence one: learnable weight scaling (Kang et al., 2020), under class-balanced loss.

    Args:
        features: of the training set.
        classifier: stage one's.
        rho: scale of eq. 11; theirs is class-balanced sampling, 1.
        options: :func:`disalign.fit`'s, here and below.
    """
    return cast(Calibrated, fit(features, classifier, rho, confidence="one", learn_margin=False, **options))


def vector_scaling(features: Features, classifier: nn.Module, **options: Any) -> Calibrated:
    """Magnitude and margin under plain cross-entropy, rho 0 (Guo et al., "On calibration of modern neural networks",
    2017): a control without any balance. Theirs learns from a held-out split: ``calibration_features``.
    """
    return cast(Calibrated, fit(features, classifier, 0.0, confidence="one", **options))


def marc(features: Features, classifier: nn.Module, rho: float = 1.2, **options: Any) -> Calibrated:
    """magnitude_j and margin_j = b_j ||w_j|| (Wang et al., "Margin calibration for long-tailed visual recognition",
    2022): margins are counted in the norms of the weights. The penalty is on b, which is all that differs.
    """
    scale = _norms(plain_classifier(classifier), features.background)
    return cast(Calibrated, fit(features, classifier, rho, confidence="one", margin_scale=scale, **options))


def crt(features: Features, classifier: nn.Module, rho: float = 1.0, C: float = 1.0) -> nn.Module:
    """A classifier of the same kind, trained anew under class-balanced loss (cRT; Kang et al., 2020).

    Args:
        features: with a row an example, no background.
        classifier: stage one's, linear or cosine; says the kind.
        rho: of the class weights (eq. 11); 1 is their class-balanced sampling.
        C: inverse L2 penalty, see :func:`.probes.train_classifier`.

    Raises:
        InputError: features of pixels or with a background.
    """
    require_examples_as_rows(features)
    found = new_classifier(plain_classifier(classifier), features)
    weights = features.weights * generalized_reweight(features.class_counts, rho, zero_count="exclude")[features.y]
    balanced = replace(features, weights=weights * (features.weights.sum() / weights.sum()))
    train_classifier(found, balanced, C)
    return found.requires_grad_(False)


def nearest_mean(features: Features, metric: str = "cosine") -> nn.Module:
    """Scores by the distance to the mean feature of each class (NCM; Kang et al., 2020).

    Args:
        features: with a row an example, no background.
        metric: ``"cosine"``, a :class:`CosineClassifier` of scale 1; or ``"l2"``, an ``nn.Linear`` whose scores are
            -||x - mean_j||^2 + ||x||^2. A class without examples scores 0, or minus infinity.

    Raises:
        InputError: another metric; features of pixels or with a background.
    """
    require_examples_as_rows(features)
    if metric not in ("cosine", "l2"):
        raise InputError(f"expected the metric 'cosine' or 'l2', got {metric!r}")
    classes, width = len(features.class_counts), features.x.shape[1]
    dtype = torch.promote_types(features.x.dtype, torch.float32)
    means = class_means(features, classes)
    found: nn.Module
    if metric == "cosine":
        found, tensors = CosineClassifier(width, classes, scale=1.0, learn_scale=False), {"weight": means}
    else:
        nothing = torch.where(torch.bincount(features.y, features.weights, classes) > 0, 0.0, -torch.inf)
        found, tensors = nn.Linear(width, classes), {"weight": 2 * means, "bias": nothing - means.square().sum(1)}
    found.to(dtype).load_state_dict(tensors, strict=False)
    return found.requires_grad_(False)


def require_examples_as_rows(features: Features) -> None:
    """Refuse features of pixels or with a background."""
    if features.background or features.bilinear is not None:
        what = "a background's, drawn by proposals" if features.background else "interpolated from four cells each"
        raise InputError(f"expected features with a row an example to learn a classifier from, got rows {what}")


def _norms(classifier: nn.Module, background: bool) -> Tensor:
    """(K,) norms of a linear classifier's weights, without the background's."""
    if isinstance(classifier, CosineClassifier) or not hasattr(classifier, "weight"):
        raise InputError(f"expected a linear classifier, whose weights have norms, got {type(classifier).__name__}")
    weight = cast(Tensor, classifier.weight).detach()
    norms: Tensor = weight.flatten(1).norm(dim=1)[: sizes(classifier)[1] - background]
    zero = (norms == 0).nonzero().flatten().tolist()
    if zero:
        raise InputError(f"expected weights other than 0, got norm 0 for class {some(zero)}")
    return norms


def _filled(
    classifier: nn.Module, background: bool, magnitude: Tensor | None = None, margin: Tensor | None = None
) -> AdaptiveCalibration:
    width, outputs = sizes(classifier)
    options: dict[str, Any] = {"confidence": "one", "passthrough": int(background)}
    calibration = AdaptiveCalibration(outputs - background, width, **options)
    with torch.no_grad():
        if magnitude is not None:
            calibration.magnitude.copy_(magnitude)
        if margin is not None:
            calibration.margin.copy_(margin)
    calibration.requires_grad_(False)
    return calibration.to(cast(Tensor, classifier.weight).device)


def _counts_of(classifier: nn.Module, class_counts: ClassCounts) -> tuple[Tensor, bool]:
    """The counts, and whether the classifier has one output more than they: a background."""
    counts, outputs = load_class_counts(class_counts), sizes(classifier)[1]
    if outputs - len(counts) not in (0, 1):
        raise InputError(
            f"expected one count for each of {outputs} outputs, or for all but a background's, got {len(counts)}"
        )
    return counts, outputs > len(counts)


def _require_examples(counts: Tensor) -> None:
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"expected at least one training example per class, got none for class {some(empty)}; remove it"
        )
