"""A hand-over from stage one to stage two that is complete or refused."""

import math

import pytest
import torch
from torch import nn

from core.models import COUNTS, SmallCNN
from disalign import InputError, freeze_except, load_stage_one, wrap_classifier
from disalign.freezing import fingerprints
from disalign.hand_over import require_finite, require_tensors, state_dict_of

NEW = tuple(f"fc.calibration.{part}" for part in ("magnitude", "margin", "confidence.weight", "confidence.bias"))
#: Of a linear classifier of 3 classes.
SHAPES = {"weight": (3, 4), "bias": (3,)}


def stage_two(kind="linear"):
    return wrap_classifier(SmallCNN(kind), COUNTS)[0]


def stage_one(kind="linear"):
    model = SmallCNN(kind)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    return model.state_dict()


def refused(model, checkpoint, match, **options):
    """It is refused with this sentence, and the model is the same to the bit."""
    before = fingerprints(model.state_dict())
    with pytest.raises(InputError, match=match):
        load_stage_one(model, checkpoint, **options)
    assert fingerprints(model.state_dict()) == before


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_every_frozen_tensor_is_loaded_and_the_calibration_stays_at_the_identity(kind):
    model, source = stage_two(kind), stage_one(kind)
    done = load_stage_one(model, source)
    assert set(done.loaded) == set(source)
    assert done.new == NEW
    assert done.ignored == ()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in source.items())
    assert (model.fc.calibration.magnitude == 1).all()
    assert (model.fc.calibration.margin == 0).all()


def test_the_message_counts_the_frozen_tensors():
    message = str(load_stage_one(stage_two(), stage_one()))
    assert message == f"loaded 11 of 11 frozen tensors; new, starting at the identity: {', '.join(NEW)}"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": state},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: state | {"__author__": "somebody"},
    ],
    ids=["state_dict", "model", "both", "DDP", "DDP in state_dict", "a note beside"],
)
def test_the_usual_wrappings_are_opened(wrap):
    model, source = stage_two(), stage_one()
    load_stage_one(model, wrap(source))
    assert torch.equal(model.conv.weight, source["conv.weight"])


def test_a_file_is_loaded_as_well(tmp_path):
    model, source = stage_two(), stage_one()
    torch.save(source, tmp_path / "one.pth")
    assert len(load_stage_one(model, tmp_path / "one.pth").loaded) == len(source)
    assert torch.equal(model.conv.weight, source["conv.weight"])


@pytest.mark.parametrize("name", sorted(SmallCNN().state_dict().keys() - {"bn.num_batches_tracked"}))
def test_any_missing_tensor_is_refused(name):
    source = stage_one()
    del source[name]
    refused(stage_two(), source, f"expected all 11 frozen tensors, but it lacks 1: {name}; is it")


@pytest.mark.parametrize("name", SmallCNN().state_dict())
def test_any_misshaped_tensor_is_refused(name):
    source = stage_one()
    source[name] = torch.zeros(2, 9)
    refused(stage_two(), source, rf"but got 1 of others: {name} \(\[2, 9\], not \[.*\]\); is it trained for another")


def test_a_tensor_of_the_same_size_but_another_shape_is_refused():
    source = stage_one()
    source["fc.weight"] = source["fc.weight"].T
    refused(stage_two(), source, r"fc\.weight \(\[6, 5\], not \[5, 6\]\)")


def test_an_unexpected_tensor_is_refused():
    refused(stage_two(), stage_one() | {"fc2.weight": torch.ones(2)}, r"no tensors beyond .* got 1: fc2\.weight; is it")


@pytest.mark.parametrize(("kind", "other"), [("linear", "cosine"), ("cosine", "linear")])
def test_the_other_type_of_classifier_is_refused(kind, other):
    refused(stage_two(kind), stage_one(other), r"lacks 1: fc\.(scale|bias)")


def test_tensors_that_the_model_does_not_need_are_named_in_the_report():
    surplus = ("ema.weight", "old_bn.num_batches_tracked", "rpn.anchor_generator.cells")
    model = stage_two()
    model.not_needed = ("ema.*", "*anchor_generator*")
    done = load_stage_one(model, stage_one() | dict.fromkeys(surplus, torch.ones(1)))
    assert done.ignored == surplus
    assert str(done).endswith(f"; not needed: {', '.join(surplus)}")


