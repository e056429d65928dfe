import copy
import math

import pytest

pytest.importorskip("detectron2")

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances

from disalign import InputError, freeze_except
from disalign_d2 import DisAlignOutputLayers, build_model

from .models import COUNTS, tiny_cfg

pytestmark = pytest.mark.usefixtures("storage")

K, D = len(COUNTS), 6
STOCK = dict(box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), num_classes=K)
BACKGROUND = K


def lively(layers):
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if name != "cls_score.scale":
                parameter.normal_()
    return layers


def stage_two(**options):
    """A frozen predictor with a calibration that is anywhere but at its start."""
    options = {"class_counts": COUNTS, "rho": 0.8} | options
    layers = lively(DisAlignOutputLayers(ShapeSpec(channels=D), calibrate=True, **STOCK, **options))
    freeze_except(layers, ["cls_score.calibration"])
    return layers.train()


def regions(*labels):
    """An image with a region for each label."""
    corner = torch.rand(len(labels), 2) * 20
    boxes = torch.cat([corner, corner + 5 + torch.rand(len(labels), 2) * 10], dim=1)
    image = Instances((50, 50), proposal_boxes=Boxes(boxes), gt_classes=torch.tensor(labels, dtype=torch.int64))
    image.gt_boxes = Boxes(boxes + torch.rand(len(labels), 4))
    return image


def images():
    return [regions(0, 4, BACKGROUND, 2, 2), regions(BACKGROUND, 1, 3, 0, BACKGROUND, BACKGROUND)]


# ------------------------------------------------------------------------------------------------- the method


def reference(layers, features, labels, weight, reduction):
    """Eq. 2-5, 8 and 9 region by region in float64: scores, loss and the gradients of the calibration."""

    def numbers(tensor):
        return tensor.detach().double().numpy()

    head = layers.cls_score
    alpha, beta = numbers(head.calibration.magnitude), numbers(head.calibration.margin)
    v, b = numbers(head.calibration.confidence.weight)[0], numbers(head.calibration.confidence.bias)[0]
    w = numbers(head.weight)
    all_scores, loss, divisor = [], 0.0, 0.0
    gradients = [np.zeros(K), np.zeros(K), np.zeros(D), 0.0]
    for x, y in zip(numbers(features), labels, strict=True):
        if hasattr(head, "scale"):
            z = np.array([float(head.scale) * (x @ row) / math.sqrt(x @ x) / math.sqrt(row @ row) for row in w])
        else:
            z = np.array([x @ row + bias for row, bias in zip(w, numbers(head.bias), strict=True)])
        confidence = 1 / (1 + math.exp(-(v @ x + b)))
        s = z.copy()
        for j in range(K):
            s[j] = confidence * (alpha[j] * z[j] + beta[j]) + (1 - confidence) * z[j]
        p = np.exp(s - s.max())
        p /= p.sum()
        loss -= weight[y] * math.log(p[y])
        divisor += weight[y] if reduction == "weighted_mean" else 1
        p[y] -= 1
        u = weight[y] * p[:K]
        slope = u @ ((alpha - 1) * z[:K] + beta) * confidence * (1 - confidence)
        for index, part in enumerate((u * confidence * z[:K], u * confidence, slope * x, slope)):
            gradients[index] = gradients[index] + part
        all_scores.append(s)
    return np.array(all_scores), loss / divisor, [gradient / divisor for gradient in gradients]


