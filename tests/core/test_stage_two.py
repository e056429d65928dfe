"""What every host asks of a run of stage two: the identity, the proof, the watch, the folder and the classes."""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from core.models import COUNTS, SmallCNN
from disalign import AdaptiveCalibration, GRWCrossEntropyLoss, InputError, at_identity, wrap_classifier
from disalign.freezing import fingerprints
from disalign.stage_two import (
    StageTwoRun,
    calibrations,
    freeze,
    is_calibrated,
    keep_magnitude_from_decay,
    require_finite_settings,
    require_own_folder,
    require_same_classes,
    trained_parts,
)

K, D = 5, 6


class Cascade(nn.Module):
    """Two heads over one trunk, each with a calibration, and a loss among the modules."""

    def __init__(self, **options):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D))
        self.heads = nn.ModuleList(nn.Linear(D, K) for _ in range(2))
        self.calibrations = nn.ModuleList(AdaptiveCalibration(K, D, **options) for _ in range(2))
        self.loss = GRWCrossEntropyLoss(COUNTS)

    def stage_one(self, x):
        features = self.trunk(x)
        return features, [head(features) for head in self.heads]

    def forward(self, x):
        features, scores = self.stage_one(x)
        return [c(z, features) for c, z in zip(self.calibrations, scores, strict=True)]


def trained(model):
    """Every part of every calibration away from its start."""
    with torch.no_grad():
        for calibration in calibrations(model).values():
            for parameter in calibration.parameters():
                parameter.normal_()
    return model


def sgd(model, **options):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)


# ---------------------------------------------------------------------------------------------- finding and freezing


def test_calibrations_are_found_by_name_through_wrappers(process_group):
    model = Cascade()
    found = calibrations(model)
    assert list(found) == ["calibrations.0", "calibrations.1"]
    assert all(found[f"calibrations.{index}"] is model.calibrations[index] for index in (0, 1))
    assert list(calibrations(DistributedDataParallel(model))) == [f"module.{name}" for name in found]
    assert list(calibrations(found["calibrations.1"])) == [""]
    assert calibrations(SmallCNN()) == {}


def test_names_of_a_state_dict_tell_its_stage():
    assert is_calibrated(wrap_classifier(SmallCNN(), COUNTS)[0].state_dict())
    assert is_calibrated(wrap_classifier(nn.Linear(D, K), COUNTS)[0].state_dict())
    assert not is_calibrated(SmallCNN().state_dict())
    assert not is_calibrated(["head.recalibration.weight", "calibration_head.weight"])


def test_freezing_leaves_the_calibrations_of_all_heads():
    model = Cascade()
    report = freeze(model)
    assert trained_parts(model) == ["calibrations.0", "calibrations.1", "loss"]
    parts = ("magnitude", "margin", "confidence.weight", "confidence.bias")
    assert set(report.trainable) == {f"calibrations.{index}.{part}" for index in (0, 1) for part in parts}
    assert report.num_trainable == 2 * (2 * K + D + 1)
    model.train()
    assert [model.trunk.training, model.calibrations[1].training, model.loss.training] == [False, True, True]


def test_only_what_is_held_stays_in_eval_mode():
    model = Cascade()
    freeze(model, held=["trunk"])
    model.train()
    assert [model.training, model.heads.training, model.trunk.training] == [True, True, False]
    assert not any(parameter.requires_grad for parameter in model.heads.parameters())


def test_a_model_of_stage_one_is_not_frozen_as_stage_two():
    model = SmallCNN()
    with pytest.raises(InputError, match="expected a model with a calibration, got none in SmallCNN; calibrate it"):
        freeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------- at_identity


