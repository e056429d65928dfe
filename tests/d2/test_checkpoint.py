import os
import pickle
import re

import pytest

pytest.importorskip("detectron2")

import torch
from torch.nn.parallel import DistributedDataParallel

from disalign import InputError
from disalign_d2 import DisAlignCheckpointer, build_model

from .models import COUNTS, batch, detections, identical, lively, random_calibration, stages, tiny_cfg

PREDICTOR = "roi_heads.box_predictor"


@pytest.fixture
def models():
    """A lively stage one and a fresh stage two."""
    return stages()[0], build_model(tiny_cfg(calibrate=True))


def save(content, path):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return str(path)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def start(model, path, folder):
    """What a fresh run of train_net does."""
    return DisAlignCheckpointer(model, str(folder), training=True).resume_or_load(str(path), resume=False)


def evaluate(model, path, folder=""):
    """What ``--eval-only`` does."""
    return DisAlignCheckpointer(model, str(folder)).resume_or_load(str(path), resume=False)


def refused(load, model, path, folder, sentence):
    """The load raises the sentence and leaves model and folder as they are."""
    before, files = bits(model), sorted(os.listdir(folder))
    with pytest.raises(InputError, match=sentence) as raised:
        load(model, path, folder)
    assert "\n" not in str(raised.value)
    assert identical(bits(model), before)
    assert sorted(os.listdir(folder)) == files
    return str(raised.value)


def without(name):
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


# ----------------------------------------------------------------------------------------------- the hand-over


def numpy_arrays(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["trainer", "state dict", "state_dict", "ddp", "zoo"])
def test_stage_two_takes_stage_one_in_every_form(models, tmp_path, form):
    one, two = models
    state = one.state_dict()
    content, name = {
        "trainer": ({"model": state, "trainer": {"iteration": 3}, "iteration": 3}, "one.pth"),
        "state dict": (dict(state), "one.pth"),
        "state_dict": ({"state_dict": state}, "one.pth"),
        "ddp": ({"model": {f"module.{key}": tensor for key, tensor in state.items()}}, "one.pth"),
        "zoo": ({"model": numpy_arrays(state), "__author__": "someone"}, "one.pkl"),
    }[form]
    start(two, save(content, tmp_path / name), tmp_path)
    inputs = batch()
    assert identical(detections(one, inputs), detections(two.eval(), inputs))


def test_the_new_tensors_are_named_once(models, tmp_path, caplog):
    one, two = models
    old = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cells.0", "norm.num_batches_tracked")
    path = save({"model": one.state_dict() | dict.fromkeys(old, torch.zeros(3))}, tmp_path / "one.pth")
    with caplog.at_level("INFO"):
        start(two, path, tmp_path)
    (line,) = [record.message for record in caplog.records if "starting at the identity" in record.message]
    assert line.startswith("one.pth: loaded ")
    for part in ("magnitude", "margin", "confidence.weight", "confidence.bias"):
        assert line.count(f"{PREDICTOR}.cls_score.calibration.{part}") == 1
    assert line.endswith("not needed: " + ", ".join(old))
    evaluate(one, path)


def test_the_trainers_state_of_stage_one_is_left_where_it_is(models, tmp_path):
    one, two = models
    optimizer = torch.optim.SGD(two.parameters(), lr=0.5)
    path = save({"model": one.state_dict(), "optimizer": {"nonsense": 1}}, tmp_path / "one.pth")
    checkpointer = DisAlignCheckpointer(two, str(tmp_path), training=True, optimizer=optimizer)
    checkpointer.resume_or_load(path, resume=False)
    assert optimizer.param_groups[0]["lr"] == 0.5


