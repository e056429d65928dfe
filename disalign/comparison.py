"""Related methods on the same features in one table; nothing is chosen on the evaluated data.

:func:`compare` does all of it for classification. Hosts of other tasks take its parts: :func:`candidates` learns from
features, the host evaluates each candidate, :func:`run_record`, :func:`comparison` and :func:`table` put the figures
together.
"""

import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from platform import python_version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import methods
from .collecting import rank_and_number
from .errors import InputError, some
from .features import Features
from .fitting import TRAIN_ACCURACY, fit, require_fit, require_options
from .methods import require_examples_as_rows
from .modules import AdaptiveCalibration, Calibrated, plain_classifier, sizes, with_calibration
from .probes import accuracy, new_classifier, train_classifier
from .report import gain, shown, text_table, without_nan
from .solver import Part
from .splits import group_means, many_medium_few

log = logging.getLogger("disalign")

RHOS = (0.5, 0.8, 1.0, 1.2, 1.5)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
#: Parts of the way from stage one to DisAlign; :meth:`AdaptiveCalibration.strength`.
DIAL = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
#: Of the expected calibration error and of the learnt confidence's histogram.
BINS = 15
#: Of all classes; a group's figure has the group's name.
FIGURES = {"average", "balanced", "mIoU", "ece", "nll"}


@dataclass(frozen=True)
class Problem:
    """Input of a method: features of a training set, and stage one's classifier.

    ``image_counts`` are (K,) training images with each class, where ``features.class_counts`` count something else;
    ``C`` is the inverse L2 penalty of classifiers that are trained anew; ``None``: 1, and of cross-fitting the one that
    its folds choose.
    """

    features: Features
    classifier: nn.Module
    rho: float = 1.2
    background_weight: float | str = 1.0
    image_counts: Tensor | None = None
    seed: int = 0
    zero_count: str = "error"
    C: float | None = None

    @property
    def task(self) -> str:
        if self.features.background:
            return "detection"
        return "classification" if self.features.bilinear is None else "segmentation"

    @property
    def train_accuracy(self) -> float:
        """The classifier's on the features, averaged over the classes, in percent."""
        return accuracy([Part(self.classifier, self.features)])

    def fitted(self, rho: float, **options: Any) -> Calibrated:
        found = fit(self.features, self.classifier, rho, **options, **self.options)
        return cast(Calibrated, found)

    @property
    def options(self) -> dict[str, Any]:
        """Of :func:`disalign.fit`."""
        return {"background_weight": self.background_weight, "zero_count": self.zero_count, "seed": self.seed}


@dataclass(frozen=True)
class Method:
    """One way to a classifier.

    Attributes:
        title: for tables.
        learn: from a problem and the setting to a classifier, or to a calibration of confidence one.
        setting: what ``grid`` is of: ``"rho"``, ``"tau"``, ``"strength"``, ``"gamma"``; empty if there is none.
        value: the setting's default; ``None``: the problem's rho.
        grid: what a validation split may choose from.
        refused: task -> why the method makes no sense there.
        needs: training ``"examples"`` or ``"images"`` of each class; empty if it works without.
        probabilities: whether the softmax of its scores is meant as probabilities.
    """

    title: str
    learn: Callable[[Problem, float], nn.Module]
    setting: str = ""
    value: float | None = 0.0
    grid: Sequence[float] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    probabilities: bool = True


def _fit(**options: Any) -> Callable[[Problem, float], nn.Module]:
    return lambda problem, rho: problem.fitted(rho, **options)


def _shrunk(problem: Problem, rho: float) -> nn.Module:
    found = problem.fitted(rho, confidence="one", anchor="logit_adjust", penalty=0.01)
    return with_calibration(found, methods.shrink(found.calibration, problem.features.class_counts, rho))