@pytest.mark.parametrize("part", ["magnitude", "margin"])
@pytest.mark.parametrize("head", [0, 1])
def test_at_the_identity_each_magnitude_and_margin_is_undone(part, head):
    model, x = Cascade().eval(), torch.randn(7, 4)
    _, expected = model.stage_one(x)
    with torch.no_grad():  # this one alone: another can't hide it
        getattr(model.calibrations[head], part).add_(torch.arange(1.0, K + 1))
    calibrated = model(x)
    assert not torch.isclose(calibrated[head], expected[head]).all(dim=0).any()
    with at_identity(model) as inside:
        assert inside is model
        found = model(x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"learn_magnitude": False}, {"learn_margin": False}, {"confidence": "one"}])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_after_the_identity_all_is_as_it_was_to_the_bit(options, error):
    model, x = trained(Cascade(**options)).eval(), torch.randn(7, 4)
    freeze(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before, scores = fingerprints(tensors), model(x)

    def visit():
        with at_identity(model):
            assert all(torch.equal(one, other) for one, other in zip(model(x), model.stage_one(x)[1], strict=True))
            assert not torch.equal(model(x)[0], scores[0])
            if error:
                raise error

    if error:
        with pytest.raises(error):
            visit()
    else:
        visit()
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert fingerprints(after) == before
    assert all(after[name] is tensor for name, tensor in tensors.items())  # an optimizer still holds them
    assert all(p.requires_grad == ("calibrations" in name) for name, p in model.named_parameters())


def test_at_the_identity_within_the_identity():
    model, x = trained(Cascade()).eval(), torch.randn(7, 4)
    before = model(x)
    with at_identity(model):
        with at_identity(model):
            pass
        assert torch.equal(model(x)[1], model.stage_one(x)[1][1])
    assert torch.equal(model(x)[1], before[1])


# ------------------------------------------------------------------------------------------- the magnitude and decay


def decay_of(optimizer):
    """id of a parameter -> its weight decay; a parameter in two groups fails."""
    pairs = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


@pytest.mark.parametrize("named", [False, True])
def test_only_the_magnitudes_are_kept_from_decay(named):
    model = Cascade()
    freeze(model)
    training = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(training if named else [p for _, p in training], lr=0.3, weight_decay=0.5)
    keep_magnitude_from_decay(optimizer, model)
    assert decay_of(optimizer) == {id(p): 0.0 if name.endswith("magnitude") else 0.5 for name, p in training}
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    if named:
        names = {id(p): name for name, p in training}
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]

    # Without gradients of the loss only the decay moves a parameter: w - lr * decay * w.
    before = {name: p.detach().clone() for name, p in training}
    sum(p.sum() * 0 for _, p in training).backward()
    with torch.no_grad():
        for _, p in training:
            p.add_(1)
    optimizer.step()
    for name, p in training:
        kept = 1.0 if name.endswith("magnitude") else 1 - 0.3 * 0.5
        torch.testing.assert_close(p.detach(), (before[name] + 1) * kept)