STRICT = {
    "missing": (
        without("backbone.fpn_output2.bias"),
        r"it lacks 1: backbone\.fpn_output2\.bias; is it a checkpoint",
    ),
    "missing mask head": (without("roi_heads.mask_head.predictor.bias"), "lacks 1: roi_heads.mask_head"),
    "misshaped": (
        changed("roi_heads.box_head.fc1.weight", lambda w: w[:7]),
        r"fc1\.weight \(\[7, 128\], not",
    ),
    "nan": (changed("backbone.fpn_lateral2.weight", lambda w: w * float("nan")), "NaN or infinity in backbone.fpn_l"),
    "infinity": (changed(f"{PREDICTOR}.bbox_pred.bias", lambda b: b / 0), f"NaN or infinity in {PREDICTOR}"),
    "unknown": (lambda state: state | {"backbone.extra": torch.zeros(1)}, "beyond the model's.*backbone.extra"),
    "nothing": (lambda state: {}, "expected a state dict of tensors"),
    "text": (lambda state: {"epoch": 3}, "expected a state dict of tensors"),
}


@pytest.mark.parametrize("name", STRICT)
def test_the_hand_over_is_strict(models, tmp_path, name):
    one, two = models
    change, sentence = STRICT[name]
    path = save({"model": change(one.state_dict())}, tmp_path / "one.pth")
    said = refused(start, two, path, tmp_path, sentence)
    assert path in said or name in ("nothing", "text")


@pytest.mark.parametrize("content", [[1, 2], 5, "text", torch.zeros(2), {}, {"model": None}, {"model": {"x": 1}}])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("load", [start, evaluate])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_file_without_a_state_dict_is_refused(models, tmp_path, stage, load, suffix, content):
    content = None if suffix == "pkl" and isinstance(content, torch.Tensor) else content
    sentence = "^expected a (state dict of tensors|checkpoint at|checkpoint of stage two)"
    refused(load, models[stage], save(content, tmp_path / f"one.{suffix}"), tmp_path, sentence)


def test_another_number_of_classes_is_refused(tmp_path):
    two = build_model(tiny_cfg(calibrate=True))
    other = build_model(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7))
    path = save({"model": other.state_dict()}, tmp_path / "one.pth")
    sentence = rf"{PREDICTOR}.cls_score.weight \(\[8, 16\], not \[6, 16\]\).*trained for another number of classes"
    refused(start, two, path, tmp_path, sentence)


@pytest.mark.parametrize(
    ("theirs", "ours", "lacking"), [("linear", "cosine", "cls_score.scale"), ("cosine", "linear", "cls_score.bias")]
)
@pytest.mark.parametrize("cascade", [False, True])
def test_the_other_classifier_is_refused(tmp_path, theirs, ours, lacking, cascade):
    two = build_model(tiny_cfg(calibrate=True, classifier=ours, cascade=cascade))
    other = build_model(tiny_cfg(classifier=theirs, cascade=cascade))
    path = save({"model": other.state_dict()}, tmp_path / "one.pth")
    refused(start, two, path, tmp_path, rf"lacks {3 if cascade else 1}: roi_heads.*{lacking}.*this very model\?$")


def test_a_standard_stage_one_is_none_of_a_cascade(models, tmp_path):
    two = build_model(tiny_cfg(calibrate=True, cascade=True))
    refused(start, two, save({"model": models[0].state_dict()}, tmp_path / "one.pth"), tmp_path, "it lacks")


def test_a_stage_two_file_is_no_stage_one(models, tmp_path):
    path = save({"model": stages()[1].state_dict()}, tmp_path / "two.pth")
    refused(start, models[1], path, tmp_path, r"it already holds a calibration .*give the checkpoint that stage two")


@pytest.mark.parametrize("stage", [0, 1])
def test_no_weights_are_refused_where_they_are_needed(models, tmp_path, stage):
    refused(evaluate, models[stage], "", tmp_path, r"expected a checkpoint to evaluate as MODEL\.WEIGHTS, got an empty")
    with pytest.raises(InputError, match="expected a checkpoint to evaluate"):
        DisAlignCheckpointer(models[stage]).load("")
    if stage:
        sentence = r"expected the stage-one checkpoint as MODEL\.WEIGHTS, got an empty one; add MODEL\.WEIGHTS FILE"
        refused(start, models[stage], "", tmp_path, sentence)
    else:
        start(models[stage], "", tmp_path)  # from scratch