_NO_ROWS = {
    "detection": "its background is a sample of proposals, and boxes are scored by the frozen classifier",
    "segmentation": "a row is a pixel interpolated from four cells, not an example",
}
_ANCHORED = {"confidence": "one", "anchor": "logit_adjust"}

#: Name -> method; the functions of :mod:`disalign.methods` say what each is, and where it comes from.
METHODS = {
    "stage_one": Method("stage one", lambda problem, _: plain_classifier(problem.classifier)),
    "logit_adjust": Method(
        "logit adjustment",
        lambda problem, strength: methods.logit_adjust(
            problem.classifier, problem.features.class_counts, strength, zero_count=problem.zero_count
        ),
        "strength",
        1.0,
        STRENGTHS,
    ),
    "tau_normalize": Method(
        "tau-normalisation",
        lambda problem, tau: methods.tau_normalize(problem.classifier, tau, problem.features.background),
        "tau",
        1.0,
        (0.25, 0.5, 0.75, 1.0),
    ),
    "norcal": Method(
        "NorCal",
        lambda problem, gamma: methods.norcal(problem.classifier, cast(Tensor, problem.image_counts), gamma),
        "gamma",
        0.6,
        refused=dict.fromkeys(
            ("classification", "segmentation"), "it spares a background; without one it is logit_adjust"
        ),
        needs="images",
    ),
    "vs": Method(
        "VS",
        lambda problem, gamma: methods.vs(problem.classifier, problem.features.class_counts, gamma=gamma),
        "gamma",
        0.15,
        (0.0, 0.05, 0.1, 0.15, 0.2),
        needs="examples",
    ),
    "rebalance": Method(
        "mean prediction",
        lambda problem, _: methods.rebalance(problem.classifier, problem.features.x, problem.features.weights),
        refused={task: f"it asks for the mean prediction over examples, but {why}" for task, why in _NO_ROWS.items()},
    ),
    "lws": Method(
        "LWS",
        lambda problem, rho: methods.lws(problem.features, problem.classifier, rho, **problem.options),
        "rho",
        None,
        RHOS,
    ),
    "marc": Method(
        "MARC",
        lambda problem, rho: methods.marc(problem.features, problem.classifier, rho, **problem.options),
        "rho",
        None,
        RHOS,
    ),
    "crt": Method(
        "cRT",
        lambda problem, rho: methods.crt(problem.features, problem.classifier, rho, problem.C or 1.0),
        "rho",
        None,
        RHOS,
        _NO_ROWS,
    ),
    "ncm": Method(
        "nearest mean, cosine",
        lambda problem, _: methods.nearest_mean(problem.features),
        refused=_NO_ROWS,
        probabilities=False,
    ),
    "ncm_l2": Method(
        "nearest mean, L2",
        lambda problem, _: methods.nearest_mean(problem.features, "l2"),
        refused=_NO_ROWS,
        probabilities=False,
    ),
    "vector_scaling": Method(
        "vector scaling, rho 0",
        lambda problem, _: methods.vector_scaling(problem.features, problem.classifier, **problem.options),
    ),
    "rho_0": Method("DisAlign, rho 0", lambda problem, _: problem.fitted(0.0)),
    "disalign_magnitude": Method("DisAlign, magnitude alone", _fit(learn_margin=False), "rho", None, RHOS),
    "disalign_margin": Method("DisAlign, margin alone", _fit(learn_magnitude=False), "rho", None, RHOS),
    "disalign_one": Method("DisAlign, confidence one", _fit(confidence="one"), "rho", None, RHOS),
    "disalign": Method("DisAlign", _fit(), "rho", None, RHOS),
    "disalign_anchor": Method("DisAlign, anchored", _fit(**_ANCHORED), "rho", None, RHOS),
    "disalign_shrunk": Method("DisAlign, shrunk", _shrunk, "rho", None, RHOS, needs="examples"),
    "disalign_cross_fit": Method(
        "DisAlign, cross-fitted",
        lambda problem, rho: problem.fitted(rho, cross_fit=5, C=problem.C, **_ANCHORED),
        "rho",
        None,
        RHOS,
        refused=_NO_ROWS,
    ),
}
METHODS["bound"] = Method(
    "empirical bound (balanced data)",
    lambda problem, _: methods.crt(problem.features, problem.classifier, 0.0),
    refused=dict.fromkeys(
        ("classification", "segmentation", "detection"),
        "it asks for a class-balanced training set: compare(..., balanced=FEATURES)",
    ),
)
#: The controls that every comparison has.
ALWAYS = ("stage_one", "logit_adjust", "rho_0")
#: Compared where none are named, if the task and the classifier allow it; seconds each.
DEFAULT = (
    *("stage_one", "logit_adjust", "tau_normalize", "lws", "crt", "ncm"),
    *("rho_0", "disalign", "disalign_anchor"),
)


