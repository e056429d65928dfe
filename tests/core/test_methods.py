"""Related methods as magnitudes and margins, or as classifiers of their own, against their own formulas."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch import nn

import disalign
from disalign import CosineClassifier, InputError, methods
from disalign.modules import plain_classifier

COUNTS = [500, 60, 20, 3]
WIDTH = 6


def linear(outputs=4, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, outputs, bias).double()


def features(rows=50):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def scores_of(calibration, classifier, x):
    with torch.no_grad():
        return calibration.double()(classifier(x), x)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_normalisation_is_that_of_the_weights(tau):
    classifier = linear(bias=False)
    weight = classifier.weight.detach()
    expected = F.linear(features(), weight / weight.norm(dim=1, keepdim=True) ** tau)
    found = scores_of(methods.tau_normalize(classifier, tau), classifier, features())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_logit_adjustment_turns_posteriors_to_equal_classes():
    classifier, x = linear(), features()
    posterior = softmax(classifier(x).detach().numpy())
    balanced = posterior / (np.array(COUNTS) / sum(COUNTS))
    found = scores_of(methods.logit_adjust(classifier, COUNTS), classifier, x)
    assert softmax(found.numpy()) == pytest.approx(balanced / balanced.sum(1, keepdims=True), abs=1e-6)


def test_logit_adjustment_to_a_prior():
    classifier, x, prior = linear(), features(), np.array([0.1, 0.2, 0.3, 0.4])
    posterior = softmax(classifier(x).detach().numpy())
    shifted = posterior / (np.array(COUNTS) / sum(COUNTS)) * prior
    calibration = methods.logit_adjust(classifier, COUNTS, target_prior=torch.from_numpy(prior))
    found = softmax(scores_of(calibration, classifier, x).numpy())
    assert found == pytest.approx(shifted / shifted.sum(1, keepdims=True), abs=1e-6)
    counted = methods.logit_adjust(classifier, COUNTS, target_prior=torch.from_numpy(1000 * prior))
    torch.testing.assert_close(counted.margin, calibration.float().margin)


def test_logit_adjustment_is_the_anchor_of_the_fit():
    rows = disalign.Features.from_arrays(torch.randn(583, WIDTH), np.repeat(range(4), COUNTS))
    classifier = linear().float()
    options = {"confidence": "one", "anchor": "logit_adjust", "learn_magnitude": False, "penalty": 1e9}
    fitted = disalign.fit(rows, classifier, 1.0, **options)
    margin = methods.logit_adjust(classifier, COUNTS).margin
    torch.testing.assert_close(fitted.calibration.margin.detach(), margin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_norcal_is_its_normalised_quotient(gamma):
    classifier, x = linear(5), features()
    z = classifier(x).detach().numpy()
    parts = np.exp(z)
    parts[:, :4] /= np.array(COUNTS) ** gamma
    found = scores_of(methods.norcal(classifier, COUNTS, gamma), classifier, x)
    assert softmax(found.numpy()) == pytest.approx(parts / parts.sum(1, keepdims=True), abs=1e-6)
    assert torch.equal(found[:, 4], classifier(x)[:, 4])


def test_what_the_vs_loss_sees_of_its_mirror_is_stage_one():
    classifier, x = linear(), features()
    tau, gamma, n = 0.7, 0.3, np.array(COUNTS, float)
    mirrored = scores_of(methods.vs(classifier, COUNTS, tau, gamma), classifier, x).numpy()
    seen = (n / n.max()) ** gamma * mirrored + tau * np.log(n / n.sum())
    assert seen == pytest.approx(classifier(x).detach().numpy(), abs=1e-5)


def test_beside_a_background_the_mirror_is_centred_as_logit_adjustment_is():
    classifier, x = linear(5), features()
    adjusted, mirrored = (
        scores_of(found, classifier, x)
        for found in (methods.logit_adjust(classifier, COUNTS, 0.7), methods.vs(classifier, COUNTS, 0.7, 0.3))
    )
    n = torch.tensor(COUNTS).double()
    torch.testing.assert_close(mirrored[:, :4] * (n / n.max()) ** 0.3, adjusted[:, :4], rtol=1e-5, atol=1e-5)
    assert torch.equal(mirrored[:, 4], classifier(x)[:, 4])


def test_rebalancing_divides_by_the_mean_prediction():
    classifier, x = linear(), features()
    p = softmax(classifier(x).detach().numpy())
    expected = p / p.mean(0)
    found = softmax(scores_of(methods.rebalance(classifier, x), classifier, x).numpy())
    assert found == pytest.approx(expected / expected.sum(1, keepdims=True), abs=1e-6)
    often = torch.arange(len(x)) % 3
    weighted, repeated = (
        methods.rebalance(classifier, x, often),
        methods.rebalance(classifier, x.repeat_interleave(often, 0)),
    )
    torch.testing.assert_close(weighted.margin, repeated.margin)


IDENTITIES = {
    "tau 0": lambda classifier: methods.tau_normalize(classifier, 0.0),
    "strength 0": lambda classifier: methods.logit_adjust(classifier, COUNTS, 0.0),
    "gamma 0": lambda classifier: methods.norcal(classifier, COUNTS, 0.0),
    "tau and gamma 0": lambda classifier: methods.vs(classifier, COUNTS, 0.0, 0.0),
    "a dial at 0": lambda classifier: methods.vs(classifier, COUNTS).strength(0.0),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_no_strength_is_stage_one_bit_for_bit(name):
    classifier, x = linear().float(), features().float()
    with torch.no_grad():
        assert torch.equal(IDENTITIES[name](classifier)(classifier(x), x), classifier(x))


FILLED = {
    "tau_normalize": lambda classifier: methods.tau_normalize(classifier),
    "logit_adjust": lambda classifier: methods.logit_adjust(classifier, COUNTS),
    "vs": lambda classifier: methods.vs(classifier, COUNTS),
    "rebalance": lambda classifier: methods.rebalance(classifier, features()),
}


@pytest.mark.parametrize("name", FILLED)
def test_folded_it_is_a_stock_classifier(name):
    classifier, x = linear(), features()
    calibration = FILLED[name](classifier)
    calibrated = disalign.calibrate_classifier(plain_classifier(classifier), confidence="one").double()
    calibrated.calibration.load_state_dict(calibration.double().state_dict())
    folded = disalign.fold_classifier(calibrated)
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), scores_of(calibration, classifier, x))


def test_a_background_is_left_alone():
    classifier, x = linear(5), features()
    for calibration in (
        methods.tau_normalize(classifier, background=True),
        methods.logit_adjust(classifier, COUNTS),
        methods.vs(classifier, COUNTS),
    ):
        found = scores_of(calibration, classifier, x)
        assert torch.equal(found[:, 4], classifier(x)[:, 4])
        assert calibration.margin.shape == (4,)
        assert not any(parameter.requires_grad for parameter in calibration.parameters())


def test_cosine_classifiers():
    torch.manual_seed(0)
    classifier, x = CosineClassifier(WIDTH, 4), features().float()
    margin = methods.logit_adjust(classifier, COUNTS).margin
    with torch.no_grad():
        torch.testing.assert_close(methods.logit_adjust(classifier, COUNTS)(classifier(x), x), classifier(x) + margin)


def test_the_dial_is_a_straight_line():
    torch.manual_seed(0)
    calibration = disalign.AdaptiveCalibration(4, WIDTH)
    with torch.no_grad():
        for parameter in calibration.parameters():
            parameter += torch.randn_like(parameter)
        z, x = torch.randn(9, 4), torch.randn(9, WIDTH)
        half, whole = calibration.strength(0.5)(z, x), calibration.strength(1.0)(z, x)
        torch.testing.assert_close(half, (z + calibration(z, x)) / 2)
        torch.testing.assert_close(whole, calibration(z, x))
        assert (calibration.magnitude != 1).all()


# ------------------------------------------------------------------------------------------ learnt from features


def rows(seed=0, **options):
    generator = np.random.default_rng(seed)
    y = np.repeat(range(4), COUNTS)
    x = np.random.default_rng(9).normal(size=(4, WIDTH))[y] + generator.normal(size=(len(y), WIDTH))
    return disalign.Features.from_arrays(x, y, **options)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def pulls(fitted, train, classifier, rho, penalty, scale=1.0):
    """The gradients of the objective of confidence one at what was learnt, by hand: of magnitude and of margin."""
    z, y = classifier(train.x).detach().numpy(), train.y.numpy()
    magnitude, margin = (value.detach().numpy().astype(float) for value in fitted.calibration.parameters())
    w = np.array(COUNTS, float) ** -rho
    p = np.exp(log_softmax(magnitude * z + margin))
    residual = (p - np.eye(4)[y]) * w[y][:, None] / w[y].sum()
    return (
        (residual * z).sum(0) + penalty * (magnitude - 1),
        residual.sum(0) + penalty * margin / scale**2,
    )


def test_lws_is_the_magnitude_alone():
    train, classifier = rows(), linear()
    fitted = methods.lws(train, classifier)
    assert not fitted.calibration.margin.any()
    assert fitted.calibration.confidence is None
    z, y = classifier(train.x).detach().numpy(), train.y.numpy()
    magnitude = fitted.calibration.magnitude.detach().numpy().astype(float)
    w = 1 / np.array(COUNTS, float)
    p = np.exp(log_softmax(magnitude * z))
    gradient = ((p - np.eye(4)[y]) * z * w[y][:, None]).sum(0) / w[y].sum() + 0.01 * (magnitude - 1)
    assert np.abs(gradient).max() < 1e-5 < np.abs(magnitude - 1).max()


def test_vector_scaling_knows_no_balance():
    train, classifier = rows(), linear()
    fitted = methods.vector_scaling(train, classifier)
    assert np.abs(pulls(fitted, train, classifier, 0.0, 0.01)).max() < 1e-5
    assert np.abs(pulls(fitted, train, classifier, 1.0, 0.01)).max() > 1e-3


def test_marc_counts_margins_in_the_norms_of_the_weights():
    train, classifier = rows(), linear()
    with torch.no_grad():
        classifier.weight.mul_(torch.tensor([[3.0], [1.0], [0.5], [0.2]]))
    fitted = methods.marc(train, classifier, 1.2, penalty=0.1)
    norms = np.linalg.norm(classifier.weight.detach().numpy(), axis=1)
    assert np.abs(pulls(fitted, train, classifier, 1.2, 0.1, norms)).max() < 1e-5
    assert np.abs(pulls(fitted, train, classifier, 1.2, 0.1)).max() > 1e-3


def test_marc_of_weights_of_norm_1_is_disalign_of_confidence_one():
    train, classifier = rows(), linear()
    with torch.no_grad():
        classifier.weight.copy_(F.normalize(classifier.weight, dim=1))
    expected = disalign.fit(train, classifier, 1.2, confidence="one")
    found = methods.marc(train, classifier)
    torch.testing.assert_close(found.calibration.margin, expected.calibration.margin, rtol=1e-5, atol=1e-5)


def test_whatever_the_scale_the_margins_are_pulled_to_the_anchor():
    options = {"confidence": "one", "anchor": "logit_adjust", "penalty": 1e9}
    fitted = disalign.fit(rows(), linear(), 1.0, margin_scale=torch.tensor([3.0, 1.0, 0.5, 0.2]), **options)
    anchor = methods.logit_adjust(linear(), COUNTS).margin
    torch.testing.assert_close(fitted.calibration.margin.detach(), anchor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_crt_is_scikit_learns_balanced_logistic_regression(bias):
    train, c = rows(), 0.3
    found = methods.crt(train, linear(bias=bias), C=c)
    n = np.array(COUNTS, float)
    weights = (1 / n)[train.y.numpy()]
    weights *= len(train) / weights.sum()
    theirs = LogisticRegression(C=c, fit_intercept=bias, tol=1e-10, max_iter=5000)
    theirs.fit(train.x.numpy(), train.y.numpy(), sample_weight=weights)
    scores = found(train.x).softmax(1).numpy()
    assert scores == pytest.approx(theirs.predict_proba(train.x.numpy()), abs=2e-3)
    assert (found.bias is not None) == bias


def test_a_weighted_row_counts_as_often_in_crt():
    train = rows()
    copies = 1 + torch.arange(len(train)) % 2
    options = {"class_counts": COUNTS}
    weighted = disalign.Features.from_arrays(train.x, train.y, weights=copies, **options)
    repeated = disalign.Features.from_arrays(
        train.x.repeat_interleave(copies, 0), train.y.repeat_interleave(copies), **options
    )
    found, expected = (methods.crt(one, linear()) for one in (weighted, repeated))
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-3)


def test_crt_of_a_class_without_examples_goes_on():
    train = rows(class_counts=[*COUNTS, 0])
    found = methods.crt(train, linear(5))
    assert torch.isfinite(found.weight).all()


def test_the_nearest_mean_is_scikit_learns():
    train, test = rows(), rows(1)
    theirs = NearestCentroid().fit(train.x.numpy(), train.y.numpy())
    found = methods.nearest_mean(train, "l2")
    assert found(test.x).argmax(1).tolist() == theirs.predict(test.x.numpy()).tolist()


def test_the_nearest_mean_by_cosine():
    train, x = rows(), rows(1).x.numpy()
    means = np.stack([train.x.numpy()[train.y.numpy() == label].mean(0) for label in range(4)])
    expected = x @ means.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    assert methods.nearest_mean(train)(torch.from_numpy(x)).numpy() == pytest.approx(expected, abs=1e-6)


def test_a_weighted_row_counts_as_often_in_the_mean():
    y = [0, 0, 1, 1]
    x = np.random.default_rng(0).normal(size=(4, WIDTH))
    weighted = disalign.Features.from_arrays(x, y, weights=[1, 3, 1, 1])
    repeated = disalign.Features.from_arrays(x[[0, 1, 1, 1, 2, 3]], [0, 0, 0, 0, 1, 1])
    for metric in ("cosine", "l2"):
        expected = methods.nearest_mean(repeated, metric).weight
        torch.testing.assert_close(methods.nearest_mean(weighted, metric).weight, expected)


def test_a_class_without_examples_is_never_the_nearest():
    train = rows(class_counts=[*COUNTS, 0])
    assert 4 not in methods.nearest_mean(train, "l2")(0 * train.x).argmax(1)
    weightless = rows(weights=(train.y != 3).double())
    assert 3 not in methods.nearest_mean(weightless, "l2")(0 * train.x).argmax(1)


def shrunk(margin, counts=COUNTS, rho=1.0):
    calibration = disalign.AdaptiveCalibration(len(counts), WIDTH, confidence="one")
    with torch.no_grad():
        calibration.margin.copy_(torch.as_tensor(margin))
    return methods.shrink(calibration, counts, rho).margin.detach().numpy()


@pytest.mark.parametrize("rho", [0.0, 1.0, 1.2])
def test_margins_are_shrunk_as_james_and_stein_have_it(rho):
    n = np.array(COUNTS, float)
    anchor = np.log(n**-rho / np.mean(n**-rho))
    own = np.array([0.9, -0.4, 1.3, -1.8])
    centre = own.mean()
    spread = np.mean((own - centre) ** 2 - 1 / n)
    expected = [a + centre + spread / (spread + 1 / k) * (d - centre) for a, d, k in zip(anchor, own, n, strict=True)]
    assert shrunk(anchor + own, rho=rho) == pytest.approx(np.array(expected), abs=1e-5)


def test_margins_within_the_noise_become_the_anchor():
    n = np.array([4.0, 3, 2, 1])
    anchor = np.log(1 / n / np.mean(1 / n))
    assert shrunk(anchor + np.array([0.1, -0.1, 0.1, -0.1]), [4, 3, 2, 1]) == pytest.approx(anchor, abs=1e-6)


def test_of_many_examples_nothing_is_shrunk():
    n = np.array([10**9, 10**8, 10**7])
    margin = np.log(1 / n / np.mean(1 / n)) + np.array([1.0, 0.0, -1.0])
    assert shrunk(margin, n.tolist()) == pytest.approx(margin, abs=1e-5)


def pixels():
    x = torch.randn(20, 4, WIDTH)
    return disalign.Features.from_arrays(x, np.arange(20) % 4, bilinear=torch.full((20, 4), 0.25))


def boxes():
    return disalign.Features.from_arrays(
        torch.randn(20, WIDTH), np.arange(20) % 5, class_counts=[4] * 4, background=True
    )


REFUSED = {
    "tau of a cosine classifier": (
        lambda: methods.tau_normalize(CosineClassifier(WIDTH, 4)),
        "expected a linear classifier, whose weights have norms, got CosineClassifier",
    ),
    "weights of norm 0": (
        lambda: methods.tau_normalize(nn.Linear(WIDTH, 4).requires_grad_(False).apply(lambda m: m.weight[2].zero_())),
        "got norm 0 for class 2",
    ),
    "other counts": (lambda: methods.logit_adjust(linear(), [5, 6]), "expected one count for each of 4 outputs"),
    "an empty class": (lambda: methods.logit_adjust(linear(), [5, 6, 0, 1]), "got none for class 2"),
    "an empty class of a detector": (lambda: methods.norcal(linear(5), [5, 6, 0, 1]), "got none for class 2"),
    "an empty class for the VS loss": (lambda: methods.vs(linear(), [5, 6, 0, 1]), "got none for class 2"),
    "a strength": (lambda: methods.logit_adjust(linear(), COUNTS, -1.0), "expected a finite strength >= 0, got -1.0"),
    "a prior": (
        lambda: methods.logit_adjust(linear(), COUNTS, target_prior=torch.tensor([1.0, 0, 1, 1])),
        "expected 4 positive frequencies as target_prior",
    ),
    "cRT of boxes": (lambda: methods.crt(boxes(), linear(5)), "expected features with a row an example"),
    "means of pixels": (lambda: methods.nearest_mean(pixels()), "interpolated from four cells each"),
    "a metric": (lambda: methods.nearest_mean(rows(), "l1"), "expected the metric 'cosine' or 'l2', got 'l1'"),
    "MARC of a cosine classifier": (
        lambda: methods.marc(rows(), CosineClassifier(WIDTH, 4)),
        "expected a linear classifier, whose weights have norms",
    ),
    "counts of another calibration": (
        lambda: methods.shrink(disalign.AdaptiveCalibration(4, WIDTH), [1, 2]),
        "expected 4 counts for this calibration, got 2",
    ),
    "scales of another length": (
        lambda: disalign.fit(rows(), linear(), margin_scale=torch.ones(3)),
        "expected 4 positive numbers as margin_scale",
    ),
    "a scale of 0": (
        lambda: disalign.fit(rows(), linear(), margin_scale=torch.tensor([1.0, 0, 1, 1])),
        "expected 4 positive numbers as margin_scale, got 1.0, 0.0, 1.0, 1.0",
    ),
    "a scale of infinity": (
        lambda: disalign.fit(rows(), linear(), margin_scale=torch.tensor([1.0, torch.inf, 1, 1])),
        "expected 4 positive numbers as margin_scale, got 1.0, inf",
    ),
    "scales of SGD": (
        lambda: disalign.fit(rows(), linear(), solver="sgd", margin_scale=torch.ones(4)),
        "expected no margin_scale with solver='sgd'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    attempt, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        attempt()