def test_groups_keep_their_options_and_those_without_decay_are_left_alone():
    model = Cascade()
    freeze(model)
    one, two = model.calibrations
    groups = [
        {"params": [one.magnitude, one.margin], "lr": 0.1},
        {"params": [two.magnitude], "lr": 0.2},
        {"params": [two.margin], "lr": 0.3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=0.5)
    keep_magnitude_from_decay(optimizer, model)
    found = [([id(p) for p in group["params"]], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        ([id(one.margin)], 0.1, 0.5),
        ([id(two.magnitude)], 0.2, 0.0),
        ([id(two.margin)], 0.3, 0.0),
        ([id(one.magnitude)], 0.1, 0.0),
    ]
    keep_magnitude_from_decay(optimizer, model)  # a second time there is nothing to do
    assert len(optimizer.param_groups) == 4


def test_a_run_refuses_decay_on_a_magnitude_until_it_is_kept_from_it():
    model = Cascade()
    freeze(model)
    optimizer = sgd(model, weight_decay=1e-4)
    with pytest.raises(InputError, match=r"expected no weight decay on the magnitude, whose identity is 1 and not 0; "):
        StageTwoRun(model, optimizer, "")
    keep_magnitude_from_decay(optimizer, model)
    StageTwoRun(model, optimizer, "")


def test_a_magnitude_that_does_not_train_cannot_decay():
    model = Cascade(learn_magnitude=False)
    freeze(model)
    StageTwoRun(model, sgd(model, weight_decay=1e-4), "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [0, 1])
def test_a_setting_of_any_group_that_is_not_finite_is_refused(group, value):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1)
    require_finite_settings(optimizer)
    optimizer.param_groups[group]["weight_decay"] = value
    with pytest.raises(InputError, match=f"expected a finite number as the optimizer's weight_decay, got {value}; "):
        require_finite_settings(optimizer)


# ----------------------------------------------------------------------------------------------------------- the run


def steps(model, optimizer, number=2):
    for _ in range(number):
        optimizer.zero_grad()
        sum(model.loss(scores, torch.arange(7) % K) for scores in model(torch.randn(7, 4))).backward()
        optimizer.step()


def test_a_run_that_trains_the_calibrations_alone_says_so():
    model = Cascade()
    freeze(model)
    before = fingerprints(dict(model.calibrations.named_parameters()))
    optimizer = sgd(model)
    run = StageTwoRun(model, optimizer, "")
    steps(model.train(), optimizer)
    model.loss.set_class_counts([1, 2, 3, 4, 5])  # no part of what is frozen
    assert all(fingerprints(dict(model.calibrations.named_parameters()))[name] != one for name, one in before.items())
    # two linear heads and one linear trunk with weight and bias, a BatchNorm with its two and three buffers
    assert run.finish() == "11 of 11 frozen tensors are bit-identical to what this run started from"


@pytest.mark.parametrize(
    "name", ["trunk.0.weight", "trunk.1.running_var", "trunk.1.num_batches_tracked", "heads.1.bias"]
)
def test_a_run_that_changes_anything_else_fails(name):
    model = Cascade()
    freeze(model)
    run = StageTwoRun(model, sgd(model), "")
    with torch.no_grad():
        tensor = (dict(model.named_parameters()) | dict(model.named_buffers()))[name]
        tensor.view(-1)[-1] += 1
    with pytest.raises(RuntimeError, match=rf"11 frozen tensors to stay bit-identical, but changed: {name}$"):
        run.finish()


def with_confidence(model, *means):
    """Each head's confidence at the same value for every input, seen in one batch."""
    with torch.no_grad():
        for calibration, mean in zip(model.calibrations, means, strict=True):
            calibration.confidence.weight.zero_()
            calibration.confidence.bias.fill_(math.log(mean / (1 - mean)))
        model(torch.randn(7, 4))


def test_a_collapsed_confidence_is_told_once_and_in_any_head():
    model = Cascade().eval()
    freeze(model)
    run = StageTwoRun(model, sgd(model), "lower the learning rate")
    assert run.warning(1) is None  # before any batch
    with_confidence(model, 0.9, 0.06)
    assert run.warning(2) is None
    with_confidence(model, 0.9, 0.04)
    said = run.warning(3)
    assert said.startswith("the mean confidence fell to 0.040 at iteration 3: magnitude and margin hardly get ")
    assert said.endswith("; lower the learning rate")
    with_confidence(model, 0.001, 0.001)
    assert run.warning(4) is None
    assert StageTwoRun(model, sgd(model), "").warning(1).startswith("the mean confidence fell to 0.001")


def test_the_threshold_is_an_argument():
    model = Cascade().eval()
    freeze(model)
    with_confidence(model, 0.3, 0.3)
    assert StageTwoRun(model, sgd(model), "", threshold=0.29).warning(1) is None
    assert StageTwoRun(model, sgd(model), "", threshold=0.31).warning(1) is not None


def test_a_fixed_confidence_cannot_collapse():
    model = Cascade(confidence="one").eval()
    freeze(model)
    model(torch.randn(7, 4))
    assert StageTwoRun(model, sgd(model), "", threshold=0.9).warning(1) is None


# --------------------------------------------------------------------------------------------- the folder of a run


@pytest.fixture
def checkpoints(tmp_path):
    """One of each stage."""
    for stage, model in {"one": SmallCNN(), "two": wrap_classifier(SmallCNN(), COUNTS)[0]}.items():
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{stage}.pth")
    return tmp_path


@pytest.mark.parametrize(("calibrated", "own", "other"), [(True, "two", "one"), (False, "one", "two")])
def test_a_folder_with_the_other_stages_checkpoint_is_refused(checkpoints, calibrated, own, other):
    require_own_folder(checkpoints, [checkpoints / f"{own}.pth"], calibrated, "--work-dir")
    sentence = (
        rf"^expected a folder of stage {own}'s own as --work-dir, got '.*' with a checkpoint of stage {other} "
        rf"\('.*{other}\.pth'\), which has the same names; give another --work-dir$"
    )
    with pytest.raises(InputError, match=sentence):
        require_own_folder(
            checkpoints, [checkpoints / f"{own}.pth", str(checkpoints / f"{other}.pth")], calibrated, "--work-dir"
        )


@pytest.mark.parametrize("calibrated", [True, False])
def test_what_is_no_checkpoint_is_nobodys(tmp_path, calibrated):
    (tmp_path / "broken.pth").write_bytes(b"half")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    places = [tmp_path / name for name in ("none.pth", "broken.pth", "empty.pth")]
    require_own_folder(tmp_path, places, calibrated, "--work-dir")
    require_own_folder(tmp_path, [], calibrated, "--work-dir")


def test_each_checkpoint_is_read_once_and_by_the_hosts_own_reader(checkpoints):
    read = []

    def load(path):
        read.append(path)
        return {"heads.calibration.margin": torch.ones(1)}

    path = checkpoints / "one.pth"
    require_own_folder(checkpoints, [path, str(path)], True, "--work-dir", load)
    assert read == [str(path)]


# -------------------------------------------------------------------------------------------------- the same classes


@pytest.mark.parametrize("known", [(["cat", "dog"], ["cat", "dog"]), (("cat", "dog"), ["cat", "dog"])])
def test_the_same_classes_pass(known):
    require_same_classes(*known, "the val set")


@pytest.mark.parametrize("unknown", [None, [], ()])
def test_names_that_are_not_known_are_not_compared(unknown):
    require_same_classes(unknown, ["cat"], "the val set")
    require_same_classes(["cat"], unknown, "the val set")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (["dog", "cat", "cow"], "but 2 differ: class 0 is 'dog', not 'cat', class 1 is 'cat', not 'dog'; give both"),
        (["cat", "dog", "hen"], "but 1 differ: class 2 is 'hen', not 'cow'; give both"),
        (["cat", "dog"], "got 2; give both"),
        (["cat", "dog", "cow", "hen"], "got 4; give both"),
    ],
)
def test_other_classes_are_refused_and_the_first_of_them_named(found, said):
    with pytest.raises(InputError, match=f"^expected the 3 classes of stage one in the val set, in the same .*{said}"):
        require_same_classes(["cat", "dog", "cow"], found, "the val set", "stage one")


def test_of_many_other_classes_three_are_named():
    with pytest.raises(InputError, match=r"class 2 is '2x', not '2' and 7 more; give both the same classes$"):
        require_same_classes([str(n) for n in range(10)], [f"{n}x" for n in range(10)], "the val set")
