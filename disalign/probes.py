"""Classifiers trained on features, and ones that have not seen the rows that they score."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .features import Features
from .modules import CosineClassifier, sizes
from .solver import Chunk, Part, Solution, minimise, total, total_and_gradients

#: Inverse L2 penalties among which held-out folds choose, from strong to weak.
GRID = tuple(10.0**power for power in range(-3, 4))
#: Of the gradient, as scikit-learn's LogisticRegression has it: a probe needs no more digits.
TOLERANCE = 1e-4


def new_classifier(like: nn.Module | str, features: Features, rows: Tensor | None = None) -> nn.Module:
    """An untrained classifier for the features, ``"linear"``, ``"cosine"``, or of the kind of another.

    A linear one starts at 0, a cosine one at the mean directions of its classes among ``rows`` (default: all).

    Raises:
        InputError: an unknown kind.
    """
    classes, width = len(features.class_counts) + features.background, features.x.shape[1]
    dtype = torch.promote_types(features.x.dtype, torch.float32)
    kinds = {"linear": nn.Linear(1, 1), "cosine": CosineClassifier(1, 1)}
    model = kinds.get(like) if isinstance(like, str) else like
    device = features.x.device if isinstance(like, str) else next(like.parameters()).device
    classifier: nn.Module
    if isinstance(model, nn.Module) and type(model).forward not in (nn.Linear.forward, CosineClassifier.forward):
        raise InputError(
            f"expected a plain linear or cosine classifier to train anew, got {type(model).__name__}; set cross_fit=0"
        )
    if isinstance(model, nn.Linear):
        classifier = nn.Linear(width, classes, model.bias is not None)
        for parameter in classifier.parameters():
            nn.init.zeros_(parameter)
    elif isinstance(model, CosineClassifier):
        learn_scale = isinstance(model.scale, nn.Parameter)
        classifier = CosineClassifier(width, classes, float(model.scale.detach()), learn_scale)
        with torch.no_grad():
            classifier.weight.copy_(class_means(features, classes, rows, directions=True))
    else:
        raise InputError(f"expected a classifier 'linear' or 'cosine', or a module of one of these kinds, got {like!r}")
    return classifier.to(device, dtype)


def class_means(features: Features, classes: int, rows: Tensor | None = None, directions: bool = False) -> Tensor:
    """(K, d) mean feature of each class by the rows' weights, or its mean direction; fp64, 0 without examples."""
    sums, weights = torch.zeros(classes, features.x.shape[1], dtype=torch.float64), torch.zeros(classes).double()
    for chosen in (torch.arange(len(features)) if rows is None else rows).split(4096):
        x, y, weight = features.x[chosen].cpu().double(), features.y[chosen], features.weights[chosen]
        sums.index_add_(0, y, F.normalize(x, dim=1) if directions else x * weight[:, None])
        weights.index_add_(0, y, weight)
    return F.normalize(sums, dim=1) if directions else sums / weights.clamp(min=1e-300)[:, None]


def train_classifier(classifier: nn.Module, features: Features, C: float, rows: Tensor | None = None) -> Solution:
    """Multinomial logistic regression from the classifier's present state, in place.

    The objective is scikit-learn's over C N: mean cross-entropy + |W|^2 / (2 C N), the bias without penalty; for a
    cosine classifier, whose rows have the norm of its scale, K scale^2 stands for |W|^2.

    Args:
        classifier: linear or cosine.
        features: all, of which ``rows`` (n,) int64 are trained on.
        C: inverse L2 penalty.
    """
    part = Part(classifier, features, rows)
    seen = float(features.weights.sum() if rows is None else features.weights[rows].sum())
    parameters = list(classifier.parameters())

    def loss(classifier: nn.Module, chunk: Chunk) -> Tensor:
        return _cross_entropy(classifier, chunk) / seen

    def penalty(values: Sequence[Tensor]) -> Tensor:
        if isinstance(classifier, CosineClassifier):
            # Where the scale is fixed there is nothing to penalise: the norms of the rows have no say.
            squares = sizes(classifier)[1] * values[1].square() if len(values) > 1 else 0 * values[0].sum()
        else:
            squares = values[0].square().sum()
        return squares / (2 * C * seen)

    return minimise(parameters, lambda: total_and_gradients([part], loss, parameters), penalty, TOLERANCE)


