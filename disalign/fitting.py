"""Learning a calibration from features: the trunk runs once, and a solver takes seconds."""

import logging
import math
import numbers
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import InputError, input_errors, some
from .features import Features
from .freezing import freeze_except
from .functional import check_background_weight, class_weights, grw_cross_entropy, grw_mean
from .modules import (
    AdaptiveCalibration,
    Calibrated,
    ZeroShotClassifier,
    calibrate_classifier,
    calibrated_form,
    plain_classifier,
    sizes,
)
from .probes import accuracy, held_out, new_classifier, train_classifier, units_per_class
from .solver import Chunk, Part, Solution, minimise, total, total_and_gradients
from .stage_two import keep_magnitude_from_decay, require_finite_settings

#: lambda by anchor (docs/fit.md has a table): logit adjustment's margin is worth a stronger pull than stage one's.
PENALTIES = {"zero": 0.01, "logit_adjust": 0.1}

log = logging.getLogger("disalign")


#: What every fit and comparison tells, see docs/which_method.md.
TRAIN_ACCURACY = "stage one gets {} % of its training set right, averaged over the classes"


@dataclass(frozen=True)
class FitReport:
    """Summary of a :func:`fit`, the attribute ``fit_report`` of the calibrated classifier.

    Attributes:
        rho: of eq. 11.
        cross_fit: number of folds; 0 if the calibration was learnt from stage one's own scores.
        seconds: of the calibration's solver alone.
        train_accuracy: stage one's on its training set, averaged over the classes, in percent, as returned.
        out_of_fold_accuracy: likewise of the folds' classifiers on their held-out rows; ``None`` without folds.
        C: inverse L2 penalty of the classifiers that were trained here; ``None`` if none were.
        left_out: classes without examples, or with too few to hold out (one example or one group); they keep magnitude
            1 and the anchor's margin.
        solution: the objective at the identity and at the end, and the number of evaluations.
    """

    rho: float
    cross_fit: int
    seconds: float
    train_accuracy: float
    out_of_fold_accuracy: float | None
    C: float | None
    left_out: tuple[int, ...]
    solution: Solution

    def on_training_set(self) -> str:
        """Stage one's training accuracy in words, as the commands tell it."""
        return TRAIN_ACCURACY.format(f"{self.train_accuracy:.1f}")

    def record(self) -> dict[str, Any]:
        """Plain values to keep beside a checkpoint, the same for the same fit."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


def fit(
    features: Features,
    classifier: nn.Module | str = "linear",
    rho: float | Sequence[float] = 1.2,
    *,
    cross_fit: int | None = None,
    anchor: str = "zero",
    confidence: str = "learnt",
    learn_magnitude: bool = True,
    learn_margin: bool = True,
    penalty: float | None = None,
    margin_scale: Tensor | None = None,
    C: float | None = None,
    calibration_features: Features | None = None,
    background_weight: float | str = 1.0,
    zero_count: str = "error",
    solver: str = "lbfgs",
    seed: int = 0,
    **recipe: Any,
) -> Any:
    """Learn the calibration of a classifier from its input features, by a solver without a learning rate.

    The objective is the generalized re-weighted loss (eq. 8-11, weighted mean) of all rows, plus
    ``penalty / 2 * (|magnitude - 1|^2 + |margin - anchor|^2 + |v|^2)`` with v the confidence's weights. L-BFGS with
    strong Wolfe line search starts at the identity. Sums are accumulated in fp64; results are bitwise
    reproducible on the same device with the same number of threads. Memory beyond the features depends on K and d,
    hardly on N (docs/scaling.md): 0.3 GiB on a CPU at 10,000 classes of a given classifier. In distributed training
    each rank sums a share of the rows of the same features.

    Args:
        features: features of the training set.
        classifier: stage one's classifier, with K outputs (K + 1 with a background); or ``"linear"``, ``"cosine"`` to
            train one first (:func:`.probes.train_classifier`).
        rho: scale of eq. 11. A sequence gives one calibrated classifier each, sharing stage one and folds.
        cross_fit: number of folds. Each fold is scored by a classifier trained on the others, and the calibration
            learnt from these out-of-fold scores is applied to stage one: a stage one that has memorised its training
            set shows its bias only on unseen examples. A given classifier is then retrained like those of the folds.
            0 uses stage one's own scores. Default: 5 if stage one is trained here, else 0.
        anchor: margin at which the penalty vanishes: ``"zero"``; or ``"logit_adjust"``, the logarithm of the class
            weights (relative to the background's), which is logit adjustment (Menon et al., 2021) at rho 1. Requires
            ``confidence="one"``.
        confidence, learn_magnitude, learn_margin: :class:`AdaptiveCalibration`'s.
        penalty: lambda; default: the anchor's value in :data:`PENALTIES`.
        margin_scale: (K,) positive; the penalty divides each margin's distance from the anchor by it; default: 1.
        C: inverse L2 penalty of the classifiers trained here; default: chosen by held-out loss, or 1 without folds.
        calibration_features: features to learn the calibration from instead, such as a held-out split; class counts
            are still those of ``features``.
        background_weight, zero_count: :class:`GRWCrossEntropyLoss`'s.
        solver: ``"lbfgs"``, or ``"sgd"`` for the paper's recipe (:func:`sgd`, whose options are ``recipe``).
        seed: of the folds, and of the order of SGD.

    Returns:
        The calibrated classifier, frozen except for its calibration, with a :class:`FitReport` as ``fit_report``; for
        several rho a dict from rho to classifier. The given classifier is not modified.

    Raises:
        InputError: the classifier does not match the features, or options are incompatible.

    Examples:
        >>> x, y = torch.tensor([-1.0, 0, 1, 2, -1, 0, 1, 2, 1, 3])[:, None], [0] * 8 + [1] * 2
        >>> classifier = disalign.fit(disalign.Features.from_arrays(x, y), "linear", rho=1.0, cross_fit=0)
        >>> unseen = torch.tensor([[0.0], [2.0], [3.0]])
        >>> classifier.stage_one(unseen).argmax(1), classifier(unseen).argmax(1)
        (tensor([0, 0, 1]), tensor([0, 1, 1]))
    """
    probe = isinstance(classifier, str)
    if cross_fit is None:
        cross_fit = 5 if probe and calibration_features is None and solver == "lbfgs" else 0
    require_options(
        anchor=anchor,
        confidence=confidence,
        learn_magnitude=learn_magnitude,
        learn_margin=learn_margin,
        cross_fit=cross_fit,
        penalty=penalty,
        C=C,
        background_weight=background_weight,
        solver=solver,
        recipe=recipe,
    )
    _require_teachers(classifier, cross_fit, calibration_features, C)
    _require_margin_scale(margin_scale, len(features.class_counts), solver)
    if features.bilinear is not None and (isinstance(classifier, str) or cross_fit or solver == "sgd"):
        raise InputError("expected a given classifier, cross_fit=0 and solver='lbfgs' for features of pixels; set them")
    penalty = PENALTIES[anchor] if penalty is None else penalty
    learns_from = features if calibration_features is None else calibration_features
    given = None if isinstance(classifier, str) else plain_classifier(classifier)
    stage_one = new_classifier(given or classifier, features) if given is None or cross_fit else given
    for rows in (features, learns_from):
        require_fit(given or stage_one, rows)

    parts, unseen = [Part(stage_one, learns_from)], None
    examples = torch.bincount(learns_from.y, minlength=sizes(stage_one)[1])
    if cross_fit:
        parts, C = held_out(stage_one, features, cross_fit, C, seed)
        unseen = accuracy(parts)
        examples = units_per_class(features, len(examples)) - 1
    left_out = (examples <= 0).nonzero().flatten().tolist()
    if len(left_out) == len(examples):
        raise InputError("expected a class with two examples to hold one out, got none; set cross_fit=0")
    if stage_one is not given:
        C = 1.0 if C is None else C
        train_classifier(stage_one, features, C)
    seen = accuracy([Part(stage_one, features)])
    theirs = accuracy([Part(given, features)]) if given is not None and cross_fit else seen
    heeded = calibration_features is not None or isinstance(given, ZeroShotClassifier) or anchor == "logit_adjust"
    refits = features.bilinear is None and not features.background
    _advise(theirs, unseen, given is not None, left_out, heeded, refits)

    def calibrated(rho: float) -> Calibrated:
        begun = time.perf_counter()
        found = calibrate_classifier(
            plain_classifier(stage_one),
            passthrough=int(features.background),
            learn_magnitude=learn_magnitude,
            learn_margin=learn_margin,
            confidence=confidence,
        )
        freeze_except(found, ["calibration"])
        background = background_weight if features.background else None
        weight = class_weights(features.class_counts, rho, zero_count=zero_count, background_weight=background)
        weight = weight.to(found.calibration.magnitude.device)
        if solver == "sgd":
            solution = sgd(found, learns_from, weight, seed=seed, **recipe)
        else:
            target = log_weights(weight, features.background) if anchor == "logit_adjust" else torch.zeros(())
            solution = _lbfgs(found.calibration, parts, weight, target, penalty, left_out, margin_scale)
        if not all(tensor.isfinite().all() for tensor in found.state_dict().values()):
            raise InputError(
                f"expected a finite calibration at rho {rho}, got NaN or infinity; is the classifier finite, and the "
                "learning rate low enough?"
            )
        if not solution.converged:
            log.warning("the solver stopped after %d evaluations, before it had converged", solution.evaluations)
        seconds = time.perf_counter() - begun
        found.fit_report = FitReport(rho, cross_fit, seconds, seen, unseen, C, tuple(left_out), solution)  # type: ignore[assignment]
        return found

    return {one: calibrated(one) for one in rho} if isinstance(rho, Sequence) else calibrated(rho)


def log_weights(weight: Tensor, background: bool = False) -> Tensor:
    """(K,) what the re-weighted loss's optimum adds to calibrated scores: ln w_c, less the background's.

    With w of eq. 11 it is rho times logit adjustment's -ln r_c, up to a constant; 0 for a class of weight 0.
    """
    logs = torch.where(weight > 0, weight, torch.ones_like(weight)).log()
    return logs[:-1] - logs[-1] if background else logs


def _lbfgs(
    calibration: AdaptiveCalibration,
    parts: Sequence[Part],
    weight: Tensor,
    anchor: Tensor,
    penalty: float,
    left_out: Sequence[int],
    margin_scale: Tensor | None = None,
) -> Solution:
    # In fp64 from the scores on: else rounding, and with it the order of the sums, decides where the solver ends.
    calibration.double()
    parameters = dict(calibration.named_parameters())
    weight = weight.double()
    weight[left_out] = 0
    held = [label for label in left_out if label < calibration.num_classes]
    anchor = anchor.double().expand(calibration.num_classes).to(weight.device)
    if "margin" in parameters:
        with torch.no_grad():
            calibration.margin[held] = anchor[held].to(calibration.margin)
    totals = parts[0].features.totals
    if totals is None:
        denominator = float(total(parts, lambda _, chunk: (weight[chunk.y] * chunk.weights).sum()))
    else:
        denominator = float((weight * totals.to(weight)).sum())

    def loss(classifier: nn.Module, chunk: Chunk) -> Tensor:
        def calibrated(x: Tensor) -> Tensor:
            with torch.no_grad():
                logits = classifier(x).double()
            return cast(Tensor, calibration(logits, x))

        losses = grw_cross_entropy(chunk.scores(calibrated), chunk.y, weight, "none")
        return (losses * chunk.weights).sum() / denominator

    def evaluate() -> tuple[Tensor, list[Tensor]]:
        value, gradients = total_and_gradients(parts, loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            if name in ("magnitude", "margin"):
                gradient[held] = 0
        return value, gradients

    zero = torch.zeros((), dtype=torch.float64, device=weight.device)
    targets = {"magnitude": zero + 1, "margin": anchor, "confidence.weight": zero}
    scales = {} if margin_scale is None else {"margin": margin_scale.to(anchor)}

    def distance(values: Sequence[Tensor]) -> Tensor:
        pulled = [
            ((value - targets[name]) / scales.get(name, 1)).square().sum()
            for name, value in zip(parameters, values, strict=True)
            if name in targets
        ]
        return penalty / 2 * torch.stack(pulled).sum()

    solution = minimise(list(parameters.values()), evaluate, distance)
    calibration.float()
    return solution


def sgd(
    classifier: Calibrated,
    features: Features,
    weight: Tensor,
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    max_norm: float = 1.0,
    schedule: int | None = None,
    seed: int = 0,
) -> Solution:
    """The paper's recipe (Sec. 4.1) over features: minibatches, momentum, cosine schedule by epochs, clipped gradients.

    As the classification configs train, step by step, where these see images without random transforms: epoch e goes
    through the rows in the order of ``torch.randperm`` seeded with ``seed + e``.

    Args:
        classifier: frozen but for its calibration, which is trained in place.
        features, weight: rows, and (K,) class weights.
        epochs, batch_size, lr, momentum, nesterov: of the recipe.
        weight_decay: of all but the magnitude.
        max_norm: of the gradients.
        schedule: epochs after which the learning rate reaches 0; default: ``epochs``.
        seed: of the order.
    """
    if epochs < 1 or batch_size < 1:
        raise InputError(f"expected 1 epoch and batch_size 1 or more, got {epochs} and {batch_size}")
    parameters, dtype = list(classifier.calibration.parameters()), cast(Tensor, classifier.weight).dtype
    with input_errors("expected options of SGD", "correct them", (ValueError, TypeError)):
        optimizer = torch.optim.SGD(parameters, lr, momentum, nesterov=nesterov, weight_decay=weight_decay)
    require_finite_settings(optimizer)
    keep_magnitude_from_decay(optimizer, classifier)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule or epochs)
    found = []
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed + epoch))
        summed = 0.0
        for rows in order.split(batch_size):
            x = features.x[rows].to(weight.device)
            y = features.y[rows].to(weight.device)
            importance = features.weights[rows].to(weight)
            losses = grw_cross_entropy(classifier(x.to(dtype)), y, weight, "none")
            loss = grw_mean((losses * importance).sum(), (weight[y] * importance).sum())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            summed += loss.item() * len(rows)
        cosine.step()
        found.append(summed / len(features))
    return Solution(found[0], found[-1], epochs * -(-len(features) // batch_size), True)


#: Options of :func:`sgd`.
RECIPE = ("epochs", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "max_norm", "schedule")

#: Training accuracy, averaged over the classes, in percent, from which a training set counts as memorised: DisAlign on
#: stage one's own scores mostly gains less than logit adjustment there (docs/which_method.md).
MEMORISED = 90.0
#: Held-out accuracy, likewise, from which a trunk is suspected of having been trained on the labels.
TOO_GOOD = 98.0


def _advise(
    seen: float, unseen: float | None, given: bool, left_out: Sequence[int], heeded: bool, refits: bool
) -> None:
    """Say what the user must know of the scores that the calibration learns from."""
    if unseen is None and not heeded and seen >= MEMORISED:
        warnings.warn(
            f"{TRAIN_ACCURACY.format(f'{seen:.1f}')}, and the scores of memorised examples say little about its bias; "
            "set anchor='logit_adjust', give calibration_features of a held-out split"
            + (", or cross_fit=5 if the trunk was not trained on these labels" if refits else ""),
            stacklevel=3,
        )
    if unseen is not None and given:
        log.warning("the given classifier is trained anew on these features, as those of the folds are")
    if unseen is not None and unseen >= min(seen, TOO_GOOD):
        warnings.warn(
            f"classifiers get {unseen:.1f} % right of examples that they have not seen, and stage one {seen:.1f} % of "
            "its training set, averaged over the classes: if the trunk was trained on these labels, its features know "
            "them, and cross-fitting shows less of the bias; compare with anchor='logit_adjust' and cross_fit=0, or "
            "give calibration_features of a held-out split",
            stacklevel=3,
        )
    if left_out:
        held = "too few examples to learn from in class %s; magnitude stays 1 there, and the margin at the anchor"
        log.warning(held, some(left_out))


def require_options(
    *,
    anchor: str = "zero",
    confidence: str = "learnt",
    learn_magnitude: bool = True,
    learn_margin: bool = True,
    cross_fit: int = 0,
    penalty: float | None = None,
    C: float | None = None,
    background_weight: float | str = 1.0,
    solver: str = "lbfgs",
    recipe: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse options of :func:`fit` that are out of range or do not go together; needs no features.

    Raises:
        InputError: names them.
    """
    AdaptiveCalibration(1, 1, learn_magnitude=learn_magnitude, learn_margin=learn_margin, confidence=confidence)
    if not isinstance(cross_fit, numbers.Integral) or isinstance(cross_fit, bool) or cross_fit == 1 or cross_fit < 0:
        raise InputError(f"expected cross_fit 0, or 2 or more folds, got {cross_fit!r}")
    if anchor not in PENALTIES or (anchor == "logit_adjust" and not (confidence == "one" and learn_margin)):
        learnt = "" if learn_margin else " and learn_margin=False"
        raise InputError(
            "expected anchor 'zero', or 'logit_adjust' with confidence='one' and a margin that is learnt, got "
            f"{anchor!r} with {confidence!r}{learnt}"
        )
    check_background_weight(background_weight)
    if background_weight == 0:
        raise InputError("expected a background_weight > 0, got 0; leave the background's rows out")
    for name, value, least in (("penalty", penalty, 0.0), ("C", C, 1e-30)):
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value) and value >= least):
            raise InputError(f"expected a finite {name} {'> 0' if least else '>= 0'}, got {value!r}")
    if solver not in ("lbfgs", "sgd"):
        raise InputError(f"expected solver 'lbfgs' or 'sgd', got {solver!r}")
    unknown = [name for name in recipe if solver != "sgd" or name not in RECIPE]
    if unknown:
        raise InputError(f"expected options of fit, or with solver='sgd' {some(RECIPE, 10)}, got {some(unknown)}")
    if solver == "sgd" and (cross_fit or anchor != "zero" or penalty is not None):
        raise InputError(
            "expected solver='sgd' without cross_fit, anchor and penalty, which the paper's recipe does not have; use "
            "weight_decay, or solver='lbfgs'"
        )


