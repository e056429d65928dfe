"""Folding: a calibration of confidence one becomes part of a stock classifier, to the last rounding."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.models import COUNTS, NUM_CLASSES, SmallCNN
from disalign import (
    AdaptiveCalibration,
    CalibratedLinear,
    CosineClassifier,
    InputError,
    calibrate_classifier,
    fold_classifier,
    fold_model,
    fold_tensors,
    wrap_classifier,
)

K, D = 7, 16


def calibrated(kind=nn.Linear, width=D, **options):
    options = {"confidence": "one", **options}
    bias = {"bias": options.pop("bias")} if "bias" in options else {}
    classifier = calibrate_classifier(kind(width, K + options.get("passthrough", 0), **bias), **options)
    with torch.no_grad():
        for parameter in classifier.calibration.parameters():
            parameter.normal_(1, 0.5)
    return classifier.requires_grad_(False)


def by_hand(classifier, features):
    """Eq. 2 or 3, then eq. 4, class by class in float64."""
    calibration, x = classifier.calibration, features.double()
    columns = []
    for j, w in enumerate(classifier.weight.double()):
        if isinstance(classifier, CosineClassifier):
            lengths = x.pow(2).sum(1).sqrt() * w.pow(2).sum().sqrt()
            z = classifier.scale.double() * (x * w).sum(1) / lengths
        else:
            z = (x * w).sum(1) + (0 if classifier.bias is None else classifier.bias[j].double())
        if j < calibration.num_classes:
            z = calibration.magnitude[j].double() * z + calibration.margin[j].double()
        columns.append(z)
    return torch.stack(columns, 1)


def close(scores, expected):
    """To fp32's rounding of sums of a few terms."""
    return ((scores - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"learn_magnitude": False}, {"learn_margin": False}, {"passthrough": 1}], ids=str
)
def test_a_folded_linear_classifier_gives_the_calibrated_scores(options):
    classifier, x = calibrated(**options), torch.randn(50, D)
    folded = fold_classifier(classifier)
    assert type(folded) is nn.Linear
    assert folded(x).shape == (50, len(classifier.weight))
    assert close(folded(x), by_hand(classifier, x))
    assert close(folded(x), classifier(x))
    assert not close(folded(x), F.linear(x, classifier.weight, classifier.bias))


def test_folded_in_float64_it_is_exact_to_float64():
    classifier, x = calibrated().double(), torch.randn(50, D, dtype=torch.float64)
    difference = fold_classifier(classifier)(x) - classifier(x)
    assert difference.abs().max() < 1e-14 * classifier(x).abs().max()


def test_the_weight_is_rounded_once():
    weight, bias, magnitude, margin = torch.randn(K, D), torch.randn(K), torch.randn(K), torch.randn(K)
    folded = fold_tensors(weight, bias, magnitude, margin)
    assert torch.equal(folded[0], (magnitude.double()[:, None] * weight.double()).float())
    assert torch.equal(folded[1], (magnitude.double() * bias.double() + margin.double()).float())
    assert not torch.equal(folded[1], magnitude * bias + margin)


def test_what_is_not_calibrated_stays_bit_identical():
    weight, bias = torch.randn(K + 2, D), torch.randn(K + 2)
    folded = fold_tensors(weight, bias, torch.rand(K), torch.randn(K), passthrough=2)
    for before, after in zip((weight, bias), folded, strict=True):
        assert torch.equal(before[K:], after[K:])
        assert not torch.isclose(before[:K], after[:K]).all()


def test_the_identity_stays_bit_identical():
    weight, bias = torch.randn(K, D), torch.randn(K)
    folded = fold_tensors(weight, bias, torch.ones(K), torch.zeros(K))
    assert torch.equal(folded[0], weight)
    assert torch.equal(folded[1], bias)


def test_a_1x1_convolution():
    layer, calibration = nn.Conv2d(D, K, 1), AdaptiveCalibration(K, D, spatial=True, confidence="one")
    x = torch.randn(2, D, 5, 3)
    with torch.no_grad():
        calibration.magnitude.normal_()
        calibration.margin.normal_()
        expected = calibration(layer(x), x)
        weight, bias = fold_tensors(layer.weight, layer.bias, calibration.magnitude, calibration.margin)
    assert weight.shape == layer.weight.shape
    assert weight.is_contiguous()
    assert not weight.requires_grad
    assert close(F.conv2d(x, weight, bias), expected)