def test_only_batchnorms_counters_are_never_needed():
    source = stage_one() | {"old_bn.num_batches_tracked": torch.ones(1)}
    assert load_stage_one(stage_two(), source).ignored == ("old_bn.num_batches_tracked",)
    refused(stage_two(), source | {"pixel_mean": torch.ones(1)}, "got 1: pixel_mean; is it")
    model = stage_two()
    model.not_needed = ("ema.*",)
    refused(model, source | {"pixel_mean": torch.ones(1)}, "got 1: pixel_mean; is it")


def test_a_file_from_before_batches_were_counted_loads(tmp_path):
    source, model = stage_one(), stage_two()
    del source["bn.num_batches_tracked"]
    done = load_stage_one(model, source)
    assert {*done.loaded} == {*source}
    assert torch.equal(model.bn.running_var, source["bn.running_var"])
    assert model.bn.num_batches_tracked == 0


def test_some_counters_missing_are_refused():
    def model():
        return nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Linear(1, 5))

    source = model().state_dict()
    del source["1.num_batches_tracked"]
    refused(wrap_classifier(model(), COUNTS)[0], source, "lacks 1: 1.num_batches_tracked")


#: How training loops and wrappers keep the weights of a model.
WRAPPINGS = {
    "flat": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors},
    "model": lambda tensors: {"model": tensors, "optimizer": {"state": {}}},
    "model_state_dict": lambda tensors: {"model_state_dict": tensors, "loss": 0.5},
    "net": lambda tensors: {"net": tensors, "acc": 91.2, "optimizer": {"state": {}, "param_groups": []}},
    "twice": lambda tensors: {"state_dict": {"net": tensors}},
    "compiled": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "a compiled part": lambda tensors: {name.replace("neck.", "neck._orig_mod."): t for name, t in tensors.items()},
    "DDP of compiled": lambda tensors: {"net": {f"module._orig_mod.{name}": t for name, t in tensors.items()}},
    "compiled DDP": lambda tensors: {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()},
    "Lightning": lambda tensors: {"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}},
    "a module of the user's": lambda tensors: {f"learner.net.{name}": tensor for name, tensor in tensors.items()},
    "MiSLAS": lambda tensors: {
        "epoch": 1,
        "state_dict_model": {f"module.{name}": t for name, t in tensors.items() if not name.startswith("fc.")},
        "state_dict_classifier": {f"module.{name}": t for name, t in tensors.items() if name.startswith("fc.")},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_same_model_in_another_wrapping_loads(wrapping, tmp_path):
    model, source = stage_two(), stage_one()
    torch.save(WRAPPINGS[wrapping](source), tmp_path / "one.pth")
    assert {*load_stage_one(model, tmp_path / "one.pth").loaded} == {*source}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.items())


def test_several_sets_of_weights_are_refused():
    refused(stage_two(), {"net": stage_one(), "teacher": stage_one()}, "one set of weights, got several: net, teacher")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.to_sparse(), "expected dense tensors, got others: conv.weight"),
        (lambda t: t.to("meta"), "expected dense tensors, got others: conv.weight"),
        (
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "expected dense tensors, got others: conv.weight",
        ),
        (lambda t: torch.ones(1).expand(1 << 20), "expected dense tensors, got others: conv.weight"),
        (
            lambda t: t.to(torch.complex64) * float("nan"),
            "kinds of numbers, got others: conv.weight of torch.complex64",
        ),
        (lambda t: t.to(torch.int32), "kinds of numbers, got others: conv.weight of torch.int32"),
        (lambda t: t > 0, "kinds of numbers, got others: conv.weight of torch.bool"),
    ],
    ids=["sparse", "meta", "quantized", "expanded", "complex", "int", "bool"],
)
def test_tensors_of_another_kind_are_refused(change, match):
    source = stage_one()
    source["conv.weight"] = change(source["conv.weight"])
    refused(stage_two(), source, match)


def test_a_few_repeated_bytes_load():
    source, model = stage_one(), stage_two()
    source["fc.bias"] = torch.ones(1).expand(5)
    load_stage_one(model, source)
    assert torch.equal(model.fc.bias, torch.ones(5))