def _require_teachers(
    classifier: nn.Module | str, cross_fit: int, calibration_features: Features | None, C: float | None
) -> None:
    """Refuse what can't be trained anew for the folds."""
    if cross_fit and isinstance(classifier, ZeroShotClassifier):
        raise InputError(
            "expected cross_fit=0 for a zero-shot classifier: no example taught it, so that all of its scores are of "
            f"examples that it has not seen, got cross_fit={cross_fit}"
        )
    if cross_fit and calibration_features is not None:
        raise InputError("expected either cross_fit or calibration_features, got both; set cross_fit=0")
    if C is not None and not cross_fit and not isinstance(classifier, str):
        raise InputError(
            f"expected no C for a classifier that is not trained here, got {C}; leave it out, or cross_fit > 0"
        )


def _require_margin_scale(scale: Tensor | None, classes: int, solver: str) -> None:
    if scale is None:
        return
    if solver == "sgd":
        raise InputError("expected no margin_scale with solver='sgd', which has no penalty; leave it out")
    if scale.shape != (classes,) or not (scale.isfinite() & (scale > 0)).all():
        raise InputError(f"expected {classes} positive numbers as margin_scale, got {some(scale.flatten().tolist())}")


def require_fit(classifier: nn.Module, features: Features) -> None:
    """Refuse a classifier, without a calibration, that can't be calibrated or is not of these features and classes."""
    if calibrated_form(type(classifier)) is None or isinstance(classifier, nn.Conv2d):
        raise InputError(
            f"expected a linear or cosine classifier of features (N, d), got {type(classifier).__name__}; for "
            "your own, see disalign.Calibrated"
        )
    width, outputs = sizes(classifier)
    expected = len(features.class_counts) + features.background
    if (width, outputs) != (features.x.shape[-1], expected):
        raise InputError(
            f"expected a classifier of {features.x.shape[-1]} features and {expected} outputs for {features!r}, got "
            f"{width} and {outputs}; give Features the class_counts of all classes"
        )
