"""Frozen: no gradients, no drift, no dropout, whatever calls train()."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.models import COUNTS, SmallCNN
from disalign import InputError, assert_frozen, freeze_except, wrap_classifier
from disalign.freezing import fingerprints, frozen_tensors


class Nested(nn.Module):
    """A frozen CNN and a part that trains, with dropout of its own, one level down."""

    def __init__(self):
        super().__init__()
        self.trunk = SmallCNN()
        self.head = nn.ModuleDict({"kept": nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), "other": nn.Linear(5, 5)})

    def forward(self, images):
        return self.head["kept"](self.head["other"](self.trunk(images)))


IMAGES = torch.linspace(-3, 3, 4 * 64).view(4, 1, 8, 8)


def training_flags(model):
    return {name for name, module in model.named_modules() if module.training}


def test_only_the_named_part_gets_gradients():
    model = Nested()
    freeze_except(model, ["head.kept"])
    model(IMAGES).sum().backward()
    kept = {"head.kept.0.weight", "head.kept.0.bias"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == kept
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == kept


def test_a_single_parameter_may_be_named():
    model = SmallCNN()
    report = freeze_except(model, ["fc.bias"])
    assert report.trainable == {"fc.bias": (5,)}
    assert training_flags(model.train()) == set()


def test_a_name_covers_what_is_below_it_and_not_what_starts_alike():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert set(freeze_except(model, ["fc"]).trainable) == {"fc.weight", "fc.bias"}


def test_the_report_says_what_trains():
    report = freeze_except(Nested(), ["head.kept"])
    assert report.trainable == {"head.kept.0.weight": (5, 5), "head.kept.0.bias": (5,)}
    assert report.num_trainable == 30
    assert report.num_frozen_tensors == len(Nested().state_dict()) - 2
    assert str(report) == "30 numbers train (head.kept.0.weight [5, 5], head.kept.0.bias [5]); 13 tensors are frozen"


def test_train_reaches_the_named_part_only():
    model = Nested()
    freeze_except(model, ["head.kept"])
    assert training_flags(model.train()) == {"head.kept", "head.kept.0", "head.kept.1"}
    assert training_flags(model.eval()) == set()


@pytest.mark.parametrize("training", [True, False])
def test_freezing_keeps_the_mode_of_the_named_part(training):
    model = Nested().train(training)
    freeze_except(model, ["head.kept"])
    assert model.head["kept"].training == training
    assert not model.trunk.training


def test_train_and_eval_return_the_model():
    model = Nested()
    freeze_except(model, ["head.kept"])
    assert model.train() is model
    assert model.eval() is model


def test_batchnorm_and_dropout_keep_still_through_train():
    # SmallCNN also applies dropout in its own forward, by its own flag.
    model, _ = wrap_classifier(SmallCNN(), COUNTS)
    before = model.eval()(IMAGES)
    with assert_frozen(model, ["fc.calibration"]):
        for _ in range(3):
            assert torch.equal(model.train()(IMAGES), before)


def test_a_parents_train_does_not_wake_it():
    model, _ = wrap_classifier(SmallCNN(), COUNTS)
    parent = nn.Sequential(model, nn.Dropout()).train()
    assert training_flags(model) == {"fc.calibration", "fc.calibration.confidence"}
    assert parent[1].training


def test_a_deep_copy_freezes_itself():
    model, _ = wrap_classifier(SmallCNN(), COUNTS)
    twin = copy.deepcopy(model).train()
    model.eval()
    assert training_flags(twin) == {"fc.calibration", "fc.calibration.confidence"}
    assert training_flags(model) == set()


def test_ddps_train_does_not_wake_it(process_group):
    model, _ = wrap_classifier(SmallCNN(), COUNTS)
    parallel = DistributedDataParallel(model).train()
    before = model(IMAGES)
    with assert_frozen(model, ["fc.calibration"]):
        assert torch.equal(parallel(IMAGES), before)
    assert training_flags(model) == {"fc.calibration", "fc.calibration.confidence"}


def test_a_models_own_train_still_runs():
    class Own(SmallCNN):
        def train(self, mode=True):
            super().train(mode)
            self.asked = mode
            return self

    model = Own()
    freeze_except(model, ["fc"])
    model.train()
    assert model.asked is False
    assert training_flags(model) == {"fc"}


def test_unknown_names_are_refused_and_nothing_is_frozen():
    model = Nested()
    with pytest.raises(InputError, match=r"to keep training, got head\.kep, tail"):
        freeze_except(model, ["head.kep", "head.kept", "tail"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_train_is_refused():
    with pytest.raises(InputError, match=r"expected something to train, but neck\.1 holds no parameters"):
        freeze_except(SmallCNN(), ["neck.1"])


# -------------------------------------------------------------------------------------------------- assert_frozen


def flip_lowest_bit(tensor):
    tensor.detach().flatten().view(torch.uint8)[0] ^= 1


class WithHidden(SmallCNN):
    def __init__(self):
        super().__init__()
        self.register_buffer("hidden", torch.ones(2), persistent=False)


@pytest.mark.parametrize("name", ["conv.weight", "bn.running_var", "bn.num_batches_tracked", "hidden"])
def test_one_flipped_bit_is_seen(name):
    model = WithHidden()
    tensor = dict(model.named_parameters()) | dict(model.named_buffers())
    with (
        pytest.raises(RuntimeError, match=rf"10 frozen tensors to stay bit-identical, but changed: {name}$"),
        assert_frozen(model, ["fc"]),
    ):
        flip_lowest_bit(tensor[name].view(-1))


def test_a_changed_sign_of_zero_is_seen():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias.zero_()
    with pytest.raises(RuntimeError, match="bias"), assert_frozen(model, ["weight"]), torch.no_grad():
        model.bias.neg_()


def test_a_changed_dtype_is_seen():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="weight, bias"), assert_frozen(model, []):
        model.double()


def test_a_new_frozen_tensor_is_seen():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="late"), assert_frozen(model, []):
        model.register_buffer("late", torch.ones(1))


def test_what_trains_may_change():
    model = SmallCNN()
    with assert_frozen(model, ["fc"]), torch.no_grad():
        model.fc.weight.add_(1)


def test_drifting_batchnorm_statistics_are_seen():
    # What freezing by requires_grad alone, as the official code does, lets happen.
    model = SmallCNN().requires_grad_(False).train()
    with pytest.raises(RuntimeError, match=r"bn\.running_mean, bn\.running_var"), assert_frozen(model, ["fc"]):
        model(IMAGES)


def test_an_error_inside_is_not_replaced():
    model = SmallCNN()

    def fail():
        flip_lowest_bit(model.fc.weight)
        raise KeyError

    with pytest.raises(KeyError), assert_frozen(model, []):
        fail()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_dtype_and_shape_has_a_fingerprint(dtype):
    tensors = [torch.tensor(1), torch.ones(0, 3), torch.ones(3, 2).T]
    assert len(set(fingerprints({str(i): tensor.to(dtype) for i, tensor in enumerate(tensors)}).values())) == 3


def test_frozen_tensors_are_all_but_the_named():
    names = set(frozen_tensors(WithHidden(), ["fc", "conv.bias"]))
    assert names == set(SmallCNN().state_dict()) - {"fc.weight", "fc.bias", "conv.bias"} | {"hidden"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_freezes_itself(copied):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    freeze_except(model, ["1"])
    other = copied(model).train()
    assert other[1].training
    assert not other[0].training
    other.eval()
    assert not other[1].training