def chosen_methods(
    names: Sequence[str] | None, task: str, cosine: bool, counts: Mapping[str, Tensor | None] | None = None
) -> list[str]:
    """The methods to compare, in the order of :data:`METHODS`, with the controls of :data:`ALWAYS`.

    Args:
        names: of :data:`METHODS`; ``None`` for those of :data:`DEFAULT` that make sense, ``["all"]`` for all that do.
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``.
        cosine: whether the classifier is a cosine one.
        counts: (K,) training ``"examples"`` and ``"images"``, as far as they are counted by now. A method that needs
            some of each class is then logged and left out, or refused if it was named.

    Raises:
        InputError: an unknown name, or a method that makes no sense here.
    """
    named = [] if names is None or list(names) == ["all"] else list(names)
    unknown = [name for name in named if name not in METHODS]
    if unknown:
        raise InputError(f"expected methods among {some(METHODS, len(METHODS))}, got {some(unknown)}")
    for name in named:
        if why := _refusal(name, task, cosine) or _missing(name, counts or {}):
            raise InputError(f"expected methods that make sense for {task}, got {name!r}: {why}")
    wanted = {*ALWAYS, *(named or (DEFAULT if names is None else METHODS))}
    sensible = [name for name in METHODS if name in wanted and not _refusal(name, task, cosine)]
    missing = {name: why for name in sensible if (why := _missing(name, counts or {}))}
    for name, why in missing.items():
        log.warning("%s is left out: %s", name, why)
    return [name for name in sensible if name not in missing]


def _refusal(name: str, task: str, cosine: bool) -> str | None:
    if cosine and name in ("tau_normalize", "marc"):
        return "the norms of a cosine classifier's weights have no influence"
    return METHODS[name].refused.get(task)


def _missing(name: str, counts: Mapping[str, Tensor | None]) -> str | None:
    needs = METHODS[name].needs
    if needs not in counts:
        return None
    found = counts[needs]
    if found is not None and found.all():
        return None
    none = "an unknown number" if found is None else f"none for class {some((found == 0).nonzero().flatten().tolist())}"
    return f"it needs training {needs} of each class, and there are {none}"


@dataclass(frozen=True)
class Candidate:
    """A classifier to evaluate.

    ``role`` is ``"method"``, ``"dial"`` (a part of the way to DisAlign) or ``"sweep"`` (DisAlign at another rho), of
    which ``value`` is the setting.
    """

    name: str
    classifier: nn.Module
    value: float
    seconds: float
    method: Method
    role: str = "method"

    @property
    def calibration(self) -> AdaptiveCalibration:
        """Of the classifier; the identity where it has none of its own."""
        if isinstance(self.classifier, Calibrated):
            return self.classifier.calibration
        width, outputs = sizes(self.classifier)
        return AdaptiveCalibration(outputs, width, confidence="one")