@pytest.mark.parametrize("path", ["gone.pth", "/gone/for/good.pkl", "nonsense", "s3://bucket/one.pth", "."])
@pytest.mark.parametrize("load", [start, evaluate])
def test_a_path_that_leads_nowhere_is_refused(models, tmp_path, load, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(load, models[1], path, tmp_path, r"expected a checkpoint at '.*', but: .*; check MODEL\.WEIGHTS")


@pytest.mark.parametrize("load", [start, evaluate])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_truncated_file_is_refused(models, tmp_path, stage, suffix, load):
    state = models[0].state_dict()
    path = tmp_path / f"one.{suffix}"
    save({"model": numpy_arrays(state) if suffix == "pkl" else state, "__author__": "me"}, path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(load, models[stage], path, tmp_path, "it can't be read .*; is it truncated|data was truncated; re-save")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("load", [start, evaluate])
@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth"])
@pytest.mark.parametrize("stage", [0, 1])
def test_foreign_objects_are_refused_and_never_run(models, tmp_path, stage, suffix, load):
    crater = tmp_path / "crater"
    model = {name: tensor.numpy() if suffix == "pkl" else tensor for name, tensor in models[0].state_dict().items()}
    path = save({"model": model, "__author__": "me", "hook": Bomb(crater)}, tmp_path / f"one.{suffix}")
    refused(load, models[stage], path, tmp_path, "expected only tensors and plain values in .*, but it .*holds .*mkdir")
    assert not crater.exists()


def test_a_caffe2_file_is_no_stage_one(models, tmp_path):
    blobs = {"conv1_w": models[0].backbone.bottom_up.stem.conv1.weight.detach().numpy()}
    for content in (blobs, {"blobs": blobs}):
        refused(start, models[1], save(content, tmp_path / "caffe.pkl"), tmp_path, "it lacks .* is it a checkpoint")


def test_a_stage_one_in_ddp_is_handed_over_and_saved_without_its_prefix(models, tmp_path, process_group):
    one, two = models
    two.roi_heads.box_predictor.class_counts = COUNTS
    start(DistributedDataParallel(two), save({"model": one.state_dict()}, tmp_path / "one.pth"), tmp_path)
    inputs = batch()
    assert identical(detections(one, inputs), detections(two.eval(), inputs))
    DisAlignCheckpointer(DistributedDataParallel(two), str(tmp_path)).save("two")
    saved = torch.load(tmp_path / "two.pth", weights_only=True)
    assert identical(saved["model"], two.state_dict())
    assert "disalign" in saved


# ------------------------------------------------------------------------------------------------- stage one


def test_a_fresh_stage_one_starts_from_whatever_fits(models, tmp_path):
    one, other = models[0], build_model(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7))
    before = bits(other)
    start(other, save({"model": one.state_dict()}, tmp_path / "coco.pth"), tmp_path)
    after = other.state_dict()
    assert torch.equal(after["backbone.fpn_output2.weight"], one.state_dict()["backbone.fpn_output2.weight"])
    assert torch.equal(after[f"{PREDICTOR}.cls_score.weight"], before[f"{PREDICTOR}.cls_score.weight"])


def test_a_fresh_stage_one_refuses_what_detectron2_cannot_take(models, tmp_path):
    one = models[0]
    path = save({"model": {"backbone.fpn_output2.bias": torch.zeros(8), "text": "text"}}, tmp_path / "one.pth")
    refused(start, one, path, tmp_path, r"expected a checkpoint at .*, but: Unsupported type .*; check MODEL\.WEIGHTS")
    whole = save({"model": one.state_dict()}, tmp_path / "whole.pth")
    refused(start, one, f"{whole}?nonsense=1", tmp_path, r"checkpoint at .*\?nonsense=1', but: Unsupported query")


def test_a_checkpointer_that_refused_can_go_on(models, tmp_path):
    one, two = models
    checkpointer = DisAlignCheckpointer(two, str(tmp_path), training=True)
    with pytest.raises(InputError):
        checkpointer.resume_or_load("gone.pth", resume=False)
    checkpointer.resume_or_load(save({"model": one.state_dict()}, tmp_path / "one.pth"), resume=False)
    assert torch.equal(two.state_dict()[f"{PREDICTOR}.bbox_pred.weight"], one.roi_heads.box_predictor.bbox_pred.weight)


def test_a_fresh_stage_one_starts_from_caffe2s_names(tmp_path):
    model = build_model(tiny_cfg())
    weight = torch.randn_like(model.backbone.bottom_up.stem.conv1.weight)
    content = {"conv1_w": weight.numpy(), "conv1_w_momentum": weight.numpy(), "lr": 0.1}
    for wrapped in (content, {"blobs": content}):
        model.backbone.bottom_up.stem.conv1.weight.data.zero_()
        start(model, save(wrapped, tmp_path / "caffe.pkl"), tmp_path)
        assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, weight)


