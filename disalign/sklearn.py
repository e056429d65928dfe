"""A scikit-learn estimator: a linear or cosine probe on features, calibrated by DisAlign."""

import numbers
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from .errors import InputError
from .features import Features, as_tensor
from .fitting import fit
from .modules import plain_classifier


class DisAlignClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A classifier of features for long-tailed data: stage one and its calibration (:func:`disalign.fit`).

    Args:
        rho: scale of eq. 11; 1 aims at class-balanced accuracy, 0 at the training set's own distribution.
        cross_fit: folds whose scores teach the calibration, each by a classifier that has not seen them; 0 for stage
            one's own scores, which are uninformative if it has memorised its training set. At most as many folds as
            examples.
        anchor: ``"logit_adjust"`` or ``"zero"``, what the margin is pulled to; the former for ``confidence="one"``.
        confidence: ``"one"``, or ``"learnt"`` as in the paper.
        classifier: ``"linear"``, ``"cosine"``, or a fitted one: an ``nn.Linear`` or :class:`disalign.CosineClassifier`
            whose outputs are the sorted classes, or a linear classifier of scikit-learn (within a
            ``sklearn.frozen.FrozenEstimator`` where the estimator is cloned). With ``cross_fit=0`` it is taken as it
            is, otherwise one of its kind is trained anew.
        C: inverse L2 penalty of stage one, as in ``LogisticRegression``; ``None``: the folds choose, or 1 without.
        penalty: of the calibration; ``None``: 0.1 with the anchor of logit adjustment, else 0.01.
        random_state: of the folds, as scikit-learn has it.

    Attributes:
        classes_: (K,) sorted labels.
        n_features_in_: d.
        stage_one_: the torch module from features (n, d), of any floating-point dtype, to stage one's scores (n, K).
        calibrated_: the same with the calibration.
        calibration_: its :class:`disalign.AdaptiveCalibration`.
        fit_report_: its :class:`disalign.FitReport`.

    Examples:
        >>> from disalign.sklearn import DisAlignClassifier
        >>> X, y = [[-1], [0], [1], [2], [-1], [0], [1], [2], [1], [3]], ["common"] * 8 + ["rare"] * 2
        >>> DisAlignClassifier(cross_fit=0).fit(X, y).predict([[0], [2], [3]])
        array(['common', 'rare', 'rare'], dtype='<U6')
    """

    def __init__(
        self,
        rho: float = 1.0,
        *,
        cross_fit: int = 5,
        anchor: str = "logit_adjust",
        confidence: str = "one",
        classifier: Any = "linear",
        C: float | None = None,
        penalty: float | None = None,
        random_state: Any = 0,
    ) -> None:
        self.rho = rho
        self.cross_fit = cross_fit
        self.anchor = anchor
        self.confidence = confidence
        self.classifier = classifier
        self.C = C
        self.penalty = penalty
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "DisAlignClassifier":
        """Train stage one on ``X`` (n, d) and ``y`` (n,) labels of any kind, and calibrate it.

        Raises:
            ValueError: data that scikit-learn refuses, one class alone, or options that do not go together
                (:func:`disalign.fit`).
        """
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"expected examples of 2 classes or more, got one class: {self.classes_[0]}")
        features = Features.from_arrays(X, labels)
        seed = self.random_state
        if not isinstance(seed, numbers.Integral):
            seed = check_random_state(seed).randint(2**31)
        self.calibrated_ = fit(
            features,
            _as_module(self.classifier, self.classes_, features.x),
            self.rho,
            cross_fit=min(self.cross_fit, len(features)),
            anchor=self.anchor,
            confidence=self.confidence,
            penalty=self.penalty,
            C=self.C,
            seed=seed,
        )
        self.stage_one_ = nn.Sequential(_Cast(features.x.dtype), plain_classifier(self.calibrated_))
        self.calibration_ = self.calibrated_.calibration
        self.fit_report_ = self.calibrated_.fit_report
        return self

    def _scores(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        with torch.no_grad():
            return cast(Tensor, self.calibrated_(as_tensor(X).to(self.calibrated_.weight)))

    def decision_function(self, X: Any) -> npt.NDArray[Any]:
        """(n, K) calibrated scores; of two classes (n,) the second's less the first's."""
        scores = self._scores(X).numpy()
        return scores if len(self.classes_) > 2 else scores[:, 1] - scores[:, 0]

    def predict_proba(self, X: Any) -> npt.NDArray[Any]:
        """(n, K) softmax of the scores; under rho 1 of a class-balanced distribution, not the training set's."""
        return self._scores(X).softmax(1).numpy()

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """(n,) the class of the best score."""
        best = self._scores(X).argmax(1)
        return cast(npt.NDArray[Any], self.classes_[best.numpy()])


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _as_module(classifier: Any, classes: npt.NDArray[Any], x: Tensor) -> Any:
    """A classifier for :func:`disalign.fit`, whatever it is given as, in the features' dtype."""
    if isinstance(classifier, str):
        return classifier
    if isinstance(classifier, nn.Module):
        return plain_classifier(classifier).to(x.dtype)
    rows = 1 if len(classes) == 2 else len(classes)  # of two classes scikit-learn scores the second alone
    weight, known = (np.asarray(getattr(classifier, name, None)) for name in ("coef_", "classes_"))
    if weight.shape != (rows, x.shape[1]) or not np.array_equal(known, classes):
        raise InputError(
            "expected 'linear', 'cosine', a module, or a fitted linear classifier of scikit-learn with a row of coef_ "
            f"for each of the same classes, got {type(classifier).__name__}"
        )
    coefficients = torch.as_tensor(weight, dtype=x.dtype)
    bias = torch.as_tensor(np.broadcast_to(classifier.intercept_, (rows,)).copy(), dtype=x.dtype)
    if rows == 1:
        coefficients, bias = (torch.cat([torch.zeros_like(value), value]) for value in (coefficients, bias))
    module = nn.Linear(x.shape[1], len(classes), dtype=x.dtype)
    with torch.no_grad():
        module.weight.copy_(coefficients)
        module.bias.copy_(bias)
    return module