def learnt(name: str, problem: Problem, value: float) -> Candidate:
    """A method's classifier for a setting, frozen."""
    begun = time.perf_counter()
    found = METHODS[name].learn(problem, value)
    seconds = time.perf_counter() - begun
    if isinstance(found, AdaptiveCalibration):
        found = with_calibration(problem.classifier, found)
    return Candidate(name, found.requires_grad_(False).eval(), value, seconds, METHODS[name])


def setting_of(name: str, problem: Problem) -> float:
    value = METHODS[name].value
    return problem.rho if value is None else value


def candidates(
    problem: Problem,
    names: Sequence[str],
    settings: Mapping[str, float] | None = None,
    dial: Sequence[float] = DIAL,
    sweep: Sequence[float] = (),
) -> tuple[list[Candidate], list[str]]:
    """Learn all that a comparison evaluates.

    Args:
        problem: what to learn from.
        names: see :func:`chosen_methods`.
        settings: method -> setting, for those that are not at their default.
        dial: parts of the way to DisAlign, see :meth:`AdaptiveCalibration.strength`; without DisAlign there are none.
        sweep: other rho of DisAlign.

    Returns:
        The candidates, methods first; and what :func:`disalign.fit` warned of, each once.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        values = {name: (settings or {}).get(name, setting_of(name, problem)) for name in names}
        found = [learnt(name, problem, value) for name, value in values.items()]
        full = next((one for one in found if one.name == "disalign"), None)
        if full is not None:
            for t in dial:
                dialled = with_calibration(full.classifier, full.calibration.strength(t))
                found.append(replace(full, classifier=dialled.requires_grad_(False).eval(), value=t, role="dial"))
            found += [replace(learnt("disalign", problem, rho), role="sweep") for rho in sweep]
    return found, list(dict.fromkeys(str(one.message) for one in told if issubclass(one.category, UserWarning)))


class Tally:
    """Figures of scores and labels, added up a batch at a time: accuracy, IoU, groups, calibration error, likelihood.

    Args:
        num_classes: K.
        groups: name -> (K,) bool.
        probabilities: whether the softmax of the scores is meant as probabilities.
    """

    def __init__(self, num_classes: int, groups: Mapping[str, Tensor], probabilities: bool = True) -> None:
        group_means(torch.zeros(num_classes), groups)  # refuses groups of another number of classes
        if taken := FIGURES & groups.keys():
            raise InputError(f"expected groups of other names than the figures, got {some(sorted(taken))}; rename them")
        self.groups = groups
        self.probabilities = probabilities
        member = torch.full((num_classes,), len(groups))
        for number, members in enumerate(groups.values()):
            member[members] = number
        self._member = member
        self.hits, self.seen, self.predicted = (torch.zeros(num_classes, dtype=torch.float64) for _ in range(3))
        self.confusion = torch.zeros(len(groups) + 1, len(groups) + 1, dtype=torch.float64)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)
        self.confidence = torch.zeros(2, BINS, dtype=torch.float64)
        self.loss = 0.0

    def add(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """(n, K) scores, (n,) labels in [0, K) and (n,) weights, 1 by default, on any one device.

        Raises:
            InputError: scores of another number of classes, or whose largest is NaN or infinite.
        """
        classes, groups = len(self.seen), len(self.confusion)
        if scores.shape[1] != classes:
            raise InputError(f"expected scores of {classes} classes, got {scores.shape[1]}; give another classifier")
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        highest, best = scores.amax(1), scores.argmax(1)
        if not highest.isfinite().all():
            raise InputError("expected finite scores to evaluate, got NaN or infinity; is the classifier finite?")
        weights = torch.ones_like(labels, dtype=torch.float64) if weights is None else weights.double()
        right = weights * (best == labels)
        for summed, chosen, counted in (
            (self.hits, labels, right),
            (self.seen, labels, weights),
            (self.predicted, best, weights),
        ):
            summed += torch.bincount(chosen, counted, minlength=classes).cpu()
        member = self._member.to(labels.device)
        pairs = torch.bincount(member[labels] * groups + member[best], weights, minlength=groups**2)
        self.confusion += pairs.reshape(groups, groups).cpu()
        if not self.probabilities:
            return
        logs = scores.logsumexp(1)
        confidence = (highest - logs).exp()
        self.bins += _binned(confidence, weights, weights * confidence, right)
        self.loss += float(((logs - scores.gather(1, labels[:, None])[:, 0]) * weights).sum())

    def add_confidence(self, confidence: Tensor, weights: Tensor | None = None) -> None:
        """Learnt confidences in [0, 1] (:meth:`AdaptiveCalibration.confidence_score`), and as many weights."""
        confidence = confidence.flatten().double()
        weights = torch.ones_like(confidence) if weights is None else weights.double()
        self.confidence += _binned(confidence, weights, weights * confidence)

    def per_class(self) -> dict[str, list[float]]:
        """Percent of each class, NaN where there is no example: accuracy and IoU."""
        seen = torch.where(self.seen > 0, self.seen, math.nan)
        union = seen + self.predicted - self.hits
        return {"accuracy": (100 * self.hits / seen).tolist(), "iou": (100 * self.hits / union).tolist()}

    def figures(self) -> dict[str, float | None]:
        """Percent but for ``nll``, in nats; ``None`` where there is none."""
        per_class, number = self.per_class(), float(self.seen.sum()) or 1.0
        accuracy, iou = (torch.tensor(values) for values in per_class.values())
        found: dict[str, float | None] = {
            "average": 100 * float(self.hits.sum()) / number,
            "balanced": float(accuracy.nanmean()),
            "mIoU": float(iou.nanmean()),
            **group_means(accuracy, self.groups),
            **{f"mIoU.{name}": value for name, value in group_means(iou, self.groups).items()},
            "ece": None,
            "nll": None,
        }
        if self.probabilities:
            found |= {"ece": 100 * float((self.bins[1] - self.bins[2]).abs().sum()) / number, "nll": self.loss / number}
        return found

    def details(self) -> dict[str, Any]:
        """For the report: where each group's examples go and, of the bins, mean probability and accuracy, in percent.

        With :meth:`add_confidence` the learnt confidence's histogram over [0, 1] and its mean, too.
        """
        number, confidence, right = self.bins
        told = number.clamp(min=1e-300)
        rows = self.confusion[: len(self.groups), : len(self.groups)]
        found: dict[str, Any] = {"confusion": (100 * rows / rows.sum(1, keepdim=True)).tolist()}
        if self.probabilities:
            found["reliability"] = {
                "count": number.tolist(),
                "confidence": torch.where(number > 0, 100 * confidence / told, math.nan).tolist(),
                "accuracy": torch.where(number > 0, 100 * right / told, math.nan).tolist(),
            }
        count, summed = self.confidence
        if count.any():
            found["confidence"] = {"count": count.tolist(), "mean": float(summed.sum() / count.sum())}
        return found


def _binned(confidence: Tensor, *values: Tensor) -> Tensor:
    """(V, BINS) sums of V values of confidences in [0, 1], in bins of equal width."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    return torch.stack([torch.bincount(place, one, minlength=BINS) for one in values]).cpu()