def units(features: Features) -> tuple[Tensor, Tensor]:
    """Of each row the number of its unit, what no fold splits; and the label of each unit: its rarest class."""
    if features.groups is None:
        return torch.arange(len(features)), features.y
    _, unit = features.groups.unique(return_inverse=True)
    by_rarity = torch.bincount(features.y).argsort(stable=True)
    rank = by_rarity.argsort()[features.y]
    rarest = torch.zeros(int(unit.max()) + 1, dtype=torch.int64).scatter_reduce_(
        0, unit, rank, "amin", include_self=False
    )
    return unit, by_rarity[rarest]


def units_per_class(features: Features, classes: int) -> Tensor:
    """(K,) units with a row of the class."""
    pairs = torch.stack([units(features)[0], features.y]).unique(dim=1)
    return torch.bincount(pairs[1], minlength=classes)


def stratified_folds(features: Features, folds: int, seed: int = 0) -> Tensor:
    """(N,) fold of each row: every class, and every fold, is dealt out as evenly as can be; groups stay together."""
    unit, labels = units(features)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    fold = torch.empty(len(labels), dtype=torch.int64)
    fold[by_class] = torch.arange(len(labels)) % folds
    return fold[unit]


def held_out(
    like: nn.Module | str, features: Features, folds: int, C: float | None, seed: int
) -> tuple[list[Part], float]:
    """For each fold's rows a classifier that was trained on the others; and the C that they were trained with.

    Without a given C the one of :data:`GRID` is taken whose held-out rows lose least; a weaker penalty starts where a
    stronger one ended, and the first that loses more is the last tried.
    """
    number = int(units(features)[0].max()) + 1
    if number < folds:
        raise InputError(f"expected {folds} rows or groups for cross_fit={folds}, got {number}; take fewer folds")
    fold = stratified_folds(features, folds, seed)
    rows = [(fold == one).nonzero().flatten() for one in range(folds)]
    rest = [(fold != one).nonzero().flatten() for one in range(folds)]
    classifiers = [new_classifier(like, features, others) for others in rest]
    best: tuple[float, list[Part], float] | None = None
    for tried in GRID if C is None else [C]:
        classifiers = [copy.deepcopy(classifier) for classifier in classifiers]
        for classifier, others in zip(classifiers, rest, strict=True):
            train_classifier(classifier, features, tried, others)
        parts = [Part(classifier, features, own) for classifier, own in zip(classifiers, rows, strict=True)]
        loss = float(total(parts, _cross_entropy))
        if best is not None and loss > best[0]:
            break
        best = loss, parts, tried
    assert best is not None
    return best[1:]


def _cross_entropy(classifier: nn.Module, chunk: Chunk) -> Tensor:
    return (F.cross_entropy(chunk.scores(classifier), chunk.y, reduction="none") * chunk.weights).sum()


def accuracy(parts: Sequence[Part]) -> float:
    """Percent of the rows, by their weights, that their classifiers get right, averaged over the classes that have any.

    A background is no class.
    """
    classes = len(parts[0].features.class_counts)

    def hits(classifier: nn.Module, chunk: Chunk) -> Tensor:
        right = chunk.weights * (chunk.scores(classifier).argmax(1) == chunk.y)
        return chunk.weights.new_zeros(2, classes + 1).index_add_(1, chunk.y, torch.stack([right, chunk.weights]))

    right, rows = total(parts, hits)[:, :classes]
    return 100 * float((right / rows)[rows > 0].mean())
