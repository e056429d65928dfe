"""Losses of stage one: against their equations, in configs, and through the commands."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from disalign import CosineClassifier, GRWCrossEntropyLoss, InputError
from disalign.cli import find_config
from disalign_cls import fit, losses
from disalign_cls.datasets import DigitsLT
from disalign_cls.losses import BalancedSoftmaxLoss, EffectiveNumberLoss, EqualizationLoss, FocalLoss, LDAMLoss
from disalign_mmengine.cli import load_config

from .runs import BASELINE, DISALIGN, quick, train
from .test_train import launch

COUNTS = [100, 40, 7, 2, 1]
K = len(COUNTS)
SCALE = 12.0
#: Each loss, without randomness.
ALL = {
    "focal": lambda: FocalLoss(),
    "focal, small gamma": lambda: FocalLoss(0.5),
    "effective number": lambda: EffectiveNumberLoss(),
    "LDAM": lambda: LDAMLoss(),
    "LDAM, re-weighted": lambda: LDAMLoss(defer_until=0),
    "equalization": lambda: EqualizationLoss(1.0, tail_share=0.1),
    "balanced softmax": lambda: BalancedSoftmaxLoss(),
}
EVERY = pytest.mark.parametrize("name", ALL)
#: Type -> its options for the digits (242 images, 100 down to 1), and the classifier.
OPTIONS = {
    "FocalLoss": ({"gamma": 1.5}, "linear"),
    "EffectiveNumberLoss": ({"beta": 0.99}, "linear"),
    "LDAMLoss": ({"max_margin": 0.4, "defer_until": 1, "beta": 0.999}, "cosine"),
    "EqualizationLoss": ({"gamma": 0.9, "tail_share": 0.03}, "linear"),
    "BalancedSoftmaxLoss": ({}, "linear"),
}


def with_counts(loss, counts=COUNTS):
    loss.set_class_counts(torch.tensor(counts))
    return loss


def classifier():
    return CosineClassifier(4, K, scale=SCALE)


def batch(number=12, spread=3.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    scores = spread * torch.randn(number, K, generator=draw)
    return scores.to(dtype), torch.arange(number) % K


def chosen(name, **options):
    """--cfg-options of a loss."""
    values = {"type": name, **options}
    return [f"model.stage_one_loss.{key}={value}" for key, value in values.items()]


# ----------------------------------------------------------------------------------- the equations, image by image


def cross_entropy(z, y, kept=None):
    return -math.log(math.exp(z[y]) / sum(math.exp(z[k]) for k in range(K) if kept is None or kept[k]))


def focal(z, y, gamma):
    total = 0.0
    for k in range(K):
        p = 1 / (1 + math.exp(-z[k]))
        p_t = p if k == y else 1 - p
        total -= (1 - p_t) ** gamma * math.log(p_t)
    return total


def effective(beta):
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [K * w / sum(raw) for w in raw]


def ldam(z, y):
    z = list(z)
    c = 0.5 * min(COUNTS) ** 0.25
    z[y] = SCALE * (z[y] / SCALE - c / COUNTS[y] ** 0.25)
    return cross_entropy(z, y)


def balanced(z, y):
    return -math.log(COUNTS[y] * math.exp(z[y]) / sum(n * math.exp(v) for n, v in zip(COUNTS, z, strict=True)))


def equalized(z, y):
    # 10 % of 150 images: the classes of 7, 2 and 1.
    return cross_entropy(z, y, [k == y or COUNTS[k] >= 15 for k in range(K)])


def expected(name, scores, labels):
    z, y = scores.double().numpy(), labels.tolist()
    images = list(zip(z, y, strict=True))
    if name == "effective number":
        weight = effective(0.9999)
        return np.mean([weight[y] * cross_entropy(z, y) for z, y in images])
    if name == "LDAM, re-weighted":
        weight = effective(0.9999)
        return sum(weight[y] * ldam(z, y) for z, y in images) / sum(weight[y] for _, y in images)
    of_one = {
        "focal": lambda z, y: focal(z, y, 2.0),
        "focal, small gamma": lambda z, y: focal(z, y, 0.5),
        "LDAM": ldam,
        "equalization": equalized,
        "balanced softmax": balanced,
    }[name]
    return np.mean([of_one(z, y) for z, y in images])


@EVERY
def test_it_is_its_equation(name):
    scores, labels = batch()
    found = with_counts(ALL[name]())(scores, labels, classifier())
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(expected(name, scores, labels), rel=1e-5)


@EVERY
def test_its_gradient_is_that_of_its_equation(name):
    scores, labels = batch(6)
    scores = scores.double().requires_grad_()
    with_counts(ALL[name]())(scores, labels, classifier().double()).backward()
    step = 1e-5
    for i, k in itertools.product(range(len(scores)), range(K)):
        shift = torch.zeros_like(scores)
        shift[i, k] = step
        up, down = (expected(name, (scores + sign * shift).detach(), labels) for sign in (1, -1))
        # The tables are fp32.
        assert float(scores.grad[i, k]) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)


def test_equalization_draws_anew_for_each_image_and_class():
    scores, gamma = torch.tensor([1.0, 0.5, 2.0, 3.0, 3.0]), 0.6
    mean = 0.0
    for drawn in itertools.product((True, False), repeat=2):  # of classes 3 and 4; 2 is the label
        chance = math.prod(gamma if b else 1 - gamma for b in drawn)
        mean += chance * cross_entropy(scores.tolist(), 2, [True] * 3 + [not b for b in drawn])
    torch.manual_seed(0)
    loss = with_counts(EqualizationLoss(gamma, tail_share=0.1))
    images = 40_000
    found = float(loss(scores.expand(images, K), torch.full((images,), 2), classifier()))
    assert found == pytest.approx(mean, abs=0.02)
    # With one draw for all classes of an image it would be another number.
    together = [cross_entropy(scores.tolist(), 2, [True] * 3 + [kept] * 2) for kept in (False, True)]
    assert abs(gamma * together[0] + (1 - gamma) * together[1] - mean) > 0.1


# --------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize(
    "loss",
    [
        EffectiveNumberLoss(0),
        LDAMLoss(0),
        LDAMLoss(0, defer_until=0, beta=0),
        EqualizationLoss(0, tail_share=0.1),
    ],
    ids=str,
)
def test_it_becomes_cross_entropy(loss):
    scores, labels = batch()
    torch.testing.assert_close(with_counts(loss)(scores, labels, classifier()), F.cross_entropy(scores, labels))


@pytest.mark.parametrize("loss", [EffectiveNumberLoss(), BalancedSoftmaxLoss()], ids=str)
def test_for_balanced_data_it_is_cross_entropy(loss):
    scores, labels = batch()
    found = with_counts(loss, [30] * K)(scores, labels, classifier())
    torch.testing.assert_close(found, F.cross_entropy(scores, labels))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_the_focal_loss_is_torchvisions(gamma):
    scores, labels = batch()
    targets = F.one_hot(labels, K).float()
    theirs = sigmoid_focal_loss(scores, targets, alpha=-1, gamma=gamma, reduction="sum") / len(scores)
    torch.testing.assert_close(FocalLoss(gamma)(scores, labels, classifier()), theirs)
    if gamma == 0:
        torch.testing.assert_close(theirs, F.binary_cross_entropy_with_logits(scores, targets) * K)


def test_near_beta_1_the_weights_are_inverse_to_the_counts():
    weights = losses.effective_number_weights(torch.tensor(COUNTS).double(), 1 - 1e-12)
    inverse = np.array([1 / n for n in COUNTS])
    np.testing.assert_allclose(weights.numpy(), K * inverse / inverse.sum(), rtol=1e-6)


# ------------------------------------------------------------------------------------- precision, odd input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY
def test_half_precision_scores_count_in_fp32(name, dtype):
    scores, labels = batch(dtype=dtype)
    loss = with_counts(ALL[name]())
    half = scores.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        found = loss(half, labels, classifier())
    found.backward()
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(scores.float(), labels, classifier()))
    assert half.grad.isfinite().all()
    assert half.grad.any()


@EVERY
def test_extreme_scores_give_a_finite_loss_and_gradient(name):
    for size in (1e2, 6e4, 1e30):
        scores = (size * torch.tensor([[1.0, -1, 0, 1, -1], [-1, 1, 1, -1, 1], [0, 0, 0, 0, 0]])).requires_grad_()
        found = with_counts(ALL[name]())(scores, torch.tensor([0, 0, 4]), classifier())
        found.backward()
        assert found.isfinite()
        assert scores.grad.isfinite().all()
        assert scores.grad.any()


@EVERY
def test_an_absent_class_counts_as_the_smallest(name):
    scores, labels = batch()
    with_none, with_two = (with_counts(ALL[name](), [100, 0, 7, 2, n]) for n in (2, 0))
    like = with_counts(ALL[name](), [100, 2, 7, 2, 2])
    for loss in (with_none, with_two):
        found = loss(scores, labels.clamp(max=0), classifier())
        assert torch.equal(found, like(scores, labels.clamp(max=0), classifier()))
        assert found.isfinite()


@pytest.mark.parametrize("label", [K, -1, -100])
@EVERY
def test_labels_out_of_range_are_refused(name, label):
    scores, _ = batch(1)
    with pytest.raises(InputError, match=rf"expected labels in \[0, {K}\), got {label}; check the annotations"):
        with_counts(ALL[name]())(scores, torch.tensor([label]), classifier())


@pytest.mark.parametrize("name", [name for name in ALL if "focal" not in name])
def test_it_needs_class_counts(name):
    with pytest.raises(InputError, match="expected class counts before the first loss, got none; call set_class_cou"):
        ALL[name]()(*batch(), classifier())


def test_equalization_without_a_rare_class_is_refused():
    with pytest.raises(InputError, match=r"a smaller share .* than 0.005, got 0.0067 and more; raise model.stage_on"):
        with_counts(EqualizationLoss())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FocalLoss(-1), "a finite gamma >= 0, got -1"),
        (lambda: FocalLoss(math.nan), "a finite gamma >= 0, got nan"),
        (lambda: FocalLoss("2"), "a finite gamma >= 0, got '2'"),
        (lambda: EffectiveNumberLoss(1), r"a beta in \[0, 1\), got 1"),
        (lambda: LDAMLoss(beta=-0.1), r"a beta in \[0, 1\), got -0.1"),
        (lambda: LDAMLoss(math.inf), "a finite max_margin >= 0, got inf"),
        (lambda: LDAMLoss(defer_until=-1), "defer_until to be an epoch >= 0 or None, got -1"),
        (lambda: LDAMLoss(defer_until=0.8), "defer_until to be an epoch >= 0 or None, got 0.8"),
        (lambda: EqualizationLoss(1.1), r"a gamma in \[0, 1\], got 1.1"),
        (lambda: EqualizationLoss(tail_share=0), "a finite tail_share > 0, got 0"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(InputError, match=f"^expected {message}$"):
        build()


# ------------------------------------------------------------------------------------------------- in the model


def model_of(name="linear", **loss):
    options = {f"model.stage_one_loss.{key}": value for key, value in loss.items()}
    torch.manual_seed(0)
    return MODELS.build(load_config(BASELINE[name], options).model).eval()


def images(number=16):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(number, 1, 8, 8, generator=draw), torch.arange(number) % 10


def test_the_default_is_cross_entropy_bit_for_bit():
    model, (inputs, labels) = model_of(), images()
    model.set_class_counts(DigitsLT("train").class_counts)
    found = model(inputs, labels, mode="loss")
    assert found.keys() == {"loss"}
    assert torch.equal(found["loss"], F.cross_entropy(model(inputs), labels))
    assert model.stage_one_loss is None
    assert model.metadata().keys() == {"class_counts"}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_model_trains_with_it_and_has_no_tensors_more(name):
    options, kind = OPTIONS[name]
    model, plain = model_of(kind, type=name, **options), model_of(kind)
    inputs, labels = images()
    model.set_class_counts(DigitsLT("train").class_counts)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    torch.manual_seed(1)
    found = model(inputs, labels, mode="loss")["loss"]
    torch.manual_seed(1)
    own = MODELS.build({"type": name, **options})
    own.set_class_counts(DigitsLT("train").class_counts)
    torch.testing.assert_close(found, own(model(inputs), labels, model.classifier))
    assert not torch.equal(found, F.cross_entropy(model(inputs), labels))
    assert model.metadata()["stage_one_loss"] == {"type": name, **options}


@pytest.mark.parametrize("counts_first", [True, False])
def test_its_table_is_where_the_classifier_is(counts_first):
    model, counts = model_of(type="BalancedSoftmaxLoss"), DigitsLT("train").class_counts
    if counts_first:
        model.set_class_counts(counts)
    model.to("meta")
    if not counts_first:
        model.set_class_counts(counts)
    assert model.stage_one_loss.table.device.type == "meta"


def test_a_learnt_scale_learns_from_the_margin():
    torch.manual_seed(0)
    layer, features = CosineClassifier(4, K, scale=SCALE), torch.randn(10, 4)
    labels = torch.arange(10) % K
    with_counts(LDAMLoss())(layer(features), labels, layer).backward()
    cosines, margins = (layer(features) / SCALE).detach(), 0.5 * torch.tensor(COUNTS) ** -0.25
    scale = torch.tensor(SCALE, requires_grad=True)
    F.cross_entropy(scale * (cosines - F.one_hot(labels, K) * margins), labels).backward()
    torch.testing.assert_close(layer.scale.grad, scale.grad)


def test_ldam_refuses_a_linear_classifier():
    message = "expected a cosine classifier for LDAMLoss, .* got Linear; set model.classifier='cosine'"
    with pytest.raises(InputError, match=message):
        model_of("linear", type="LDAMLoss")


@pytest.mark.parametrize("given", ["FoclLoss", "ImageClassifier", None])
def test_an_unknown_type_is_refused(given):
    known = "BalancedSoftmaxLoss, EffectiveNumberLoss, EqualizationLoss, FocalLoss, LDAMLoss"
    with pytest.raises(InputError, match=f"expected model.stage_one_loss.type to be one of {known}.*, got {given!r}"):
        model_of(type=given, gamma=1)


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", OPTIONS)
def test_stage_two_goes_on_from_it(name, tmp_path):
    options, kind = OPTIONS[name]
    given = chosen(name, **options)
    assert train(BASELINE[kind], tmp_path / "one", *given, epochs=1) == 0
    one = torch.load(tmp_path / "one" / "epoch_1.pth", weights_only=True)
    assert one["meta"]["disalign"]["stage_one_loss"] == {"type": name, **options}

    stage_one = str(tmp_path / "one" / "epoch_1.pth")
    assert fit.main([DISALIGN[kind], "--stage-one", stage_one, "--work-dir", str(tmp_path / "fit")]) == 0
    # A config of stage two that inherits the loss means stage two's own all the same.
    assert train(DISALIGN[kind], tmp_path / "two", f"stage_one={stage_one}", *given, epochs=1) == 0
    for path in ("fit/fit_rho-1.5.pth", "two/epoch_1.pth"):
        two = torch.load(tmp_path / path, weights_only=True)
        assert two["meta"]["disalign"]["rho"] == 1.5
        assert "stage_one_loss" not in two["meta"]["disalign"]
        assert all(torch.equal(two["state_dict"][key], tensor) for key, tensor in one["state_dict"].items())


def test_a_stage_twos_config_takes_none_of_its_bases_options(tmp_path):
    (tmp_path / "one.py").write_text(
        f'_base_ = "{find_config(BASELINE["linear"])}"\n'
        'model = dict(stage_one_loss=dict(type="FocalLoss", gamma=1.0))\n'
    )
    (tmp_path / "two.py").write_text(
        '_base_ = "one.py"\nmodel = dict(type="DisAlignClassifier", loss=dict(rho=0.7, reduction="mean"))\n'
    )
    one, two = (MODELS.build(load_config(str(tmp_path / f"{name}.py"), {}).model) for name in ("one", "two"))
    assert isinstance(one.stage_one_loss, FocalLoss)
    assert one.stage_one_loss.gamma == 1.0
    assert two.stage_one_loss is None
    assert type(two.loss) is GRWCrossEntropyLoss
    assert (two.loss.rho, two.loss.reduction) == (0.7, "mean")


def test_deferred_reweighting_begins_at_its_epoch_and_survives_resume(tmp_path, monkeypatch):
    seen = []

    def look(scores, labels, weight, reduction):
        seen.append(len(set(weight.tolist())) > 1)
        return losses_grw(scores, labels, weight, reduction)

    losses_grw = losses.grw_cross_entropy
    monkeypatch.setattr(losses, "grw_cross_entropy", look)
    given = chosen("LDAMLoss", defer_until=2)
    assert train(BASELINE["cosine"], tmp_path / "a", *given, epochs=3) == 0
    assert seen == [False] * 8 + [True] * 4  # 4 iterations an epoch
    seen.clear()
    assert train(BASELINE["cosine"], tmp_path / "b", *given, epochs=1) == 0
    assert train(BASELINE["cosine"], tmp_path / "b", *given, epochs=2, flags=["--resume"]) == 0
    assert seen == [False] * 8
    seen.clear()
    assert train(BASELINE["cosine"], tmp_path / "b", *given, epochs=4, flags=["--resume"]) == 0
    assert seen == [True] * 8
    seen.clear()
    assert train(BASELINE["cosine"], tmp_path / "c", *chosen("LDAMLoss"), epochs=1) == 0
    assert seen == [False] * 4


@pytest.mark.slow
def test_two_processes_train_with_it(tmp_path):
    options = ["visualizer.vis_backends=[]", "train_cfg.max_epochs=2", "train_cfg.val_interval=2"]
    given = chosen("LDAMLoss", defer_until=1)
    codes, errors = launch([BASELINE["cosine"], "--work-dir", str(tmp_path), "--cfg-options", *options, *given])
    assert codes == [0, 0], errors
    state = torch.load(tmp_path / "epoch_2.pth", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains_under_the_frameworks_amp(name, gpu_environment, tmp_path):
    options, kind = OPTIONS[name]
    command = [sys.executable, "-m", "disalign_cls.train", BASELINE[kind], "--amp", "--work-dir", str(tmp_path)]
    command += ["--cfg-options", *quick(), *chosen(name, **options)]
    done = subprocess.run(command, env=gpu_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "epoch_2.pth", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


class OwnLoss(losses.StageOneLoss):
    """One that a user would write: the label's score, less the logarithm of its count."""

    def loss(self, scores, labels, classifier):
        assert isinstance(classifier, nn.Linear)
        return (self.table.log()[labels] - scores[torch.arange(len(labels)), labels]).mean()


def test_a_loss_of_ones_own():
    MODELS.register_module(module=OwnLoss, force=True)
    try:
        model, (inputs, labels) = model_of(type="OwnLoss"), images(10)
        counts = DigitsLT("train").class_counts
        model.set_class_counts(counts)
        mine = np.mean([math.log(counts[k]) - float(model(inputs)[k, k].detach()) for k in range(10)])
        assert model(inputs, labels, mode="loss")["loss"].item() == pytest.approx(mine, rel=1e-5)
    finally:
        MODELS.module_dict.pop("OwnLoss")
