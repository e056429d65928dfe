"""The estimator in scikit-learn's company."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import disalign
from disalign.modules import plain_classifier
from disalign.sklearn import DisAlignClassifier

NAMES = np.array(["ant", "bee", "cat", "dog"])


def draw(counts=(80, 40, 12, 6), seed=0, spread=1.3):
    random, centres = np.random.default_rng(seed), np.random.default_rng(9).normal(size=(len(counts), 6))
    y = np.repeat(np.arange(len(counts)), counts)
    return centres[y] + spread * random.normal(size=(len(y), 6)), NAMES[y]


@parametrize_with_checks(
    [
        DisAlignClassifier(C=1.0),
        DisAlignClassifier(cross_fit=0, confidence="learnt", anchor="zero"),
        DisAlignClassifier(classifier="cosine", C=1.0),
    ]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_it_is_what_fit_finds():
    X, y = draw()
    found = DisAlignClassifier(C=1.0).fit(X, y)
    features = disalign.Features.from_arrays(X, np.searchsorted(NAMES, y))
    expected = disalign.fit(features, "linear", 1.0, cross_fit=5, anchor="logit_adjust", confidence="one", C=1.0)
    scores = expected(torch.from_numpy(X)).detach()
    assert found.decision_function(X) == pytest.approx(scores.numpy())
    assert found.predict_proba(X) == pytest.approx(scores.softmax(1).numpy())
    assert found.predict(X).tolist() == NAMES[scores.argmax(1)].tolist()
    assert found.calibration_ is found.calibrated_.calibration
    assert found.fit_report_.cross_fit == 5


def test_its_options_are_those_of_fit():
    X, y = draw()
    options = {"cross_fit": 3, "confidence": "learnt", "anchor": "zero", "penalty": 0.3, "C": 0.2}
    found = DisAlignClassifier(0.5, random_state=4, **options).fit(X, y)
    features = disalign.Features.from_arrays(X, np.searchsorted(NAMES, y))
    expected = disalign.fit(features, "linear", 0.5, seed=4, **options)
    assert found.decision_function(X) == pytest.approx(expected(torch.from_numpy(X)).detach().numpy())


def test_of_two_classes_the_second_is_decided_for_above_zero():
    X, y = draw((60, 30))
    found = DisAlignClassifier(C=1.0).fit(X, y)
    decided = found.decision_function(X)
    assert NAMES[(decided > 0).astype(int)].tolist() == found.predict(X).tolist()
    odds = found.predict_proba(X)
    assert decided == pytest.approx(np.log(odds[:, 1] / odds[:, 0]))


def test_it_gains_where_classes_are_rare():
    X, y = draw()
    test, truth = draw((200,) * 4, seed=1)
    found = DisAlignClassifier(C=1.0).fit(X, y)
    own = NAMES[found.stage_one_(torch.from_numpy(test)).argmax(1)]
    assert (found.predict(test) == truth).mean() > (own == truth).mean() + 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stage_one_takes_any_floating_dtype(dtype):
    X, y = draw()
    found = DisAlignClassifier(C=1.0).fit(X.astype(np.float32), y)
    assert found.stage_one_(torch.from_numpy(X).to(dtype)).dtype == torch.float32


def test_a_pipeline_in_a_grid_search():
    X, y = draw()
    pipeline = make_pipeline(StandardScaler(), DisAlignClassifier(C=1.0, cross_fit=3))
    search = GridSearchCV(pipeline, {"disalignclassifier__rho": [0.0, 1.0]}, scoring="balanced_accuracy", cv=3)
    search.fit(X, y)
    plain, balanced = search.cv_results_["mean_test_score"]
    assert plain != balanced
    assert min(plain, balanced) > 0.5


def test_a_fitted_classifier_of_scikit_learn():
    X, y = draw()
    reference = LogisticRegression().fit(X, y)
    found = DisAlignClassifier(classifier=FrozenEstimator(reference), cross_fit=0)
    found = clone(found).fit(X, y)
    scores = found.stage_one_(torch.from_numpy(X)).detach().numpy()
    assert scores == pytest.approx(reference.decision_function(X))
    two = np.isin(y, NAMES[:2])
    reference.fit(X[two], y[two])
    found = DisAlignClassifier(classifier=reference, cross_fit=0).fit(X[two], y[two])
    scores = found.stage_one_(torch.from_numpy(X)).softmax(1).detach().numpy()
    assert scores == pytest.approx(reference.predict_proba(X))


def refused_classifiers():
    X, y = draw()
    return {
        "other classes": LogisticRegression().fit(X, np.char.upper(y)),
        "pairs": SVC(kernel="linear").fit(X, y),
        "a pipeline": make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y),
        "not fitted": LogisticRegression(),
    }


@pytest.mark.parametrize("name", ["other classes", "pairs", "a pipeline", "not fitted"])
def test_a_classifier_that_does_not_score_these_classes_is_refused(name):
    X, y = draw()
    with pytest.raises(disalign.InputError, match="a fitted linear classifier of scikit-learn"):
        DisAlignClassifier(classifier=refused_classifiers()[name], cross_fit=0).fit(X, y)


def test_a_classifier_without_an_intercept():
    X, y = draw()
    two = np.isin(y, NAMES[:2])
    reference = LinearSVC(fit_intercept=False).fit(X[two], y[two])
    found = DisAlignClassifier(classifier=reference, cross_fit=0).fit(X[two], y[two])
    scores = found.stage_one_.eval()(torch.from_numpy(X)).detach().numpy()
    assert scores[:, 1] - scores[:, 0] == pytest.approx(reference.decision_function(X))


@pytest.mark.parametrize("random_state", [None, 3, np.random.RandomState(3)])
def test_random_states(random_state):
    assert DisAlignClassifier(C=1.0, random_state=random_state).fit(*draw()).fit_report_.cross_fit == 5


def test_a_random_state_draws_the_folds():
    X, y = draw()
    seeds = [np.random.RandomState(3).randint(2**31), np.random.RandomState(3), np.random.RandomState(4)]
    one, same, other = (DisAlignClassifier(C=1.0, random_state=seed).fit(X, y).decision_function(X) for seed in seeds)
    assert (one == same).all()
    assert not (one == other).all()


def test_a_fitted_module_of_another_dtype():
    X, y = draw()
    given = nn.Linear(6, 4)
    found = DisAlignClassifier(classifier=given, cross_fit=0).fit(X, y)
    assert found.stage_one_(torch.from_numpy(X)).dtype == torch.float64
    assert given.weight.dtype == torch.float32


def test_a_fitted_module():
    X, y = draw()
    given = nn.Linear(6, 4)
    found = DisAlignClassifier(classifier=given, cross_fit=0).fit(X.astype(np.float32), y)
    assert torch.equal(found.calibrated_.weight, given.weight)
    assert type(plain_classifier(found.calibrated_)) is nn.Linear


def test_it_survives_pickling():
    X, y = draw()
    found = DisAlignClassifier(C=1.0).fit(X, y)
    again = pickle.loads(pickle.dumps(found))
    assert (again.decision_function(X) == found.decision_function(X)).all()


def test_one_class_and_options_are_refused_in_a_sentence():
    X, y = draw()
    with pytest.raises(disalign.InputError, match="expected examples of 2 classes or more, got one class: ant"):
        DisAlignClassifier().fit(X[:5], y[:5])
    with pytest.raises(disalign.InputError, match="expected anchor 'zero', or 'logit_adjust' with confidence='one'"):
        DisAlignClassifier(confidence="learnt").fit(X, y)