def evaluated(candidate: Candidate, figures: Mapping[str, Any], **details: Any) -> dict[str, Any]:
    """A candidate's part of :func:`run_record`: what it is, its ``figures``, and details such as ``per_class``."""
    method = candidate.method
    record: dict[str, Any] = {"figures": dict(figures), **details}
    if candidate.role == "method":
        record |= {"title": method.title, "setting": {method.setting: candidate.value} if method.setting else {}}
        record |= {"seconds": candidate.seconds}
        if isinstance(candidate.classifier, Calibrated):
            calibration = candidate.calibration
            record |= {"magnitude": calibration.magnitude.tolist(), "margin": calibration.margin.tolist()}
    return {"name": candidate.name, "role": candidate.role, "value": candidate.value, **record}


def run_record(found: Iterable[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """One stage one's part of :func:`comparison`: the methods by name, and the curves of the dial and the sweep."""
    found = [dict(one) for one in found]
    named = {one["name"]: one for one in found if one["role"] == "method"}
    curves = {
        role: [{"value": one["value"], "figures": one["figures"]} for one in found if one["role"] == role]
        for role in ("dial", "sweep")
    }
    methods_ = {
        name: {key: one[key] for key in one if key not in ("name", "role", "value")} for name, one in named.items()
    }
    return {**facts, "methods": methods_, **curves}


def comparison(runs: Sequence[Mapping[str, Any]], columns: Mapping[str, str], **facts: Any) -> dict[str, Any]:
    """All runs (stage ones) of a comparison, ready for JSON.

    Args:
        runs: of :func:`run_record`.
        columns: figure -> its title, for the table; the first is the one that gains are told in.
        facts: ``task``, ``dataset``, ``split``, ``classes``, ``class_counts``, ``groups`` and the like.
    """
    versions = {"python": python_version(), "torch": torch.__version__, "numpy": np.__version__}
    content = {**facts, "unit": "percent", "columns": dict(columns), "runs": list(runs), "versions": versions}
    content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return cast(dict[str, Any], without_nan(content))


def merged(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Comparisons from several stage ones of the same training set as one.

    Raises:
        InputError: class counts that differ.
    """
    if any(one["class_counts"] != contents[0]["class_counts"] for one in contents):
        raise InputError("expected comparisons of the same class counts, got others; compare each by itself")
    return {**contents[0], "runs": [run for one in contents for run in one["runs"]]}


def compare(
    train: Features,
    test: Features,
    classifier: nn.Module | str = "linear",
    methods: Sequence[str] | None = None,
    *,
    rho: float = 1.2,
    groups: Mapping[str, Tensor] | None = None,
    validation: Features | None = None,
    balanced: Features | None = None,
    others: Mapping[str, nn.Module] | None = None,
    dial: Sequence[float] = DIAL,
    sweep: Sequence[float] = (),
    zero_count: str = "error",
    C: float | None = None,
    seed: int = 0,
    **facts: Any,
) -> dict[str, Any]:
    """Compare related methods on features of the same trunk; :func:`table` prints the result.

    Nothing is chosen on ``test``: settings are the defaults of :data:`METHODS`, or those of them and its grids whose
    balanced accuracy on ``validation`` is best.

    Args:
        train, test: features of the training and the evaluation set, without a background; rows count by their
            weights.
        classifier: stage one's; or ``"linear"``, ``"cosine"`` to train one on ``train`` first.
        methods: see :func:`chosen_methods`.
        rho: of all methods that learn with eq. 11.
        groups: name -> (K,) bool; default: :func:`disalign.many_medium_few` of the training set's counts.
        validation: features of a split that is neither.
        balanced: features of a class-balanced training set; adds the empirical bound (Sec. 3.1), the classifier
            trained anew on them.
        others: title -> classifier of the same features and classes, learnt elsewhere: a trained stage two, say.
        dial, sweep: see :func:`candidates`.
        C: inverse L2 penalty of classifiers that are trained here, stage one's and methods'. Default: 1, and for
            ``disalign_cross_fit`` the one whose held-out folds lose least.
        zero_count, seed: :func:`disalign.fit`'s.
        facts: more to keep, ``classes`` (names), ``dataset``, ``split``, ``stage_one`` and the like.

    Returns:
        :func:`comparison`'s; ``per_class`` accuracy, reliability and the confusion of groups for each method;
        ``train``, stage one's figures on its training set, for each run.

    Raises:
        InputError: features that do not belong together, a classifier that does not fit them, an unknown method, or one
            that makes no sense; or several processes of torch.distributed, which share the rows.

    Examples:
        >>> x, y = torch.tensor([-1.0, 0, 1, 2, -1, 0, 1, 2, 1, 3])[:, None], [0] * 8 + [1] * 2
        >>> train = disalign.Features.from_arrays(x, y)
        >>> test = disalign.Features.from_arrays(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), [0, 0, 1, 1])
        >>> (run,) = disalign.compare(train, test, methods=["disalign"], rho=1.0)["runs"]
        >>> {name: method["figures"]["balanced"] for name, method in run["methods"].items()}
        {'stage_one': 75.0, 'logit_adjust': 100.0, 'rho_0': 75.0, 'disalign': 100.0}
    """
    if (number := rank_and_number()[1]) > 1:
        raise InputError(f"expected one process for a comparison, got {number} of torch.distributed; compare in one")
    if any(one is not None and one.background for one in (train, test, validation, balanced)):
        raise InputError("expected features without a background, got a detector's; use python -m disalign_d2.compare")
    if taken := METHODS.keys() & (others or {}):
        raise InputError(f"expected titles of others that name no method, got {some(taken)}; choose others")
    require_options(C=C)
    if isinstance(classifier, str):
        require_examples_as_rows(train)
        base = new_classifier(classifier, train)
        train_classifier(base, train, 1.0 if C is None else C)
    else:
        base = plain_classifier(classifier)
    for one in (base, *(others or {}).values()):
        require_fit(plain_classifier(one), train)
    problem = Problem(train, base, rho, seed=seed, zero_count=zero_count, C=C)
    names = chosen_methods(methods, problem.task, hasattr(base, "scale"), {"examples": train.class_counts})
    for what, features in (("test", test), ("validation", validation), ("balanced", balanced)):
        if features is not None and (features.x.shape[1:], len(features.class_counts)) != (
            train.x.shape[1:],
            len(train.class_counts),
        ):
            raise InputError(f"expected {what} features like {train!r}, got {features!r}; give both class_counts")
    groups = many_medium_few(train.class_counts) if groups is None else groups
    Tally(len(train.class_counts), groups)  # refuses groups before anything is learnt
    settings, how = {}, "defaults"
    if validation is not None:
        settings, how = choose(problem, names, validation), f"best balanced accuracy on {len(validation)} others"
    found, notes = candidates(problem, names, settings, dial, sweep)
    if balanced is not None:
        found.append(learnt("bound", Problem(balanced, base), 0.0))
    for title, module in (others or {}).items():
        method = replace(METHODS["stage_one"], title=title)  # nothing is learnt here either
        found.append(Candidate(title, copy.deepcopy(module).eval(), 0.0, math.nan, method))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    tallies = tally(found, test, groups)
    records = [
        evaluated(one, told.figures(), per_class={"accuracy": told.per_class()["accuracy"]}, **told.details())
        for one, told in zip(found, tallies, strict=True)
    ]
    run_facts = {name: facts.pop(name, None) for name in ("stage_one", "pass_seconds")} | {"seed": seed, "notes": notes}
    run_facts["train"] = tally([learnt("stage_one", problem, 0.0)], train, groups)[0].figures()
    columns = {
        "average": "average",
        **{name: name for name in groups},
        "balanced": "balanced",
        "ece": "ECE",
        "nll": "NLL",
    }
    return comparison(
        [run_record(records, **run_facts)],
        columns,
        task=problem.task,
        rho=rho,
        settings=how,
        examples=len(test),
        class_counts=train.class_counts.tolist(),
        group_of=group_names(groups),
        **facts,
    )


def choose(problem: Problem, names: Sequence[str], validation: Features) -> dict[str, float]:
    """For each method with a grid: of it and the default, the setting of best balanced accuracy on a split."""
    best = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name in names:
            if METHODS[name].grid:
                settings = sorted({*METHODS[name].grid, setting_of(name, problem)})
                tried = [learnt(name, problem, value) for value in settings]
                scores = [cast(float, told.figures()["balanced"]) for told in tally(tried, validation, {})]
                best[name] = tried[int(np.argmax(scores))].value
    return best


@torch.no_grad()
def tally(found: Sequence[Candidate], features: Features, groups: Mapping[str, Tensor]) -> list[Tally]:
    """Figures of all candidates on features, each in the dtype and on the device of its classifier."""
    classes = len(features.class_counts)
    tallies = [Tally(classes, groups, one.method.probabilities) for one in found]
    for one, told in zip(found, tallies, strict=True):
        calibration = one.calibration
        for chunk in Part(one.classifier, features).chunks():
            told.add(chunk.scores(one.classifier), chunk.y, chunk.weights)
            if calibration.confidence is not None and one.role == "method":
                told.add_confidence(chunk.scores(calibration.confidence_score), chunk.weights)
    return tallies


def group_names(groups: Mapping[str, Tensor]) -> list[str | None]:
    """(K,) the group of each class."""
    members = {name: chosen.tolist() for name, chosen in groups.items()}
    classes = len(next(iter(members.values()), []))
    return [next((name for name in members if members[name][label]), None) for label in range(classes)]


def table(content: Mapping[str, Any]) -> str:
    """A :func:`comparison` as text: a row for each method, mean +- standard deviation over several runs.

    Examples:
        >>> x, y = torch.tensor([-1.0, 0, 1, 2, -1, 0, 1, 2, 1, 3])[:, None], [0] * 8 + [1] * 2
        >>> train = disalign.Features.from_arrays(x, y)
        >>> test = disalign.Features.from_arrays(torch.arange(-1.0, 5.0)[:, None], [0, 0, 0, 1, 1, 1])
        >>> content = disalign.compare(train, test, methods=["disalign"], rho=1.0, groups={})
        >>> print(disalign.comparison.table(content))
                             setting  average  balanced   ECE   NLL   gain    s
        ----------------  ----------  -------  --------  ----  ----  -----  ---
        stage one                        83.3      83.3  26.7  0.37   +0.0  ...
        logit adjustment  strength 1    100.0     100.0  23.0  0.28  +16.7  ...
        DisAlign, rho 0                  83.3      83.3  10.7  0.30   +0.0  ...
        DisAlign               rho 1    100.0     100.0  19.3  0.23  +16.7  ...
    """
    told = [f"settings: {content['settings']}"]
    if known := [run["train"]["balanced"] for run in content["runs"] if "train" in run]:
        told.append(TRAIN_ACCURACY.format(_spread(known, ".1f")))
    if len(content["runs"]) > 1:
        told.append(f"mean +- standard deviation of {len(content['runs'])} stage ones")
    return f"{text_table(table_rows(content))}\n\n{'; '.join(told)}"


def table_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """The cells of :func:`table`, a header first."""
    runs, columns = content["runs"], content["columns"]
    first = next(iter(columns))
    rows = [["", "setting", *columns.values(), "gain", "s"]]
    for name in dict.fromkeys(name for run in runs for name in run["methods"]):
        present = [run for run in runs if name in run["methods"]]
        own = [run["methods"][name] for run in present]
        gains = [
            gain(run["methods"]["stage_one"]["figures"].get(first), run["methods"][name]["figures"].get(first))
            for run in present
        ]
        cells = [_spread([one["figures"].get(key) for one in own], ".2f" if key == "nll" else ".1f") for key in columns]
        setting = " ".join(
            f"{key} {'/'.join(f'{value:g}' for value in sorted({one['setting'][key] for one in own}))}"
            for key in own[0]["setting"]
        )
        rows.append([own[0]["title"], setting, *cells, _spread(gains, "+z.1f"), shown(own[0]["seconds"])])
    return rows


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return shown(None)
    spread = f" +- {statistics.stdev(known):{form.lstrip('+z')}}" if len(known) > 1 else ""
    return shown(statistics.mean(known), form) + spread
