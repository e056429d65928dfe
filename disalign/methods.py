"""Related methods as ways to fill magnitude and margin (Sec. 3.3): closed form, each with its equation.

Each returns an :class:`AdaptiveCalibration` of confidence one, s_j = magnitude_j z_j + margin_j, for a classifier's
scores z of K classes; a detector's background behind them is left alone. It is called with scores and features, as a
learnt one is.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .counts import ClassCounts, load_class_counts
from .errors import InputError, some
from .fitting import log_weights
from .functional import generalized_reweight
from .modules import AdaptiveCalibration, CosineClassifier, sizes


def tau_normalize(classifier: nn.Module, tau: float = 1.0, background: bool = False) -> AdaptiveCalibration:
    """magnitude_j = ||w_j||^-tau (Kang et al., "Decoupling representation and classifier", 2020).

    A bias is scaled like the rest of its score; theirs have none.

    Args:
        classifier: linear; of a cosine classifier the weights' norms have no influence.
        tau: 0 leaves the scores, 1 gives all classes' weights the norm 1.
        background: the last output is a background's.

    Raises:
        InputError: another classifier, or weights of norm 0.
    """
    if isinstance(classifier, CosineClassifier) or not hasattr(classifier, "weight"):
        raise InputError(f"expected a linear classifier, whose weights have norms, got {type(classifier).__name__}")
    classes = sizes(classifier)[1] - background
    norms = cast(Tensor, classifier.weight).detach().flatten(1).norm(dim=1)[:classes]
    zero = (norms == 0).nonzero().flatten().tolist()
    if zero:
        raise InputError(f"expected weights other than 0, got norm 0 for class {some(zero)}")
    return _filled(classifier, background, magnitude=norms**-tau)


def logit_adjust(
    classifier: nn.Module,
    class_counts: ClassCounts,
    strength: float = 1.0,
    target_prior: Tensor | None = None,
) -> AdaptiveCalibration:
    """margin_j = -strength ln r_j + const. (Menon et al., "Long-tail learning via logit adjustment", 2021).

    The constant is that of eq. 11's weights, which average 1, and matters beside a background alone.

    Args:
        classifier: any, of K outputs, or K + 1 with a background.
        class_counts: training counts r, anything :func:`disalign.load_class_counts` takes.
        strength: 0 leaves the scores, 1 turns posteriors under r into those under equal classes.
        target_prior: (K,) frequencies to expect in place of equal ones.

    Raises:
        InputError: counts that do not fit the classifier, or are 0; a prior that is not positive.
    """
    counts, background = _counts_of(classifier, class_counts)
    if not (math.isfinite(strength) and strength >= 0):
        raise InputError(f"expected a finite strength >= 0, got {strength!r}")
    margin = log_weights(generalized_reweight(counts, strength).double())
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
    """magnitude_j = (n_j / n_max)^-gamma, margin_j = -tau ln(n_j / n): what the VS loss trains against (Kini et al.,
    "Label-imbalanced and group-sensitive classification under overparameterization", 2021), applied to scores
    afterwards: its loss sees (n_j / n_max)^gamma z_j + tau ln(n_j / n).

    Args:
        classifier: any.
        class_counts: n.
        tau, gamma: theirs; 0 and 0 leave the scores.
    """
    counts, background = _counts_of(classifier, class_counts)
    _require_examples(counts)
    n = counts.double()
    return _filled(classifier, background, (n / n.max()) ** -gamma, -tau * (n / n.sum()).log())


def rebalance(classifier: nn.Module, features: Tensor) -> AdaptiveCalibration:
    """margin_j = -ln mean(p_j): the mean prediction over unlabelled examples stands for the classes' frequencies.

    Args:
        classifier: any, without a background.
        features: (N, d), on the classifier's device; no labels and no counts are needed.
    """
    with torch.no_grad():
        mean = classifier(features).double().softmax(dim=1).mean(dim=0)
    return _filled(classifier, False, margin=-mean.clamp(min=torch.finfo(torch.float64).tiny).log())


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