def test_without_a_bias_the_margin_is_the_bias():
    margin = torch.randn(K)
    assert torch.equal(fold_tensors(torch.randn(K, D), None, torch.rand(K), margin)[1], margin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_folded_in_float64(dtype):
    weight, magnitude, margin = torch.randn(K, D).to(dtype), torch.rand(K), torch.randn(K)
    folded, bias = fold_tensors(weight, None, magnitude, margin)
    assert torch.equal(folded, (magnitude.double()[:, None] * weight.double()).to(dtype))
    assert torch.equal(bias, margin.to(dtype))


# ------------------------------------------------------------------------------------------------- cosine classifier


@pytest.mark.parametrize("width", [1, 16, 2048])
@pytest.mark.parametrize("norm", [1.01e-3, 1.0, 1e4])
@pytest.mark.parametrize("passthrough", [0, 1])
def test_a_folded_cosine_classifier_is_made_of_stock_modules(width, norm, passthrough):
    classifier = calibrated(CosineClassifier, width, passthrough=passthrough)
    folded = fold_classifier(classifier)
    assert [type(module) for module in folded] == [nn.RMSNorm, nn.Linear]
    assert list(folded.state_dict()) == ["1.weight", "1.bias"]
    x = F.normalize(torch.randn(50, width)) * norm
    assert close(folded(x), by_hand(classifier, x))
    assert close(folded(x), classifier(x))


def test_zero_features_give_the_margin_and_smaller_ones_stay_finite():
    classifier = calibrated(CosineClassifier)
    folded = fold_classifier(classifier)
    x = torch.zeros(1, D)
    assert torch.equal(folded(x), classifier.calibration.margin[None])
    assert torch.equal(classifier(x), folded(x))
    for norm in (1e-4, 1e-12, 1e-20, 1e-40):
        assert folded(torch.full((1, D), norm)).isfinite().all()


def test_below_a_norm_of_1e_3_the_scores_differ_as_documented():
    classifier = calibrated(CosineClassifier)
    x = F.normalize(torch.randn(5, D)) * 5e-4
    whole = classifier(x * 100)
    assert close(fold_classifier(classifier)(x), whole)
    margin = classifier.calibration.margin
    assert close(classifier(x) - margin, (whole - margin) / 2)


def test_a_scale_normalises_the_rows():
    weight, magnitude, margin = torch.randn(K + 1, D) * 9, torch.rand(K), torch.randn(K)
    folded, bias = fold_tensors(weight, None, magnitude, margin, passthrough=1, scale=torch.tensor(20.0))
    assert torch.allclose(folded.norm(dim=1), 20 * torch.cat([magnitude, torch.ones(1)]))
    assert bias[-1] == 0


# ------------------------------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_model_is_folded_in_place_and_nothing_begins_to_train(kind):
    model, _ = wrap_classifier(SmallCNN(kind), COUNTS, confidence="one")
    with torch.no_grad():
        model.fc.calibration.magnitude.normal_()
        model.fc.calibration.margin.normal_()
    images = torch.randn(4, 1, 8, 8)
    expected = model(images)
    assert fold_model(model) is model
    assert close(model(images), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(type(module).__module__.startswith("disalign") for module in model.modules())


def test_its_state_dict_loads_into_the_stock_model():
    model, _ = wrap_classifier(SmallCNN(), COUNTS, confidence="one")
    with torch.no_grad():
        model.fc.calibration.margin.normal_()
    stock = SmallCNN().eval()
    stock.load_state_dict(fold_model(copy.deepcopy(model)).state_dict())
    images = torch.randn(4, 1, 8, 8)
    assert close(stock(images), model(images))


def test_a_timm_model_then_runs_without_us():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=NUM_CLASSES)
    model, _ = wrap_classifier(model, COUNTS, confidence="one")
    with torch.no_grad():
        model.fc.calibration.magnitude.normal_(1, 0.3)
        model.fc.calibration.margin.normal_()
    images = torch.randn(2, 3, 64, 64)
    expected = model.eval()(images)
    stock = timm.create_model("resnet18", num_classes=NUM_CLASSES).eval()
    stock.load_state_dict(fold_model(model).state_dict())
    assert close(stock(images), expected)


def test_a_model_that_is_but_a_classifier():
    assert type(fold_model(calibrated())) is nn.Linear


def test_the_mode_stays():
    classifier = calibrated(CosineClassifier)
    assert fold_classifier(classifier).training
    assert not any(module.training for module in fold_classifier(classifier.eval()).modules())


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("kind", [nn.Linear, CosineClassifier])
def test_a_learnt_confidence_is_refused(kind):
    with pytest.raises(InputError, match=r"confidence 'one' to fold, got a learnt one, which blends .*; export"):
        fold_classifier(calibrated(kind, confidence="learnt"))


@pytest.mark.parametrize("classifier", [nn.Linear(D, K), CosineClassifier(D, K), nn.Identity()])
def test_another_classifier_is_refused(classifier):
    with pytest.raises(InputError, match=f"Calibrated.* to fold, got {type(classifier).__name__}"):
        fold_classifier(classifier)


@pytest.mark.parametrize("made", [(K + 1, K, 0), (K, K + 1, 0), (K, K, 1)], ids=str)
def test_shapes_that_do_not_fit_are_refused(made):
    magnitude, margin, passthrough = made
    with pytest.raises(InputError, match=f"length {K - passthrough} for a classifier of {K} outputs"):
        fold_tensors(torch.randn(K, D), None, torch.ones(magnitude), torch.ones(margin), passthrough)


def test_what_half_precision_cannot_hold_is_refused():
    with pytest.raises(InputError, match=r"finite in torch.float16, got infinity"):
        fold_tensors(torch.ones(K, D).half(), None, torch.full((K,), 1e5), torch.zeros(K))


def test_a_model_without_a_calibration_is_refused():
    with pytest.raises(InputError, match="expected calibrated classifiers to fold, got 0 for 0 calibrations"):
        fold_model(SmallCNN())


def test_a_model_is_folded_wholly_or_not_at_all():
    model = nn.ModuleList([calibrated(), calibrated(confidence="learnt")])
    with pytest.raises(InputError, match="got a learnt one"):
        fold_model(model)
    assert type(model[0]) is CalibratedLinear
    elsewhere = nn.ModuleList([calibrated(), AdaptiveCalibration(K, D, spatial=True, confidence="one")])
    with pytest.raises(InputError, match="got 1 for 2 calibrations"):
        fold_model(elsewhere)
    assert type(elsewhere[0]) is CalibratedLinear


def test_folding_leaves_the_classifier_as_it_was():
    classifier = calibrated()
    before = copy.deepcopy(classifier.state_dict())
    fold_classifier(classifier)
    assert type(classifier) is CalibratedLinear
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_a_folded_model_trains_and_evaluates_as_any_other(tmp_path):
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model, _ = wrap_classifier(nn.Sequential(body, nn.Linear(8, 3)), [5, 3, 1], confidence="one")
    folded = fold_model(model)
    for one in (folded, copy.deepcopy(folded)):
        assert one.train()[0][1].training
        assert not one.eval()[0][1].training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    # whole, and without this package
    torch.save(folded, tmp_path / "whole.pt")
    alone = (
        "import sys, torch; torch.load(sys.argv[1], weights_only=False).eval(); assert 'disalign' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", alone, str(tmp_path / "whole.pt")], check=True)


def test_a_classifier_of_two_names_is_folded_under_both():
    model, _ = wrap_classifier(nn.Sequential(nn.Linear(4, 3)), [5, 3, 1], confidence="one")
    tied = nn.ModuleDict({"a": model, "b": nn.Sequential(model[0])})
    folded = fold_model(tied)
    assert type(folded["b"][0]) is nn.Linear
    assert folded["a"][0] is folded["b"][0]