def test_half_precision_loads():
    source, model = stage_one(), stage_two()
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in source.items()}
    load_stage_one(model, halves)
    assert torch.equal(model.conv.weight, halves["conv.weight"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv.weight", "bn.running_var"])
def test_a_tensor_that_is_not_finite_is_refused(name, value):
    source = stage_one()
    source[name].view(-1)[-1] = value
    refused(stage_two(), source, f"finite numbers, but got NaN or infinity in {name}; use an earlier one")


@pytest.mark.parametrize("value", [complex(math.nan, 0), complex(0, math.nan), complex(0, math.inf)])
def test_a_complex_number_that_is_not_finite_is_refused(value):
    with pytest.raises(InputError, match="expected finite numbers, but got NaN or infinity in w; use an earlier one"):
        require_finite({"w": torch.tensor([value])}, "")


def test_a_complex_number_is_no_whole_one():
    source = stage_one()
    source["bn.num_batches_tracked"] = torch.tensor(1j)
    refused(stage_two(), source, "kinds of numbers, got others: bn.num_batches_tracked of torch.complex64")


def test_a_stage_two_checkpoint_is_refused():
    source = stage_two().state_dict()
    refused(stage_two(), source, r"expected a stage-one checkpoint, but it already holds a calibration \(fc\.calib")


def test_what_trains_is_new():
    model = SmallCNN()
    freeze_except(model, ["fc.bias"])
    bias = model.fc.bias.detach().clone()
    done = load_stage_one(model, {name: tensor for name, tensor in stage_one().items() if name != "fc.bias"})
    assert done.new == ("fc.bias",)
    assert torch.equal(model.fc.bias, bias)


def test_a_model_that_is_not_frozen_is_refused_as_such():
    # Its BatchNorm's statistics, which no gradient reaches, make no frozen model of it.
    refused(SmallCNN(), stage_one(), "expected a frozen model, but all of its parameters train; call freeze_except")


def test_a_calibration_of_two_names_is_new_under_both():
    model, _ = wrap_classifier(nn.Sequential(nn.Linear(4, 3)), [5, 3, 1])
    tied = nn.ModuleDict({"a": model, "b": nn.Sequential(model[0])})
    source = {f"{branch}.0.{part}": torch.ones(shape) for branch in "ab" for part, shape in SHAPES.items()}
    done = load_stage_one(tied, source)
    assert set(done.loaded) == set(source)
    assert set(done.new) == {name.replace("fc", f"{branch}.0") for name in NEW for branch in "ab"}
    assert (model[0].weight == 1).all()


@pytest.mark.parametrize(
    "checkpoint", [{}, {"epoch": 3}, {"model": {}}, [1, 2], {"state_dict": {"a": "b"}}, {0: "a"}], ids=str
)
def test_a_checkpoint_without_tensors_is_refused(checkpoint):
    refused(stage_two(), checkpoint, "expected a state dict of tensors in the checkpoint, got none")


def test_tensors_without_names_are_refused():
    refused(stage_two(), {0: torch.ones(1)}, "expected")


def test_module_is_stripped_only_if_every_name_has_it():
    kept = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert set(state_dict_of(kept)) == set(kept)
    assert set(state_dict_of({"module.module.a": torch.ones(1)})) == {"a"}


def test_a_refused_file_is_named(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    refused(stage_two(), tmp_path / "other.pth", r"frozen tensors in '.*other\.pth', but it lacks 10: conv\.weight")


def test_a_name_may_be_given_for_what_is_loaded_already():
    refused(stage_two(), {"a": torch.ones(1)}, r"frozen tensors in 'one\.pth', but it lacks 10", name="one.pth")


def test_require_tensors_asks_for_a_whole_model():
    state = stage_two().state_dict()
    assert require_tensors(state, state, "tensors") == []
    without = {name: tensor for name, tensor in state.items() if name != "fc.calibration.margin"}
    with pytest.raises(
        InputError, match=r"expected all 15 tensors of two\.pth, but it lacks 1: fc\.calibration\.margin"
    ):
        require_tensors(without, state, "tensors", where=" of two.pth")