@pytest.mark.parametrize("background", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_scores_loss_and_gradients_equal_a_float64_loop(classifier, reduction, background):
    layers = stage_two(classifier=classifier, reduction=reduction, background_weight=background)
    proposals, features = images(), torch.randn(11, D)
    labels = [label for image in proposals for label in image.gt_classes.tolist()]
    rarity = [1 / count**0.8 for count in COUNTS]
    weight = [K * share / sum(rarity) for share in rarity] + [background]

    scores, deltas = layers(features)
    losses = layers.losses((scores, deltas), proposals)
    assert list(losses) == ["loss_cls"]
    losses["loss_cls"].backward()

    expected, loss, gradients = reference(layers, features, labels, weight, reduction)
    np.testing.assert_allclose(scores.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert losses["loss_cls"].item() == pytest.approx(loss, rel=1e-5)
    learnt = layers.cls_score.calibration
    trains = [learnt.magnitude, learnt.margin, learnt.confidence.weight, learnt.confidence.bias]
    for parameter, gradient in zip(trains, gradients, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy().ravel(), np.ravel(gradient), rtol=1e-4, atol=1e-5)
    assert {name for name, parameter in layers.named_parameters() if parameter.grad is not None} == {
        f"cls_score.calibration.{part}" for part in ("magnitude", "margin", "confidence.weight", "confidence.bias")
    }


@pytest.mark.parametrize("background", [1.0, 30.0])
@pytest.mark.parametrize("rho", [0.0, 0.8, 1.2])
def test_foreground_weights_average_1_beside_the_backgrounds(rho, background):
    layers = stage_two(rho=rho, background_weight=background)
    layers.resolve_class_counts()
    share = np.array(COUNTS, dtype=np.float64) ** -rho
    np.testing.assert_allclose(layers.loss.weight, [*(share / share.mean()), background], rtol=1e-6)


def test_only_the_foreground_is_calibrated():
    layers, features = stage_two(), torch.randn(4, D)
    stage_one, calibrated = layers.cls_score.scores(features)
    assert torch.equal(layers(features)[0], calibrated)
    assert torch.equal(calibrated[:, K], stage_one[:, K])
    assert (calibrated[:, :K] - stage_one[:, :K]).abs().amin() > 1e-4


def test_the_confidence_is_the_sigmoid_of_a_linear_layer():
    layers = stage_two()
    with torch.no_grad():
        layers.cls_score.calibration.confidence.weight.copy_(torch.arange(D) / 10)
        layers.cls_score.calibration.confidence.bias.fill_(-0.5)
    x = torch.ones(1, D)
    confidence = 1 / (1 + math.exp(-(0.1 + 0.2 + 0.3 + 0.4 + 0.5 - 0.5)))
    assert layers.cls_score.calibration.confidence_score(x).item() == pytest.approx(confidence)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (dict(learn_magnitude=False), {"margin", "confidence.weight", "confidence.bias"}),
        (dict(learn_margin=False), {"magnitude", "confidence.weight", "confidence.bias"}),
        (dict(confidence="one"), {"magnitude", "margin"}),
    ],
)
def test_each_part_can_be_left_out(options, left):
    calibration = stage_two(**options).cls_score.calibration
    assert {name for name, _ in calibration.named_parameters()} == left
    if "confidence" in options:
        assert torch.equal(calibration.confidence_score(torch.randn(3, D)), torch.ones(3, 1))


def test_the_loss_weight_of_the_classification_counts():
    proposals, features = images(), torch.randn(11, D)
    layers = stage_two()
    plain = layers.losses(layers(features), proposals)["loss_cls"]
    layers.loss_weight = {"loss_cls": 3.0}
    assert layers.losses(layers(features), proposals)["loss_cls"] == 3 * plain


def test_what_detectron2_logs_and_the_calibration_are_logged(storage):
    layers = stage_two()
    layers.losses(layers(torch.randn(11, D)), images())
    logged = {name: value for name, (value, _) in storage.latest().items()}
    assert {"fast_rcnn/cls_accuracy", "fast_rcnn/fg_cls_accuracy", "fast_rcnn/false_negative"} <= set(logged)
    assert logged["disalign/magnitude_max"] == layers.cls_score.calibration.magnitude.max().item()
    assert 0 < logged["disalign/confidence_mean"] < 1


# --------------------------------------------------------------------------------------------- nothing to learn


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
@pytest.mark.parametrize("proposals", [[], [regions()], [regions(), regions()]], ids=["no image", "one", "two"])
def test_no_region_gives_0_and_no_gradient(proposals, reduction):
    layers = stage_two(reduction=reduction)
    loss = layers.losses(layers(torch.randn(0, D)), proposals)["loss_cls"]
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in layers.cls_score.calibration.parameters())


def test_background_alone_gives_a_finite_loss():
    layers = stage_two()
    image = regions(BACKGROUND, BACKGROUND)
    image.remove("gt_boxes")  # Detectron2 gives none to an image without ground truth
    scores, deltas = layers(torch.randn(2, D))
    loss = layers.losses((scores, deltas), [image])["loss_cls"]
    loss.backward()
    expected = -torch.log_softmax(scores.double(), dim=1)[:, K].mean()
    torch.testing.assert_close(loss.double(), expected)
    assert all(p.grad.isfinite().all() for p in layers.cls_score.calibration.parameters())


# ---------------------------------------------------------------------------------------------------- counts