def test_a_fresh_stage_one_starts_from_torchvisions_names(tmp_path):
    model = build_model(tiny_cfg())
    weight = torch.randn_like(model.backbone.bottom_up.stem.conv1.weight)
    content = {"model": {"stem.conv1.weight": weight.numpy()}, "__author__": "me", "matching_heuristics": True}
    start(model, save(content, tmp_path / "torchvision.pkl"), tmp_path)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, weight)


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("stage", [0, 1])
def test_evaluation_takes_its_own_stage(tmp_path, stage):
    model = lively(random_calibration(stages()[stage]))
    fresh = build_model(tiny_cfg(calibrate=bool(stage)))
    evaluate(fresh, save({"model": model.state_dict()}, tmp_path / "a.pth"))
    assert identical(bits(fresh), bits(model))


def test_evaluation_refuses_the_other_stage(models, tmp_path):
    one, two = models
    first = save({"model": one.state_dict()}, tmp_path / "one.pth")
    second = save({"model": two.state_dict()}, tmp_path / "two.pth")
    sentence = r"expected a checkpoint of stage one for this config, got one of stage two in '.*two\.pth'; evaluate"
    refused(evaluate, one, second, tmp_path, sentence)
    sentence = r"expected a checkpoint of stage two for this config, got one of stage one in '.*one\.pth'; evaluate"
    refused(evaluate, two, first, tmp_path, sentence)


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("stage", [0, 1])
def test_evaluation_is_strict(models, tmp_path, stage, name):
    change, sentence = STRICT[name]
    path = save({"model": change(models[stage].state_dict())}, tmp_path / "a.pth")
    sentence = sentence if name not in ("nothing", "text") else "expected a (state dict|checkpoint of stage two)"
    refused(evaluate, models[stage], path, tmp_path, sentence)


@pytest.mark.parametrize("part", ["magnitude", "margin", "confidence.weight", "confidence.bias"])
@pytest.mark.parametrize("damage", ["missing", "misshaped", "nan"])
def test_evaluation_is_strict_about_the_calibration(models, tmp_path, damage, part):
    name = f"{PREDICTOR}.cls_score.calibration.{part}"
    shape = list(models[1].state_dict()[name].shape)
    change, said = {
        "missing": (without(name), f"but it lacks 1: {name}; is it"),
        "misshaped": (
            changed(name, lambda value: value[:0]),
            f"got 1 of others: {name} ({[0, *shape[1:]]}, not {shape});",
        ),
        "nan": (changed(name, lambda value: value * float("nan")), f"but got NaN or infinity in {name}; use"),
    }[damage]
    path = save({"model": change(models[1].state_dict())}, tmp_path / "two.pth")
    refused(evaluate, models[1], path, tmp_path, re.escape(said))


# ----------------------------------------------------------------------------------------------- save and resume


