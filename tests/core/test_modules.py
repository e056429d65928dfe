"""The calibration, the classifiers, and how any classifier gets its stage two."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.models import COUNTS, FEATURES, NUM_CLASSES, SmallCNN
from disalign import (
    CALIBRATED,
    AdaptiveCalibration,
    Calibrated,
    CalibratedCosineClassifier,
    CalibratedLinear,
    CosineClassifier,
    GRWCrossEntropyLoss,
    InputError,
    assert_frozen,
    calibrate,
    calibrate_classifier,
    wrap_classifier,
)

K, D = 5, 6


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


# ------------------------------------------------------------------------------------------ AdaptiveCalibration


@pytest.mark.parametrize("spatial", [False, True])
def test_it_holds_exactly_2k_d_1_numbers(spatial):
    calibration = AdaptiveCalibration(K, D, spatial)
    assert sum(parameter.numel() for parameter in calibration.parameters()) == 2 * K + D + 1
    assert list(calibration.state_dict()) == ["magnitude", "margin", "confidence.weight", "confidence.bias"]


@pytest.mark.parametrize("spatial", [False, True])
def test_it_starts_as_the_identity_with_confidence_one_half(spatial):
    place = (3, 2) if spatial else ()
    calibration, z, x = AdaptiveCalibration(K, D, spatial), torch.randn(4, K, *place), torch.randn(4, D, *place)
    assert torch.equal(calibration(z, x), z)
    assert torch.equal(calibration.confidence_score(x), torch.full((4, 1, *place), 0.5))


@pytest.mark.parametrize("spatial", [False, True])
def test_it_is_the_identity_whatever_the_confidence(spatial):
    place = (3, 2) if spatial else ()
    calibration, z, x = AdaptiveCalibration(K, D, spatial), torch.randn(4, K, *place), torch.randn(4, D, *place)
    randomised(calibration.confidence)
    assert torch.equal(calibration(z, x), z)


def test_building_it_draws_no_random_number():
    before = torch.get_rng_state()
    AdaptiveCalibration(K, D)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spatial", [False, True])
def test_the_confidence_is_the_sigmoid_of_a_linear_function(spatial):
    place = (3, 2) if spatial else ()
    calibration = randomised(AdaptiveCalibration(K, D, spatial)).double()
    x = torch.randn(4, D, *place, dtype=torch.float64)
    v, b = calibration.confidence.weight.detach().numpy().ravel(), calibration.confidence.bias.item()
    expected = 1 / (1 + np.exp(-(np.tensordot(x.numpy(), v, axes=(1, 0)) + b)))
    np.testing.assert_allclose(calibration.confidence_score(x)[:, 0].detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("spatial", [False, True])
def test_the_module_equals_the_function(spatial):
    place = (3, 2) if spatial else ()
    calibration = randomised(AdaptiveCalibration(K, D, spatial, passthrough=2))
    z, x = torch.randn(4, K + 2, *place), torch.randn(4, D, *place)
    confidence = calibration.confidence_score(x)
    expected = calibrate(z, confidence, calibration.magnitude, calibration.margin, passthrough=2)
    assert torch.equal(calibration(z, x), expected)
    assert torch.equal(calibration(z, x)[:, K:], z[:, K:])


def test_each_learnt_part_gets_the_gradient_of_equation_4_and_5():
    calibration = randomised(AdaptiveCalibration(K, D)).double()
    z, x, upstream = (torch.randn(4, n, dtype=torch.float64) for n in (K, D, K))
    calibration(z, x).backward(upstream)

    alpha, beta, v, b = (parameter.detach().numpy() for parameter in calibration.parameters())
    expected = {"magnitude": np.zeros(K), "margin": np.zeros(K), "weight": np.zeros(D), "bias": np.zeros(1)}
    for u_i, z_i, x_i in zip(upstream.numpy(), z.numpy(), x.numpy(), strict=True):
        c = 1 / (1 + np.exp(-(x_i @ v[0] + b[0])))
        slope = c * (1 - c) * (u_i @ (alpha * z_i + beta - z_i))
        expected["magnitude"] += u_i * c * z_i
        expected["margin"] += u_i * c
        expected["weight"] += slope * x_i
        expected["bias"] += slope
    for name, parameter in calibration.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy().ravel(), expected[name.split(".")[-1]], rtol=1e-10)


def test_a_closed_gate_gives_no_gradient():
    # With confidence 0 for every input stage two silently equals stage one and can't leave it.
    calibration = AdaptiveCalibration(K, D)
    with torch.no_grad():
        calibration.confidence.bias.fill_(-200)
    calibration(torch.randn(4, K), torch.randn(4, D)).square().sum().backward()
    assert not calibration.magnitude.grad.any()
    assert not calibration.margin.grad.any()
    assert calibration.statistics()["confidence_mean"] == 0


@pytest.mark.parametrize(
    ("options", "learnt"),
    [
        ({"learn_magnitude": False}, {"margin", "confidence.weight", "confidence.bias"}),
        ({"learn_margin": False}, {"magnitude", "confidence.weight", "confidence.bias"}),
        ({"confidence": "one"}, {"magnitude", "margin"}),
        ({"confidence": "one", "learn_margin": False}, {"magnitude"}),
    ],
)
def test_the_switches_of_table_5(options, learnt):
    calibration = randomised(AdaptiveCalibration(K, D, **options))
    assert {name for name, _ in calibration.named_parameters()} == learnt
    assert set(calibration.state_dict()) == learnt
    if "magnitude" not in learnt:
        assert torch.equal(calibration.magnitude, torch.ones(K))
    if "margin" not in learnt:
        assert torch.equal(calibration.margin, torch.zeros(K))


@pytest.mark.parametrize("shape", [(4, K), (4, K, 3, 2)])
def test_confidence_one_applies_the_calibration_in_full(shape):
    calibration = randomised(AdaptiveCalibration(K, D, spatial=len(shape) > 2, confidence="one"))
    z = torch.randn(shape)
    column = (1, K) + (1,) * (len(shape) - 2)
    expected = calibration.magnitude.view(column) * z + calibration.margin.view(column)
    torch.testing.assert_close(calibration(z, torch.randn(4, D, *shape[2:])), expected)


def test_an_unknown_confidence_is_refused():
    with pytest.raises(InputError, match="expected confidence 'learnt' or 'one', got 'fixed'"):
        AdaptiveCalibration(K, D, confidence="fixed")


def test_nothing_to_learn_is_refused():
    with pytest.raises(InputError, match="expected magnitude or margin to be learnt, got neither"):
        AdaptiveCalibration(K, D, learn_magnitude=False, learn_margin=False)


@pytest.mark.parametrize("columns", [K, K + 2])
def test_the_wrong_number_of_columns_is_refused(columns):
    calibration = AdaptiveCalibration(K, D, passthrough=1)
    with pytest.raises(InputError, match=f"expected {K + 1} score columns, got {columns}"):
        calibration(torch.randn(2, columns), torch.randn(2, D))


def test_statistics_describe_the_last_batch_and_the_parameters():
    calibration = randomised(AdaptiveCalibration(K, D))
    assert set(calibration.statistics()) == {"magnitude_min", "magnitude_max", "margin_min", "margin_max"}
    x = torch.randn(7, D)
    calibration(torch.randn(7, K), x)
    confidence = calibration.confidence_score(x).detach()
    report = calibration.statistics()
    assert report["confidence_mean"] == confidence.mean()
    assert report["confidence_std"] == confidence.std(correction=0)
    assert (report["magnitude_min"], report["magnitude_max"]) == tuple(calibration.magnitude.aminmax())
    assert (report["margin_min"], report["margin_max"]) == tuple(calibration.margin.aminmax())
    assert not any(value.requires_grad for value in report.values())


def test_statistics_of_an_empty_batch_leave_the_confidence_out():
    calibration = AdaptiveCalibration(K, D)
    calibration(torch.randn(0, K), torch.randn(0, D))
    assert "confidence_mean" not in calibration.statistics()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spatial", [False, True])
def test_under_autocast_the_calibration_runs_in_fp32(dtype, spatial):
    place = (3, 2) if spatial else ()
    calibration = randomised(AdaptiveCalibration(K, D, spatial))
    z, x = torch.randn(4, K, *place).to(dtype), torch.randn(4, D, *place).to(dtype)
    expected = calibration(z.float(), x.float())
    with torch.autocast("cpu", dtype):
        result = calibration(z, x)
        result.square().mean().backward()
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    assert all(parameter.grad.isfinite().all() for parameter in calibration.parameters())


# --------------------------------------------------------------------------------------------- CosineClassifier


def test_the_cosine_classifier_is_equation_3():
    classifier = randomised(CosineClassifier(D, K, scale=16.0)).double()
    x = torch.randn(4, D, dtype=torch.float64)
    w, scale = classifier.weight.detach().numpy(), classifier.scale.item()
    expected = np.array([[scale * (a @ b) / np.sqrt((a @ a) * (b @ b)) for b in w] for a in x.numpy()])
    np.testing.assert_allclose(classifier(x).detach().numpy(), expected, rtol=1e-12)


def test_the_cosine_classifier_passes_gradcheck():
    classifier = randomised(CosineClassifier(D, K)).double()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    arguments = (x, *classifier.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: classifier(x), arguments)


def test_only_directions_matter():
    classifier, x = CosineClassifier(D, K), torch.randn(4, D)
    before = classifier(x)
    with torch.no_grad():
        classifier.weight.mul_(50)
    torch.testing.assert_close(classifier(1000 * x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["features", "weight"])
def test_zero_features_and_weights_stay_finite(dtype, zero):
    classifier = CosineClassifier(D, K).to(dtype)
    x = torch.randn(4, D, dtype=dtype)
    with torch.no_grad():
        (x if zero == "features" else classifier.weight).zero_()
    x.requires_grad_()
    z = classifier(x)
    F.cross_entropy(z, torch.arange(4)).backward()
    assert torch.equal(z, torch.zeros_like(z))
    for gradient in (x.grad, classifier.weight.grad, classifier.scale.grad):
        assert gradient.isfinite().all()


def test_a_fixed_scale_is_kept_in_the_state_but_not_learnt():
    fixed, learnt = CosineClassifier(D, K, scale=16.0, learn_scale=False), CosineClassifier(D, K)
    assert {name for name, _ in fixed.named_parameters()} == {"weight"}
    assert {name for name, _ in learnt.named_parameters()} == {"weight", "scale"}
    assert set(fixed.state_dict()) == set(learnt.state_dict()) == {"weight", "scale"}
    assert (fixed.scale, learnt.scale) == (16, 20)


# ----------------------------------------------------------------------------------------- calibrated classifiers

CLASSIFIERS = {
    "linear": (lambda: nn.Linear(D, K), CalibratedLinear),
    "cosine": (lambda: CosineClassifier(D, K), CalibratedCosineClassifier),
}
kinds = pytest.mark.parametrize("kind", CLASSIFIERS)


@kinds
def test_a_calibrated_classifier_keeps_its_parameters_and_their_names(kind):
    build, calibrated = CLASSIFIERS[kind]
    classifier = build()
    before = dict(classifier.named_parameters())
    assert calibrate_classifier(classifier) is classifier
    assert type(classifier) is calibrated
    after = dict(classifier.named_parameters())
    assert all(after[name] is before[name] for name in before)
    new = {"magnitude", "margin", "confidence.weight", "confidence.bias"}
    assert set(after) - set(before) == {f"calibration.{name}" for name in new}


@kinds
def test_scores_are_stage_ones_and_the_calibrated_ones(kind):
    classifier, x = CLASSIFIERS[kind][0](), torch.randn(4, D)
    before = classifier(x)
    randomised(calibrate_classifier(classifier).calibration)
    stage_one, calibrated = classifier.scores(x)
    assert torch.equal(stage_one, before)
    assert torch.equal(calibrated, classifier.calibration(before, x))
    assert torch.equal(classifier(x), calibrated)
    assert not torch.allclose(calibrated, stage_one)


def test_options_reach_the_calibration():
    classifier = calibrate_classifier(nn.Linear(D, K), learn_margin=False, confidence="one")
    assert [name for name, _ in classifier.calibration.named_parameters()] == ["magnitude"]


def test_a_background_column_of_the_classifier_passes_through():
    classifier, x = calibrate_classifier(nn.Linear(D, K + 1), passthrough=1), torch.randn(4, D)
    assert classifier.calibration.num_classes == K
    randomised(classifier.calibration)
    stage_one, calibrated = classifier.scores(x)
    assert torch.equal(calibrated[:, K], stage_one[:, K])


@pytest.mark.parametrize("classifier", [nn.Conv1d(D, K, 1), CalibratedLinear(D, K), nn.Identity()])
def test_another_type_of_classifier_is_refused(classifier):
    with pytest.raises(InputError, match=rf"not yet calibrated, got {type(classifier).__name__}; for your"):
        calibrate_classifier(classifier)


class Doubled(nn.Linear):
    """As timm has a Linear of its own: another forward, the same parameters."""

    def forward(self, features):
        return 2 * super().forward(features)


def test_a_subclass_keeps_its_own_forward():
    classifier, x = Doubled(D, K), torch.randn(4, D)
    before = 2 * (x @ classifier.weight.T + classifier.bias).detach()
    calibrated = calibrate_classifier(classifier)
    assert calibrated is classifier
    assert isinstance(classifier, Calibrated)
    assert isinstance(classifier, Doubled)
    assert torch.allclose(classifier(x), before, atol=1e-6)
    with torch.no_grad():
        classifier.calibration.margin += 3.0
    # the confidence starts at 1/2
    assert torch.allclose(classifier(x), before + 1.5, atol=1e-6)
    assert torch.allclose(classifier.scores(x)[0], before, atol=1e-6)
    with pytest.raises(InputError, match="not yet calibrated, got CalibratedDoubled"):
        calibrate_classifier(classifier)
    wrapped, _ = wrap_classifier(nn.Sequential(nn.Linear(D, D), Doubled(D, K)), class_counts=[3] * K)
    assert isinstance(wrapped[1], Doubled)


# ----------------------------------------------------------------------------------------------- wrap_classifier


@kinds
def test_a_wrapped_model_trains_its_calibration_and_nothing_else(kind):
    model, loss = wrap_classifier(SmallCNN(kind), COUNTS, rho=0.8, reduction="mean")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = ("magnitude", "margin", "confidence.weight", "confidence.bias")
    assert trained == {f"fc.calibration.{part}" for part in parts}
    assert isinstance(loss, GRWCrossEntropyLoss)
    assert (loss.class_counts.tolist(), loss.rho, loss.reduction) == (COUNTS, 0.8, "mean")


@kinds
def test_a_wrapped_model_starts_at_stage_ones_scores(kind):
    model, images = SmallCNN(kind).eval(), torch.randn(4, 1, 8, 8)
    before = model(images)
    wrap_classifier(model, COUNTS)
    assert torch.equal(model(images), before)


def test_the_model_itself_may_be_the_classifier():
    model, _ = wrap_classifier(nn.Linear(FEATURES, NUM_CLASSES), COUNTS)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("calibration.")}


def test_among_several_fitting_layers_the_named_one_is_taken():
    model = nn.Sequential(nn.Linear(D, K), nn.Linear(K, K))
    with pytest.raises(InputError, match=f"exactly one .* with {K} outputs, got 0, 1; name it"):
        wrap_classifier(model, COUNTS)
    wrap_classifier(model, COUNTS, classifier="1")
    assert [type(layer) for layer in model] == [nn.Linear, CalibratedLinear]


def test_a_model_without_a_fitting_classifier_is_refused():
    with pytest.raises(InputError, match="exactly one linear or cosine classifier with 3 outputs, got none"):
        wrap_classifier(SmallCNN(), [3, 2, 1])


def test_counts_of_another_number_of_classes_are_refused():
    with pytest.raises(InputError, match="one count for each of the 5 classes, got 3; do the class counts belong"):
        wrap_classifier(SmallCNN(), [3, 2, 1], classifier="fc")


def test_an_unknown_classifier_name_is_refused():
    with pytest.raises(InputError, match="name of a module as classifier, got 'head'"):
        wrap_classifier(SmallCNN(), COUNTS, classifier="head")


def test_wrapping_twice_is_refused():
    model, _ = wrap_classifier(SmallCNN(), COUNTS)
    with pytest.raises(InputError, match="got CalibratedLinear"):
        wrap_classifier(model, COUNTS, classifier="fc")


def test_a_refused_wrap_leaves_the_model_alone():
    model = SmallCNN()
    with pytest.raises(InputError, match="none for class 4"):
        wrap_classifier(model, [5, 4, 3, 2, 0])
    with pytest.raises(InputError, match="expected confidence"):
        wrap_classifier(model, COUNTS, confidence="two")
    assert type(model.fc) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@kinds
def test_a_deep_copy_trains_by_itself(kind):
    model, loss = wrap_classifier(SmallCNN(kind), COUNTS)
    twin = copy.deepcopy(model)
    twin.train()
    with assert_frozen(model, []):
        optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0)
        loss(twin(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
        optimizer.step()
    assert not torch.equal(twin.fc.calibration.magnitude, model.fc.calibration.magnitude)


@kinds
def test_ddp_needs_no_find_unused_parameters(kind, process_group):
    model, loss = wrap_classifier(SmallCNN(kind), COUNTS)
    parallel = DistributedDataParallel(model)
    for _ in range(3):  # DDP complains about an unused parameter at the next forward
        loss(parallel(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    assert model.fc.calibration.magnitude.grad.any()


def test_cosine_scores_stay_in_fp32_under_autocast():
    classifier, features = CosineClassifier(64, 10), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(features), classifier(features).float())
        inside = classifier(features)
    assert torch.equal(inside, classifier(features))


def test_a_classifier_of_ones_own_is_calibrated_once_it_is_registered(monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class CalibratedScaled(Calibrated, Scaled):
        pass

    monkeypatch.setitem(CALIBRATED, Scaled, CalibratedScaled)
    features, model = torch.randn(5, 6), nn.Sequential(Scaled(6, 3))
    before = model(features)
    wrapped, _ = wrap_classifier(model, [5, 2, 1])
    assert type(wrapped[0]) is CalibratedScaled
    assert torch.equal(wrapped(features), before)


def test_a_cosine_classifiers_rows_start_at_norm_1():
    norms = CosineClassifier(4096, 50).weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(50), rtol=0.1, atol=0)