def test_counts_are_asked_for_once_and_never_for_inference():
    asked = []

    def counts():
        asked.append(1)
        return COUNTS

    layers = stage_two(class_counts=counts).eval()
    with torch.no_grad():
        image = regions(0, 0, 0)
        layers.inference(layers(torch.randn(3, D)), [image])
    layers.state_dict()
    assert not asked
    for _ in range(2):
        layers.train().losses(layers(torch.randn(11, D)), images())
    assert asked == [1]
    assert layers.loss.class_counts.tolist() == COUNTS


def test_a_config_asks_for_no_counts_until_training(tmp_path):
    missing = str(tmp_path / "gone.json")
    model = build_model(tiny_cfg("MODEL.DISALIGN.CLASS_COUNTS", missing, calibrate=True))
    with pytest.raises(InputError, match=r"expected a JSON file or a bundled name .*gone\.json"):
        model.roi_heads.box_predictor.resolve_class_counts()


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (None, r"expected class counts for stage two, got none; set MODEL\.DISALIGN\.CLASS_COUNTS, or"),
        (lambda: None, "expected class counts for stage two, got none"),
        (COUNTS[:-1], "expected one class count for each of the 5 classes, got 4; do the counts belong to this"),
        (lambda: [*COUNTS, 1], "expected one class count for each of the 5 classes, got 6"),
        ([3, 0, 1, 1, 0], "expected at least one training example per class, got none for class 1, 4"),
        ([3, -1, 1, 1, 2], "expected .*counts"),
        ("lvis_v1", "for each of the 5 classes, got 1203"),
    ],
)
def test_bad_counts_are_refused_at_the_first_loss(counts, sentence):
    layers = stage_two(class_counts=counts)
    for _ in range(2):  # not only the first time
        with pytest.raises(InputError, match=sentence):
            layers.losses(layers(torch.randn(11, D)), images())


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        dict(use_sigmoid_ce=True),
        dict(
            use_sigmoid_ce=True,
            use_fed_loss=True,
            fed_loss_num_classes=3,
            get_fed_loss_cls_weights=lambda: torch.ones(K),
        ),
    ],
)
def test_sigmoid_and_federated_loss_have_no_background_to_calibrate_beside(options):
    with pytest.raises(InputError, match="expected softmax cross-entropy in stage two, got sigmoid or federated loss"):
        stage_two(**options)
    # Stage one may use them.
    layers = DisAlignOutputLayers(ShapeSpec(channels=D), calibrate=False, **STOCK, **options)
    assert set(layers.losses(layers(torch.randn(11, D)), images())) == {"loss_cls", "loss_box_reg"}


@pytest.mark.parametrize("calibrate", [True, False])
def test_an_unknown_classifier_is_refused(calibrate):
    with pytest.raises(InputError, match="expected the classifier 'linear' or 'cosine', got 'norm'"):
        DisAlignOutputLayers(ShapeSpec(channels=D), classifier="norm", calibrate=calibrate, **STOCK)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(confidence="two"), "expected confidence 'learnt' or 'one', got 'two'"),
        (dict(learn_magnitude=False, learn_margin=False), "expected magnitude or margin to be learnt, got neither"),
        (dict(reduction="sum of"), "expected a reduction among .*, got 'sum of'"),
        (dict(background_weight=-1.0), "expected a finite background weight >= 0, or 'balanced', got -1"),
    ],
)
def test_bad_options_are_refused_when_it_is_built(options, sentence):
    with pytest.raises(InputError, match=sentence):
        stage_two(**options)


def test_a_model_that_was_not_frozen_is_refused():
    layers = lively(DisAlignOutputLayers(ShapeSpec(channels=D), calibrate=True, class_counts=COUNTS, **STOCK))
    sentence = (
        r"expected a frozen model in stage two, .* build it with disalign_d2\.build_model, or call disalign_d2\.fr"
    )
    with pytest.raises(InputError, match=sentence):
        layers.losses(layers(torch.randn(11, D)), images())


# -------------------------------------------------------------------------------------------------- stage one


@pytest.mark.parametrize("agnostic", [False, True])
def test_without_calibration_it_is_detectron2s_own(agnostic):
    def built(kind):
        torch.manual_seed(3)
        return kind(ShapeSpec(channels=D), cls_agnostic_bbox_reg=agnostic, **STOCK)

    ours, stock = built(DisAlignOutputLayers), built(FastRCNNOutputLayers)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())

    lively(stock)
    ours.load_state_dict(stock.state_dict())
    features, proposals = torch.randn(11, D), images()
    results = []
    for layers in (ours, stock):
        predictions = layers(features)
        losses = layers.losses(predictions, proposals)
        sum(losses.values()).backward()
        found, _ = layers.inference(predictions, copy.deepcopy(proposals))
        tensors = [*predictions, losses["loss_cls"], losses["loss_box_reg"], *(p.grad for p in layers.parameters())]
        for image in found:
            tensors += [image.pred_boxes.tensor, image.scores, image.pred_classes]
        results.append((list(losses), tensors))
    assert results[0][0] == results[1][0] == ["loss_cls", "loss_box_reg"]
    assert all(torch.equal(one, two) for one, two in zip(results[0][1], results[1][1], strict=True))
    assert all(tensor.any() for tensor in results[0][1][:4])