def trained(folder, **options):
    """A stage two after a step of SGD with momentum, saved in ``folder``."""
    model = random_calibration(stages(*[item for pair in options.items() for item in pair])[1])
    model.roi_heads.box_predictor.resolve_class_counts()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    sum((p * torch.randn_like(p)).sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    DisAlignCheckpointer(model, str(folder), training=True, optimizer=optimizer).save("model_0000001", iteration=1)
    return model, optimizer


def test_a_resumed_run_goes_on_from_the_last_checkpoint(tmp_path):
    model, optimizer = trained(tmp_path)
    again = build_model(tiny_cfg(calibrate=True))
    other = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.2)
    checkpointer = DisAlignCheckpointer(again, str(tmp_path), training=True, optimizer=other)
    rest = checkpointer.resume_or_load("gone.pth", resume=True)
    assert rest["iteration"] == 1
    assert "model" not in rest
    assert identical(bits(again), bits(model))
    assert other.param_groups[0]["lr"] == 0.1
    momenta = [[state["momentum_buffer"] for state in one.state.values()] for one in (optimizer, other)]
    assert len(momenta[0]) == 4
    assert all(torch.equal(one, two) for one, two in zip(*momenta, strict=True))


def test_without_resume_the_last_checkpoint_is_left_alone(models, tmp_path):
    trained(tmp_path)
    one, two = models
    start(two, save({"model": one.state_dict()}, tmp_path / "one.pth"), tmp_path)
    assert torch.equal(two.roi_heads.box_predictor.cls_score.calibration.margin, torch.zeros(5))


def test_resume_without_a_checkpoint_is_a_hand_over(models, tmp_path):
    one, two = models
    path = save({"model": one.state_dict()}, tmp_path / "one.pth")
    DisAlignCheckpointer(two, str(tmp_path), training=True).resume_or_load(path, resume=True)
    assert torch.equal(two.state_dict()[f"{PREDICTOR}.bbox_pred.weight"], one.roi_heads.box_predictor.bbox_pred.weight)


@pytest.mark.parametrize("stage", [0, 1])
def test_resume_in_the_other_stages_folder_is_refused(models, tmp_path, stage):
    DisAlignCheckpointer(models[1 - stage], str(tmp_path)).save("model_final")
    sentence = f"expected a checkpoint of stage {'two' if stage else 'one'} for this config, got one of stage"

    def resume(model, path, folder):
        DisAlignCheckpointer(model, str(folder), training=True).resume_or_load(path, resume=True)

    refused(resume, models[stage], "", tmp_path, sentence)


def test_one_checkpointer_hands_over_only_once(models, tmp_path):
    # After a fresh start, what it loads is its own.
    one, two = models
    checkpointer = DisAlignCheckpointer(two, str(tmp_path), training=True)
    first = save({"model": one.state_dict()}, tmp_path / "one.pth")
    checkpointer.resume_or_load(first, resume=False)
    checkpointer.save("two")
    margin = two.roi_heads.box_predictor.cls_score.calibration.margin
    torch.nn.init.ones_(margin)
    checkpointer.load(str(tmp_path / "two.pth"))
    assert not margin.any()
    with pytest.raises(InputError, match="expected a checkpoint of stage two"):
        checkpointer.load(first)


def test_the_counts_and_the_loss_are_kept_beside_the_model(tmp_path):
    trained(tmp_path, **{"MODEL.DISALIGN.RHO": 1.1, "MODEL.DISALIGN.BACKGROUND_WEIGHT": 3.0})
    kept = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert set(kept) == {"model", "optimizer", "iteration", "disalign"}
    loss = kept["disalign"]
    assert (loss["class_counts"], loss["rho"], loss["background_weight"]) == (COUNTS, 1.1, 3.0)
    assert (loss["reduction"], loss["normalize"]) == ("weighted_mean", "mean")


def test_a_cascades_counts_are_kept_once(tmp_path):
    model = stages(cascade=True)[1]
    for predictor in model.roi_heads.box_predictors():
        predictor.resolve_class_counts()
    DisAlignCheckpointer(model, str(tmp_path)).save("two")
    assert torch.load(tmp_path / "two.pth", weights_only=True)["disalign"]["class_counts"] == COUNTS


def test_stage_one_is_saved_as_detectron2_saves_it(models, tmp_path):
    DisAlignCheckpointer(models[0], str(tmp_path)).save("one", iteration=2)
    kept = torch.load(tmp_path / "one.pth", weights_only=True)
    assert set(kept) == {"model", "iteration"}
    assert (tmp_path / "last_checkpoint").read_text() == "one.pth"
