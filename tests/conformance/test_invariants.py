"""Every adapter x every invariant of the method. A new adapter joins in adapters.py and needs no test here."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disalign import AdaptiveCalibration, InputError, assert_frozen, load_stage_one

from .adapters import parameters

pytestmark = pytest.mark.parametrize("adapter", parameters())

REDUCTIONS = ["weighted_mean", "mean"]
ORDER = [2, 0, 3, 1]


def calibration(model):
    (found,) = [module for module in model.modules() if isinstance(module, AdaptiveCalibration)]
    return found


def trained(adapter):
    """A stage-two model whose calibration is anywhere but at its start."""
    model = adapter.stage_two()
    with torch.no_grad():
        for parameter in calibration(model).parameters():
            parameter.normal_()
    return model


def inputs_of_calibration(adapter, model, inputs):
    """The scores and features that the calibration sees, and what the adapter gives for them."""
    seen = []
    handle = calibration(model).register_forward_pre_hook(lambda _, args: seen.append([a.detach() for a in args]))
    result = adapter.scores(model, inputs)
    handle.remove()
    (arguments,) = seen
    return (*arguments, *result)


def step(adapter, model, loss, optimizer, batch):
    inputs, target = batch
    optimizer.zero_grad()
    loss(adapter.scores(model, inputs)[1], target).backward()
    optimizer.step()


def sgd(model, lr=0.1):
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)


# -------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_stage_two_starts_at_stage_ones_scores_whatever_the_confidence(adapter, scale):
    model = adapter.stage_two()
    with torch.no_grad():
        for parameter in calibration(model).confidence.parameters():
            parameter.normal_().mul_(scale)
    stage_one, calibrated = adapter.scores(model, adapter.batch(8)[0])
    assert stage_one.any()
    assert torch.equal(calibrated, stage_one)


def test_exactly_magnitude_margin_and_confidence_train(adapter):
    model = adapter.stage_two()
    training = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(training) == set(adapter.trainable)
    parts = {"magnitude", "margin", "confidence.weight", "confidence.bias"}
    assert {name.split("calibration.")[-1] for name in training} == parts
    feature_dim = calibration(model).confidence.weight.shape[1]
    assert sum(parameter.numel() for parameter in training.values()) == 2 * adapter.num_classes + feature_dim + 1


# ------------------------------------------------------------------------------------------------------ training


def test_training_moves_what_trains_and_not_one_bit_of_the_rest(adapter):
    model = adapter.stage_two()
    loss, optimizer = adapter.loss(adapter.class_counts, rho=1.2), sgd(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with assert_frozen(model, adapter.trainable):
        for _ in range(2):
            model.train()
            step(adapter, model, loss.train(), optimizer, adapter.batch(8))
            model.eval()
            with torch.no_grad():
                adapter.scores(model, adapter.batch(8)[0])
            model.train()
            step(adapter, model, loss, optimizer, adapter.batch(8))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(adapter.trainable)


def test_train_changes_no_score(adapter):
    model, inputs = trained(adapter), adapter.batch(8)[0]
    _, evaluated = adapter.scores(model.eval(), inputs)
    _, training = adapter.scores(model.train(), inputs)
    assert torch.equal(training, evaluated)


def test_it_works_in_ddp_without_find_unused_parameters(adapter, process_group):
    class Calibrated(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return adapter.scores(self.model, inputs)[1]

    model = adapter.stage_two()
    twin = copy.deepcopy(model)
    loss, batch = adapter.loss(adapter.class_counts, rho=1.2), adapter.batch(8)
    parallel, optimizer = DistributedDataParallel(Calibrated(model)), sgd(model)
    alone = sgd(twin)
    with assert_frozen(model, adapter.trainable):
        for _ in range(2):  # DDP complains about an unused parameter at the next forward
            optimizer.zero_grad()
            loss(parallel.train()(batch[0]), batch[1]).backward()
            optimizer.step()
            step(adapter, twin.train(), loss, alone, batch)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_finite_under_autocast(adapter, dtype):
    model, loss = trained(adapter).train(), adapter.loss(adapter.class_counts, rho=1.2)
    inputs, target = adapter.batch(8)
    with torch.autocast("cpu", dtype):
        _, calibrated = adapter.scores(model, inputs)
        value = loss(calibrated, target)
    value.backward()
    assert calibrated.dtype == value.dtype == torch.float32
    assert value.isfinite()
    assert all(model.get_parameter(name).grad.isfinite().all() for name in adapter.trainable)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["empty", "all ignored"])
def test_a_batch_without_labels_gives_zero_and_finite_gradients(adapter, kind, reduction):
    model, loss = trained(adapter).train(), adapter.loss(adapter.class_counts, rho=1.2, reduction=reduction)
    inputs, target = adapter.batch(0 if kind == "empty" else 8)
    value = loss(adapter.scores(model, inputs)[1], torch.full_like(target, adapter.ignore_index))
    value.backward()
    assert value == 0
    for name in adapter.trainable:
        gradient = model.get_parameter(name).grad
        assert torch.equal(gradient, torch.zeros_like(gradient))


# ----------------------------------------------------------------------------------------------------- hand-over


def test_a_stage_one_checkpoint_is_loaded_in_full(adapter):
    stage_one, model = adapter.stage_one().state_dict(), adapter.stage_two()
    done = load_stage_one(model, stage_one)
    assert set(done.new) == set(adapter.trainable)
    assert set(done.loaded) == set(stage_one)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stage_one.items())


def test_a_stage_one_checkpoint_without_any_one_tensor_is_refused(adapter):
    stage_one, model = adapter.stage_one().state_dict(), adapter.stage_two()
    # A file without any counter is from before BatchNorm counted its batches, and whole.
    counters = [name for name in stage_one if name.endswith("num_batches_tracked")]
    for name in stage_one.keys() - (counters if len(counters) == 1 else ()):
        with pytest.raises(InputError, match="lacks 1"):
            load_stage_one(model, {other: tensor for other, tensor in stage_one.items() if other != name})


def test_a_state_dict_brings_the_scores_back(adapter, tmp_path):
    model, restored, inputs = trained(adapter).eval(), adapter.stage_two().eval(), adapter.batch(8)[0]
    torch.save(model.state_dict(), tmp_path / "two.pth")
    restored.load_state_dict(torch.load(tmp_path / "two.pth", weights_only=True))
    for before, after in zip(adapter.scores(model, inputs), adapter.scores(restored, inputs), strict=True):
        assert torch.equal(before, after)


# ------------------------------------------------------------------------------------ what must not be touched


def test_the_background_is_not_calibrated(adapter):
    stage_one, calibrated = adapter.scores(trained(adapter), adapter.batch(8)[0])
    k = adapter.num_classes
    assert stage_one.shape[1] == k + adapter.passthrough
    assert torch.equal(calibrated[:, k:], stage_one[:, k:])
    assert not torch.isclose(calibrated[:, :k], stage_one[:, :k]).all(dim=0).any()


def test_ignored_entries_do_not_count(adapter):
    loss, (inputs, target) = adapter.loss(adapter.class_counts, rho=1.2), adapter.batch(8)
    scores = adapter.scores(trained(adapter), inputs)[1].detach()
    ignored = (target == adapter.ignore_index).unsqueeze(1)
    assert ignored.any()
    other = torch.where(ignored, torch.randn_like(scores) * 100, scores).requires_grad_()
    value = loss(other, target)
    value.backward()
    assert value == loss(scores, target)
    assert not other.grad.masked_select(ignored).any()


# ------------------------------------------------------------------------------------------------------ the loss


def single_losses(adapter, **options):
    """The loss of one label of each calibrated class at equal scores: log(C) times its weight."""
    place = adapter.batch(1)[1].shape[1:]
    columns = adapter.num_classes + adapter.passthrough
    loss, scores = adapter.loss(adapter.class_counts, reduction="mean", **options), torch.zeros(1, columns, *place)
    each = [loss(scores, torch.full((1, *place), label)) for label in range(columns)]
    return torch.stack(each).double() / np.log(columns)


@pytest.mark.parametrize("rho", [0.5, 1.2])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_weights_follow_r_to_the_minus_rho(adapter, rho, normalize):
    weights = single_losses(adapter, rho=rho, normalize=normalize)
    k = adapter.num_classes
    expected = np.array(adapter.class_counts, dtype=np.float64) ** -rho
    expected *= (k if normalize == "mean" else 1) / expected.sum()
    np.testing.assert_allclose(weights[:k], expected, rtol=1e-5)
    np.testing.assert_allclose(weights[k:], 1, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rho_zero_is_plain_cross_entropy(adapter, normalize, reduction):
    inputs, target = adapter.batch(8)
    k = adapter.num_classes
    # The background keeps its weight of 1, whatever the normalisation of the others.
    target = target.where(target < k, adapter.ignore_index)
    scores = adapter.scores(trained(adapter), inputs)[1].detach()
    value = adapter.loss(adapter.class_counts, rho=0, reduction=reduction, normalize=normalize)(scores, target)
    plain = F.cross_entropy(scores, target, ignore_index=adapter.ignore_index)
    share = 1 / k if (normalize, reduction) == ("sum", "mean") else 1
    torch.testing.assert_close(value, plain * share)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_order_of_the_classes_does_not_matter(adapter, reduction):
    model, (inputs, target) = trained(adapter), adapter.batch(8)
    k, columns = adapter.num_classes, adapter.num_classes + adapter.passthrough
    order = torch.tensor([*ORDER, *range(len(ORDER), k)])
    places = torch.cat([order, torch.arange(k, columns)])
    z, x, _, calibrated = inputs_of_calibration(adapter, model, inputs)

    renamed = copy.deepcopy(calibration(model))
    with torch.no_grad():
        renamed.magnitude.copy_(renamed.magnitude[order])
        renamed.margin.copy_(renamed.margin[order])
    scores = renamed(z[:, places], x)
    assert torch.equal(scores, calibrated[:, places])

    valid = target != adapter.ignore_index
    other = torch.where(valid, places.argsort()[target.where(valid, 0)], target)
    counts = torch.tensor(adapter.class_counts)
    loss = adapter.loss(counts.tolist(), rho=1.2, reduction=reduction)(calibrated, target)
    moved = adapter.loss(counts[order].tolist(), rho=1.2, reduction=reduction)(scores, other)
    torch.testing.assert_close(moved, loss)
    loss.backward()
    moved.backward()
    for name, rows in (("magnitude", order), ("margin", order), ("confidence.weight", slice(None))):
        gradient = calibration(model).get_parameter(name).grad
        torch.testing.assert_close(renamed.get_parameter(name).grad, gradient[rows])


# ----------------------------------------------------------------------------------------------------- reference


def reference(z, x, parameters, target, counts, rho, reduction, ignore_index):
    """Eq. 4-5 and 8-11 one entry at a time in float64: scores, loss and the gradients of what trains."""
    alpha, beta, v, b = parameters
    k, (entries, columns) = len(alpha), z.shape
    weight = np.ones(columns)
    weight[:k] = (1 / counts) ** rho
    weight[:k] *= k / weight[:k].sum()
    scores, loss, divisor = z.copy(), 0.0, 0.0
    gradients = [np.zeros_like(parameter) for parameter in parameters]
    for i in range(entries):
        c = 1 / (1 + np.exp(-(v @ x[i] + b)))
        for j in range(k):
            scores[i, j] = c * (alpha[j] * z[i, j] + beta[j]) + (1 - c) * z[i, j]
        if (y := target[i]) == ignore_index:
            continue
        p = np.exp(scores[i] - scores[i].max())
        p /= p.sum()
        loss -= weight[y] * np.log(p[y])
        divisor += weight[y] if reduction == "weighted_mean" else 1
        p[y] -= 1
        u = weight[y] * p[:k]
        slope = u @ ((alpha - 1) * z[i, :k] + beta) * c * (1 - c)
        for gradient, part in zip(gradients, (u * c * z[i, :k], u * c, slope * x[i], slope), strict=True):
            gradient += part
    return scores, loss / divisor, [gradient / divisor for gradient in gradients]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scores_loss_and_gradients_equal_a_float64_reference(adapter, reduction):
    model, (inputs, target) = trained(adapter).train(), adapter.batch(8)
    z, x, stage_one, calibrated = inputs_of_calibration(adapter, model, inputs)
    assert torch.equal(z, stage_one)
    loss = adapter.loss(adapter.class_counts, rho=1.2, reduction=reduction)(calibrated, target)
    loss.backward()

    def rows(tensor):
        return tensor.detach().movedim(1, -1).flatten(0, -2).double().numpy()

    learnt = calibration(model)
    trains = [learnt.magnitude, learnt.margin, learnt.confidence.weight, learnt.confidence.bias]
    shapes = [(-1,), (-1,), (-1,), ()]
    scores, value, gradients = reference(
        rows(z),
        rows(x),
        [p.detach().double().numpy().reshape(shape) for p, shape in zip(trains, shapes, strict=True)],
        target.flatten().numpy(),
        np.array(adapter.class_counts, dtype=np.float64),
        1.2,
        reduction,
        adapter.ignore_index,
    )
    np.testing.assert_allclose(rows(calibrated), scores, rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    for parameter, expected in zip(trains, gradients, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy().ravel(), np.ravel(expected), rtol=1e-4, atol=1e-6)