@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_cosine_stage_one_is_equation_3_under_plain_cross_entropy(learn_scale):
    layers = DisAlignOutputLayers(ShapeSpec(channels=D), classifier="cosine", scale=7, learn_scale=learn_scale, **STOCK)
    lively(layers)
    features, proposals = torch.randn(11, D), images()
    scores, deltas = layers(features)
    for i, x in enumerate(features.double()):
        for j, w in enumerate(layers.cls_score.weight.detach().double()):
            cosine = float(x @ w) / math.sqrt(float(x @ x) * float(w @ w))
            assert scores[i, j].item() == pytest.approx(7 * cosine, abs=1e-5)
    losses = layers.losses((scores, deltas), proposals)
    labels = torch.cat([image.gt_classes for image in proposals])
    torch.testing.assert_close(losses["loss_cls"], -torch.log_softmax(scores, 1)[range(11), labels].mean())
    assert losses["loss_box_reg"] > 0
    losses["loss_cls"].backward()
    trains = {name for name, parameter in layers.named_parameters() if parameter.grad is not None}
    assert trains == {"cls_score.weight"} | ({"cls_score.scale"} if learn_scale else set())


def test_the_scale_starts_at_20_and_a_fixed_one_stays_there():
    layers = DisAlignOutputLayers(ShapeSpec(channels=D), classifier="cosine", **STOCK)
    assert layers.cls_score.scale.item() == 20
    fixed = DisAlignOutputLayers(ShapeSpec(channels=D), classifier="cosine", learn_scale=False, **STOCK)
    assert fixed.cls_score.scale.item() == 20
    assert "cls_score.scale" not in dict(fixed.named_parameters())
    assert list(fixed.state_dict()) == ["cls_score.weight", "cls_score.scale", "bbox_pred.weight", "bbox_pred.bias"]


CALIBRATION = [f"cls_score.calibration.{part}" for part in ("magnitude", "margin", "confidence.weight")]


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_stage_ones_names_are_the_model_zoos(classifier, calibrate):
    layers = DisAlignOutputLayers(ShapeSpec(channels=D), classifier=classifier, calibrate=calibrate, **STOCK)
    new = {*CALIBRATION, "cls_score.calibration.confidence.bias"} if calibrate else set()
    stock = set(FastRCNNOutputLayers(ShapeSpec(channels=D), **STOCK).state_dict())
    if classifier == "cosine":
        stock = (stock - {"cls_score.bias"}) | {"cls_score.scale"}
    assert set(layers.state_dict()) == stock | new


# -------------------------------------------------------------------------------------------------- the config


def test_every_key_reaches_the_predictor(tmp_path):
    (tmp_path / "counts.json").write_text("[9, 8, 7, 6, 5]")
    options = dict(
        SCALE=5.0,
        LEARN_SCALE=False,
        RHO=1.3,
        REDUCTION="mean",
        BACKGROUND_WEIGHT=4.0,
        CLASS_COUNTS=str(tmp_path / "counts.json"),
        MARGIN=False,
        CONFIDENCE="one",
    )
    pairs = [item for key, value in options.items() for item in (f"MODEL.DISALIGN.{key}", value)]
    layers = build_model(tiny_cfg(*pairs, calibrate=True, classifier="cosine")).roi_heads.box_predictor
    assert (layers.cls_score.scale.item(), layers.cls_score.scale.requires_grad) == (5, False)
    assert "scale" not in dict(layers.cls_score.named_parameters())
    assert [name for name, _ in layers.cls_score.calibration.named_parameters()] == ["magnitude"]
    layers.resolve_class_counts()
    kept = layers.loss.metadata()
    assert (kept["rho"], kept["reduction"], kept["background_weight"]) == (1.3, "mean", 4.0)
    assert kept["class_counts"] == [9, 8, 7, 6, 5]
    other = build_model(tiny_cfg("MODEL.DISALIGN.MAGNITUDE", False, calibrate=True)).roi_heads.box_predictor
    assert "magnitude" not in dict(other.cls_score.calibration.named_parameters())
