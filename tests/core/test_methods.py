"""Related methods as magnitudes and margins, against their own formulas."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    seen = (n / n.max()) ** gamma * (mirrored + tau * np.log(n / n.sum()))
    assert seen == pytest.approx(classifier(x).detach().numpy(), abs=1e-5)


def test_rebalancing_divides_by_the_mean_prediction():
    classifier, x = linear(), features()
    p = softmax(classifier(x).detach().numpy())
    expected = p / p.mean(0)
    found = softmax(scores_of(methods.rebalance(classifier, x), classifier, x).numpy())
    assert found == pytest.approx(expected / expected.sum(1, keepdims=True), abs=1e-6)


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
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    attempt, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        attempt()
