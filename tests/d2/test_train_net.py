"""Whole runs through the command: stage one, stage two, evaluation, resuming, two processes."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

detectron2 = pytest.importorskip("detectron2")

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase, defaults

from disalign.freezing import fingerprints
from disalign_d2 import build_model, evaluate, train_net
from disalign_d2.train_net import Trainer

from . import runs
from .annotations import unique
from .models import tiny_cfg
from .runs import CALIBRATION, figures, load, log, main, results, same

ROOT = Path(__file__).parents[2]
PREDICTOR = "roi_heads.box_predictor.cls_score.calibration."
EVALUATED = "Evaluating stage one (the calibration at its identity)"
NO_TEST = ["DATASETS.TEST", "()"]
FROZEN = r"(\d+) of \1 frozen tensors are bit-identical to what this run started from"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.trained(tmp_path_factory.getbasetemp() / "d2")


def stage_two(tiny, folder, *options, flags=()):
    """Exit status of a short stage two."""
    return main(tiny.config_two, folder, "MODEL.WEIGHTS", tiny.weights_one, *options, flags=flags)


def moved(state):
    """Names of the calibration's tensors that are not where they started."""
    start = {"magnitude": 1, "margin": 0, "confidence.weight": 0, "confidence.bias": 0}
    return {
        name
        for name in state
        if ".calibration." in name and (state[name] != start[name.split(".calibration.")[1]]).any()
    }


def own_figures(folder, sub="inference"):
    """What an evaluation left in its folder, as results.json has it."""
    return figures_of(folder / sub / "lvis_results.json")


def figures_of(path):
    return {task: report["figures"] for task, report in json.loads(path.read_text()).items()}


class StoppedError(Exception):
    pass


# ----------------------------------------------------------------------------------------------- both stages


def test_frozen_tensors_are_bit_identical_after_training_and_evaluations(tiny):
    one, two = load(tiny.weights_one)["model"], load(tiny.weights_two)["model"]
    # 10 steps with evaluations after the 4th, 8th and 10th, each followed by train(); BatchNorm is among the frozen.
    assert log(tiny.two).count("before and after") == 3 * 2
    assert any("running_var" in name for name in one)
    assert two.keys() - one.keys() == moved(two) == {PREDICTOR + name for name in CALIBRATION}
    assert fingerprints({name: two[name] for name in one}) == fingerprints(one)


def test_the_log_says_what_was_loaded_trains_and_stayed(tiny):
    text = log(tiny.two)
    new = ", ".join(PREDICTOR + name for name in ("magnitude", "margin", "confidence.weight", "confidence.bias"))
    assert re.search(rf"model_final.pth: loaded (\d+) of \1 frozen tensors; new, starting at the identity: {new}", text)
    assert f"{2 * 5 + 16 + 1} numbers train ({PREDICTOR}magnitude [5]" in text  # 2K + d + 1
    assert re.search(FROZEN, text)
    assert "Running on the CPU: CUDA finds no GPU" in text
    assert "numbers train" not in log(tiny.one)


def test_metrics_hold_the_calibrations_statistics(tiny):
    lines = [json.loads(line) for line in (tiny.two / "metrics.json").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "total_loss" in line)
    magnitude = load(tiny.weights_two)["model"][PREDICTOR + "magnitude"]
    assert last["iteration"] == 9
    assert 0 < last["disalign/confidence_mean"] < 1
    assert last["disalign/magnitude_max"] != 1
    assert abs(last["disalign/magnitude_max"] - float(magnitude.max())) < 0.2
    assert not any("mask" in name or "rpn_loc" in name for name in last)


def test_a_checkpoint_keeps_counts_and_rho(tiny):
    content = json.loads(Path(tiny.data["train"][1]).read_text())
    labels = [annotation["category_id"] - 1 for annotation in content["annotations"]]
    kept = load(tiny.weights_two)["disalign"]
    assert kept["class_counts"] == [labels.count(label) for label in range(runs.CLASSES)]
    assert (kept["rho"], kept["reduction"], kept["background_weight"]) == (0.8, "weighted_mean", 1.0)
    assert "disalign" not in load(tiny.weights_one)


def test_results_and_table_show_stage_ones_own_figures_before(tiny):
    name = tiny.data["val"][0]
    written = results(tiny.two)
    assert written.keys() == {name}
    assert written[name].keys() == {"bbox", "segm"}
    for report in written[name].values():
        assert report.keys() == {"unit", "figures", "stage_one"}
        assert report["unit"] == "percent"
        assert report["stage_one"].keys() == {"figures"}
    before, after = figures(tiny.two)[name]["stage_one"], figures(tiny.two)[name]["disalign"]
    assert before == own_figures(tiny.one) == own_figures(tiny.two, "inference/stage_one")
    assert after == own_figures(tiny.two)
    assert before.keys() == after.keys() == {"bbox", "segm"}
    assert 0 < before["bbox"]["AP"] != after["bbox"]["AP"]
    assert before["bbox"]["APl"] is None  # no object is large
    table = log(tiny.two).rsplit(f"{name}, bbox, before and after", 1)[1].splitlines()
    head, _, *rows = [re.split(" {2,}", line) for line in table[1:6]]
    assert head == ["percent", "AP", "AP50", "AP75", "APr", "APc", "APf"]
    assert rows == [
        ["stage one", *(f"{before['bbox'][figure]:.1f}" for figure in head[1:])],
        ["DisAlign", *(f"{after['bbox'][figure]:.1f}" for figure in head[1:])],
        ["gain", *(f"{after['bbox'][figure] - before['bbox'][figure]:+.1f}" for figure in head[1:])],
    ]


def test_both_commands_from_a_fresh_interpreter(tiny, tmp_path):
    given = ["SOLVER.BASE_LR", 1.0, "SOLVER.MAX_ITER", 10, "TEST.EVAL_PERIOD", 4, "MODEL.WEIGHTS", tiny.weights_one]
    commands = {
        "trained": ["-m", "disalign_d2.train_net", *runs.arguments(tiny.config_two, tmp_path / "trained", *given)],
        "evaluated": [
            ROOT / "scripts" / "train_net.py",
            *runs.arguments(
                tiny.config_two, tmp_path / "evaluated", "MODEL.WEIGHTS", tiny.weights_two, flags=["--eval-only"]
            ),
        ],
    }
    started = {
        name: runs.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name, command in commands.items()
    }
    for name, process in started.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert re.search(r"(?m)^DisAlign +\d", out)
        assert results(tmp_path / name) == results(tiny.two)
        assert log(tmp_path / name).count(EVALUATED) == 1
    # A seed fixes a run.
    assert same(load(tmp_path / "trained" / "model_final.pth")["model"], load(tiny.weights_two)["model"])
    reports = ["instances_predictions.pth", "lvis_instances_results.json", "lvis_results.json"]
    own = {f"inference/{name}" for name in (*reports, *(f"stage_one/{name}" for name in (*reports, "results.json")))}
    assert set(runs.left_behind(tmp_path / "evaluated")) == own | {"results.json"}


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_a_cascade_goes_the_same_way(classifier, tiny, tmp_path):
    for stage, calibrate in (("one", False), ("two", True)):
        config = runs.write_config(tmp_path, tiny.data, stage, cascade=True, classifier=classifier, calibrate=calibrate)
        weights = ["MODEL.WEIGHTS", tmp_path / "one" / "model_final.pth"] if calibrate else []
        assert main(config, tmp_path / stage, *weights, "SOLVER.MAX_ITER", 2) == 0
    one, two = (load(tmp_path / stage / "model_final.pth")["model"] for stage in ("one", "two"))
    added = {
        f"roi_heads.box_predictor.{stage}.cls_score.calibration.{name}" for stage in range(3) for name in CALIBRATION
    }
    assert two.keys() - one.keys() == added
    assert {name for name in added if "margin" in name} <= moved(two)
    assert all(same(two[name], one[name]) for name in two.keys() - added)
    assert f"{3 * (2 * 5 + 16 + 1)} numbers train" in log(tmp_path / "two")
    assert figures(tmp_path / "two")[tiny.data["val"][0]]["stage_one"] == own_figures(tmp_path / "one")


def test_detectron2s_own_switches_work_in_stage_two(tiny, tmp_path):
    options = ["TEST.PRECISE_BN.ENABLED", True, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 2, *NO_TEST]
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    options += ["DATALOADER.REPEAT_THRESHOLD", 0.5, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
    assert stage_two(tiny, tmp_path, *options) == 0
    assert re.search(FROZEN, log(tmp_path))
    assert not (tmp_path / "results.json").exists()


# ---------------------------------------------------------------------------------------------- weight decay


def optimizer_of(*options):
    cfg = tiny_cfg("SOLVER.WEIGHT_DECAY", 0.1, *options, calibrate=True)
    model = build_model(cfg)
    return cfg, model, Trainer.build_optimizer(cfg, model)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("options", [(), ("MODEL.DISALIGN.MARGIN", False, "MODEL.DISALIGN.CONFIDENCE", "one")])
def test_the_magnitude_alone_is_not_decayed(clip, options):
    _, model, optimizer = optimizer_of("SOLVER.CLIP_GRADIENTS.ENABLED", clip, "SOLVER.BASE_LR", 0.5, *options)
    training = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(training)
    with torch.no_grad():
        for parameter in training.values():
            parameter.fill_(3.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in training.items():
        expected = 3.0 if name.endswith("magnitude") else 3.0 * (1 - 0.5 * 0.1)
        assert parameter.flatten().tolist() == pytest.approx([expected] * parameter.numel()), name


def test_clipping_reaches_the_magnitude_too():
    options = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]
    _, model, optimizer = optimizer_of(*options, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0, "SOLVER.BASE_LR", 1.0)
    magnitude = model.get_parameter(PREDICTOR + "magnitude")
    magnitude.grad = torch.full_like(magnitude, 100.0)
    optimizer.step()
    assert (magnitude - 1).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_the_schedule_and_the_biases_settings_reach_both_groups():
    options = ["SOLVER.WEIGHT_DECAY_BIAS", 0.3, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.BASE_LR", 1.0]
    cfg, model, optimizer = optimizer_of(*options, "SOLVER.STEPS", (3,), "SOLVER.MAX_ITER", 6, "SOLVER.WARMUP_ITERS", 2)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for _ in range(6):
        seen.append(
            {
                names[id(parameter)].removeprefix(PREDICTOR): (group["lr"], group["weight_decay"])
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
        )
        optimizer.step()
        scheduler.step()
    assert [step["magnitude"][0] for step in seen] == pytest.approx([0.001, 0.5005, 1, 0.1, 0.1, 0.1])
    for step in seen:
        rate = step["magnitude"][0]
        assert step == {
            "magnitude": (rate, 0.0),
            "margin": (rate, 0.1),
            "confidence.weight": (rate, 0.1),
            "confidence.bias": (2 * rate, 0.3),
        }


def test_stage_one_decays_as_detectron2_does():
    cfg = tiny_cfg("SOLVER.WEIGHT_DECAY", 0.1)
    optimizer = Trainer.build_optimizer(cfg, build_model(cfg))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}  # the norms' own is 0
    assert len(optimizer.param_groups) == 2


class Decaying(Trainer):
    """Builds the optimizer as Detectron2 does: the magnitude decays too."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        return super(Trainer, cls).build_optimizer(cfg, model)


def test_a_trainer_of_ones_own_that_decays_the_magnitude_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_net, "Trainer", Decaying)
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 2, *NO_TEST) == 2
    assert "error: expected no weight decay on the magnitude" in capsys.readouterr().err
    assert not (tmp_path / "model_final.pth").exists()
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.WEIGHT_DECAY", 0.0, *NO_TEST) == 0


# ------------------------------------------------------------------------------------------------ stage one, once


def test_stage_one_is_evaluated_once_for_each_stage_one_file(tiny, tmp_path):
    assert log(tiny.two).count(EVALUATED) == 1  # of three evaluations
    short = ["SOLVER.MAX_ITER", 1]
    shutil.copytree(tiny.two / "inference", tmp_path / "inference")
    assert stage_two(tiny, tmp_path, *short, "SOLVER.BASE_LR", 0.3) == 0
    assert log(tmp_path).count(EVALUATED) == 0
    assert figures(tmp_path)[tiny.data["val"][0]]["stage_one"] == own_figures(tiny.one)

    other = load(tiny.weights_one)
    other["model"]["roi_heads.box_predictor.cls_score.weight"].mul_(-1)
    torch.save(other, tmp_path / "other.pth")
    assert stage_two(tiny, tmp_path, *short, "MODEL.WEIGHTS", tmp_path / "other.pth") == 0
    assert log(tmp_path).count(EVALUATED) == 1
    assert figures(tmp_path)[tiny.data["val"][0]]["stage_one"] != own_figures(tiny.one)


def test_a_broken_record_of_stage_one_is_evaluated_again(tiny, tmp_path):
    (tmp_path / "inference" / "stage_one").mkdir(parents=True)
    (tmp_path / "inference" / "stage_one" / "results.json").write_text('{"key": ')
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 1) == 0
    assert log(tmp_path).count(EVALUATED) == 1


def test_stage_ones_evaluation_can_be_switched_off(tiny, tmp_path):
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 1, "MODEL.DISALIGN.EVAL_STAGE_ONE", False) == 0
    assert EVALUATED not in log(tmp_path)
    assert "before and after" not in log(tmp_path)
    assert figures(tmp_path) == {tiny.data["val"][0]: {"disalign": own_figures(tmp_path)}}


def test_two_validation_sets_each_get_a_table(tiny, tmp_path):
    sets = (tiny.data["val"][0], tiny.data["train"][0])
    options = ["DATASETS.TEST", sets, "MODEL.WEIGHTS", tiny.weights_two]
    assert main(tiny.config_two, tmp_path, *options, flags=["--eval-only"]) == 0
    found = figures(tmp_path)
    assert tuple(found) == sets
    assert found[sets[0]] == figures(tiny.two)[sets[0]]
    assert found[sets[1]]["stage_one"] != found[sets[0]]["stage_one"]
    for name in sets:
        assert f"{name}, segm, before and after" in log(tmp_path)
        for folder in ("inference", "inference/stage_one"):
            assert (tmp_path / folder / name / "lvis_instances_results.json").is_file()


# ------------------------------------------------------------------------------------------------- evaluation


def test_stage_one_alone_is_evaluated_as_its_training_was(tiny, tmp_path):
    options = ["MODEL.WEIGHTS", tiny.weights_one, "MODEL.DISALIGN.EVAL_STAGE_ONE", True]
    assert main(tiny.config_one, tmp_path, *options, flags=["--eval-only"]) == 0
    assert own_figures(tmp_path) == own_figures(tiny.one)
    assert not (tmp_path / "results.json").exists()


def test_evaluation_needs_neither_training_data_nor_counts(tiny, tmp_path):
    data = {"train": [unique("gone"), "gone.json", "gone"], "val": tiny.data["val"]}
    config = runs.write_config(tmp_path, data, calibrate=True)
    options = ["MODEL.WEIGHTS", tiny.weights_two, "MODEL.DISALIGN.CLASS_COUNTS", "gone_too.json"]
    assert main(config, tmp_path / "out", *options, flags=["--eval-only"]) == 0
    assert results(tmp_path / "out") == results(tiny.two)


def test_eval_only_with_resume_takes_the_folders_last_checkpoint(tiny, tmp_path):
    shutil.copytree(tiny.two, tmp_path / "two")
    assert main(tiny.config_two, tmp_path / "two", flags=["--eval-only", "--resume"]) == 0
    assert results(tmp_path / "two") == results(tiny.two)
    assert log(tmp_path / "two").count(EVALUATED) == 1  # by the training


def test_saved_detections_evaluate_to_the_same_figures(tiny, tmp_path):
    detections = tiny.two / "inference" / "lvis_instances_results.json"
    out = tmp_path / "report.json"
    assert evaluate.main([str(detections), tiny.data["val"][1], "--out", str(out)]) == 0
    assert figures_of(out) == figures(tiny.two)[tiny.data["val"][0]]["disalign"]


@pytest.mark.parametrize("shift", [0, 5])
def test_expected_results_are_checked(shift, tiny, tmp_path, monkeypatch):
    own = own_figures(tiny.two)
    expected = [["bbox", "AP", own["bbox"]["AP"] + shift, 0.01], ["segm", "APc", own["segm"]["APc"], 0.01]]
    options = ["MODEL.WEIGHTS", tiny.weights_two, "TEST.EXPECTED_RESULTS", expected]
    if shift:
        with pytest.raises(SystemExit, match=r"^1$"):
            main(tiny.config_two, tmp_path, *options, flags=["--eval-only"])
    else:
        assert main(tiny.config_two, tmp_path, *options, flags=["--eval-only"]) == 0
        assert "Results verification passed" in log(tmp_path)


def test_test_time_augmentation_is_evaluated_beside(tiny, tmp_path):
    augmented = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 64]
    trained = tmp_path / "trained"
    assert stage_two(tiny, trained, *augmented, "SOLVER.MAX_ITER", 1) == 0
    assert "Evaluating with test-time augmentation" in log(trained)
    with_tta = own_figures(trained, "inference_TTA")
    assert with_tta != own_figures(trained)
    # The comparison is of the plain model.
    assert figures(trained)[tiny.data["val"][0]]["disalign"] == own_figures(trained)

    expected = [["bbox_TTA", "AP", with_tta["bbox"]["AP"], 0.01]]
    options = ["MODEL.WEIGHTS", trained / "model_final.pth", "TEST.EXPECTED_RESULTS", expected]
    assert main(tiny.config_two, tmp_path / "evaluated", *augmented, *options, flags=["--eval-only"]) == 0
    assert own_figures(tmp_path / "evaluated", "inference_TTA") == with_tta
    assert "Results verification passed" in log(tmp_path / "evaluated")


def as_coco(tiny, folder):
    """The validation set without LVIS's additions, with category ids that have gaps."""
    content = json.loads(Path(tiny.data["val"][1]).read_text())
    for image in content["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    content["categories"] = [{"id": 10 * one["id"], "name": one["name"]} for one in content["categories"]]
    content["annotations"] = [
        one | {"category_id": 10 * one["category_id"], "iscrowd": 0} for one in content["annotations"]
    ]
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("trained_on", ["known", "gone"])
def test_a_validation_set_in_coco_format(trained_on, tiny, tmp_path):
    data = tiny.data | {"val": [unique("val"), as_coco(tiny, tmp_path), tiny.data["val"][2]]}
    if trained_on == "gone":
        data["train"] = [unique("gone"), "gone.json", "gone"]
    config = runs.write_config(tmp_path, data, calibrate=True)
    assert main(config, tmp_path / "out", "MODEL.WEIGHTS", tiny.weights_two, flags=["--eval-only"]) == 0
    ours, lvis = figures(tmp_path / "out")[data["val"][0]], figures(tiny.two)[tiny.data["val"][0]]
    for stage in ("stage_one", "disalign"):
        # LVIS's set was exhaustive, so that its AP is COCO's.
        assert ours[stage]["segm"]["AP"] == lvis[stage]["segm"]["AP"]
        # Of COCO's, the groups are those of the training images: 12 show red, the others fewer than ten.
        groups = [ours[stage]["bbox"][figure] for figure in ("APr", "APc", "APf")]
        if trained_on == "gone":
            assert groups == [None, None, None]
        else:
            assert groups[2] is None
            assert 4 * groups[0] + groups[1] == pytest.approx(5 * ours[stage]["bbox"]["AP"])
    assert own_figures(tmp_path / "out") == ours["disalign"]
    assert "n/a" in log(tmp_path / "out").rsplit("before and after", 1)[1]


def test_a_set_that_detectron2_registered_as_coco_has_detectron2s_evaluator(tiny, tmp_path):
    name = unique("coco")
    register_coco_instances(name, {}, as_coco(tiny, tmp_path), tiny.data["val"][2])
    options = ["MODEL.WEIGHTS", tiny.weights_two, "DATASETS.TEST", (name,)]
    for _ in range(2):
        assert main(tiny.config_two, tmp_path / "out", *options, flags=["--eval-only"]) == 0
    assert log(tmp_path / "out").count(EVALUATED) == 1
    ours, lvis = figures(tmp_path / "out")[name], figures(tiny.two)[tiny.data["val"][0]]
    for stage in ("stage_one", "disalign"):
        assert ours[stage]["bbox"]["AP"] == pytest.approx(lvis[stage]["bbox"]["AP"], abs=1e-6)
        assert ours[stage]["bbox"]["APl"] is None
        assert "AP-red" in ours[stage]["segm"]


def test_a_set_of_another_kind_is_refused(tiny, tmp_path, capsys):
    name = unique("another")
    DatasetCatalog.register(name, lambda: DatasetCatalog.get(tiny.data["val"][0]))
    MetadataCatalog.get(name).set(evaluator_type="cityscapes_instance")
    options = ["MODEL.WEIGHTS", tiny.weights_two, "DATASETS.TEST", (name,)]
    assert main(tiny.config_two, tmp_path / "out", *options, flags=["--eval-only"]) == 2
    assert f"got '{name}' of type 'cityscapes_instance'; use DATASETS.OWN" in capsys.readouterr().err


def test_data_check_says_what_is_there(tiny, tmp_path, capsys):
    assert main(tiny.config_two, tmp_path / "out", flags=["--data-check"]) == 0
    assert capsys.readouterr().out == f"all data of {tiny.data['train'][0]}, {tiny.data['val'][0]} is there\n"
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- resume

SCHEDULE = ["SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.WARMUP_ITERS", 4, "SOLVER.STEPS", (8,)]
SCHEDULE += ["SOLVER.BASE_LR", 0.5, *NO_TEST]
KILLED_AT = 7  # the last checkpoint is of iteration 5


class ByIteration(Trainer):
    """Images and RoI sampling are functions of the iteration alone, as Detectron2's own are not."""

    @classmethod
    def build_train_loader(cls, cfg):
        return Batches(super().build_train_loader(cfg))

    def run_step(self):
        self.data_loader.iteration = self.iter
        torch.manual_seed(self.iter)
        super().run_step()


class Batches:
    def __init__(self, loader):
        batches = iter(loader)
        self.batches = [next(batches) for _ in range(4)]

    def __iter__(self):
        while True:
            yield copy.deepcopy(self.batches[self.iteration % 4])


def killed():
    """Replaces the trainer by one that dies."""

    class Killed(ByIteration):
        def run_step(self):
            if self.iter == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            super().run_step()

    train_net.Trainer = Killed


def test_a_killed_run_resumes_to_the_uninterrupted_runs_end_bit_for_bit(tiny, tmp_path, monkeypatch):
    folder, whole = tmp_path / "resumed", tmp_path / "whole"
    program = (
        "import sys; from d2 import runs, test_train_net as t; t.killed();"
        "runs.main(sys.argv[1], sys.argv[2], 'MODEL.WEIGHTS', sys.argv[3], *t.SCHEDULE)"
    )
    process = runs.start(
        "-c", program, tiny.config_two, folder, tiny.weights_one, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    monkeypatch.setattr(train_net, "Trainer", ByIteration)
    # Evaluations, which take the calibration off and put it back, leave no trace.
    assert stage_two(tiny, whole, *SCHEDULE, "DATASETS.TEST", (tiny.data["val"][0],), "TEST.EVAL_PERIOD", 4) == 0
    err = process.communicate(timeout=300)[1]
    assert process.returncode == -signal.SIGKILL, err
    assert (folder / "last_checkpoint").read_text() == "model_0000005.pth"
    assert not (folder / "model_final.pth").exists()

    restored = {}

    class Look(ByIteration):
        def before_train(self):
            restored.update(copy.deepcopy({"model": dict(self.model.state_dict()), "trainer": self.state_dict()}))
            super().before_train()

    monkeypatch.setattr(train_net, "Trainer", Look)
    # The stage-one file is no longer needed.
    assert stage_two(tiny, folder, *SCHEDULE, "MODEL.WEIGHTS", "gone.pth", flags=["--resume"]) == 0
    checkpoint = load(folder / "model_0000005.pth")
    assert restored["trainer"].pop("iteration") == checkpoint["trainer"].pop("iteration") + 1 == 6
    assert same(restored["model"], dict(checkpoint["model"]))
    assert same(restored["trainer"], checkpoint["trainer"])
    momentum = restored["trainer"]["_trainer"]["optimizer"]["state"]
    assert len(momentum) == len(CALIBRATION)
    assert all(state["momentum_buffer"].any() for state in momentum.values())
    assert restored["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 6

    end, expected = load(folder / "model_final.pth"), load(whole / "model_final.pth")
    assert moved(end["model"]) == {PREDICTOR + name for name in CALIBRATION}
    for part in ("model", "trainer", "iteration", "disalign"):
        assert same(end[part], expected[part]), part
    one = load(tiny.weights_one)["model"]
    assert all(same(end["model"][name], one[name]) for name in end["model"] if ".calibration." not in name)
    assert re.search(FROZEN, log(folder))


def test_resume_without_a_checkpoint_starts_afresh(tiny, tmp_path):
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 1, *NO_TEST, flags=["--resume"]) == 0
    assert "Starting training from iteration 0" in log(tmp_path)
    assert "new, starting at the identity" in log(tmp_path)


def test_stage_one_resumes_too(tiny, tmp_path):
    period = ["SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST]
    assert main(tiny.config_one, tmp_path, "SOLVER.MAX_ITER", 1, *period) == 0
    assert main(tiny.config_one, tmp_path, "SOLVER.MAX_ITER", 2, *period, flags=["--resume"]) == 0
    assert "Starting training from iteration 1" in log(tmp_path)
    assert load(tmp_path / "model_final.pth")["iteration"] == 1


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--eval-only"]], ids=["fresh", "resume", "eval"])
@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_stage_keeps_out_of_the_other_stages_folder(stage, flags, tiny, capsys):
    config = getattr(tiny, f"config_{stage}")
    theirs = {"one": tiny.two, "two": tiny.one}[stage]
    weights = getattr(tiny, f"weights_{stage if '--eval-only' in flags else 'one'}")
    before = runs.contents(theirs)
    assert {"model_final.pth", "config.yaml", "metrics.json", "last_checkpoint", "log.txt"} <= before.keys()
    assert main(config, theirs, "MODEL.WEIGHTS", weights, flags=flags) == 2
    err = capsys.readouterr().err
    other = {"one": "two", "two": "one"}[stage]
    assert re.search(
        f"error: expected a folder of stage {stage}'s own as OUTPUT_DIR, got '.*' with a checkpoint of stage {other} "
        rf"\('.*model_final.pth'\), which has the same names; give another OUTPUT_DIR$",
        err.strip(),
    )
    assert err.count("\n") == 1
    assert runs.contents(theirs) == before


@pytest.mark.parametrize("found", ["by its name", "by the tag", "as MODEL.WEIGHTS"])
def test_a_stage_one_file_that_was_copied_there_is_not_overwritten(found, tiny, tmp_path, capsys):
    copied = tmp_path / ("model_final.pth" if found == "by its name" else "model_0000003.pth")
    copied.write_bytes(Path(tiny.weights_one).read_bytes())
    if found == "by the tag":
        (tmp_path / "last_checkpoint").write_text(copied.name)
    weights = copied if found == "as MODEL.WEIGHTS" else tiny.weights_one
    assert main(tiny.config_two, tmp_path, "MODEL.WEIGHTS", weights, *NO_TEST) == 2
    assert f"with a checkpoint of stage one ({str(copied)!r})" in capsys.readouterr().err
    assert copied.read_bytes() == Path(tiny.weights_one).read_bytes()


def test_a_tag_that_leads_nowhere_stops_nothing_but_a_resume(tiny, tmp_path, capsys):
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    assert main(tiny.config_two, tmp_path, "MODEL.WEIGHTS", tiny.weights_two, flags=["--eval-only"]) == 0
    assert main(tiny.config_two, tmp_path, "MODEL.WEIGHTS", tiny.weights_one, flags=["--resume"]) == 2
    assert "model_0000099.pth" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- processes


def test_two_processes_train_as_one_with_the_same_total_batch(tiny, tmp_path):
    # All proposals are sampled, and Detectron2's sampler deals one sequence of images out to the ranks in turn.
    options = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000, "SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 4]
    options += ["SOLVER.BASE_LR", 0.5, "MODEL.WEIGHTS", tiny.weights_one]
    alone, together = tmp_path / "alone", tmp_path / "together"
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    process = runs.start(
        *("-m", "disalign_d2.train_net", *runs.arguments(tiny.config_two, together, *options, flags=flags)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert main(tiny.config_two, alone, *options) == 0
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err
    one, two = (load(folder / "model_final.pth")["model"] for folder in (alone, together))
    assert one.keys() == two.keys()
    assert moved(two) == {PREDICTOR + name for name in CALIBRATION}
    for name in one:
        if ".calibration." in name:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
        else:
            assert same(two[name], one[name]), name
    # The evaluations are shared out, and put together again.
    name = tiny.data["val"][0]
    assert figures(together)[name]["stage_one"] == figures(alone)[name]["stage_one"] == own_figures(tiny.one)
    assert figures(together)[name]["disalign"]["bbox"]["AP"] == pytest.approx(
        figures(alone)[name]["disalign"]["bbox"]["AP"], abs=0.1
    )
    assert log(together).count(EVALUATED) == 1
    for text in (log(together), (together / "log.txt.rank1").read_text()):
        assert re.search(FROZEN, text)


def test_detectron2s_ddp_is_replaced_for_the_cpu_only_while_it_is_needed():
    stock = defaults.create_ddp_model
    with train_net.ddp_without_device_ids():
        replaced = defaults.create_ddp_model
        with pytest.raises(ZeroDivisionError), train_net.ddp_without_device_ids():
            _ = 1 / 0
        assert defaults.create_ddp_model is replaced
    assert replaced.func is defaults.create_ddp_model is stock


# ------------------------------------------------------------------------------------------------------ hooks


def meddling(change, at):
    """A trainer that changes the model after the step ``at``."""

    class Meddle(HookBase):
        def after_step(self):
            if self.trainer.iter == at:
                with torch.no_grad():
                    change(self.trainer.model)

    class Meddled(Trainer):
        def build_hooks(self):
            return [Meddle(), *super().build_hooks()]

    return Meddled


@pytest.mark.parametrize(
    "tensor",
    [
        "backbone.bottom_up.stem.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_var",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.mask_head.predictor.bias",
    ],
)
def test_a_frozen_tensor_that_changes_is_found_at_the_end(tensor, tiny, tmp_path, monkeypatch):
    def change(model):
        model.state_dict()[tensor].view(-1)[0] += 1e-3

    monkeypatch.setattr(train_net, "Trainer", meddling(change, at=0))
    with pytest.raises(RuntimeError, match=f"frozen tensors to stay bit-identical, but changed: {tensor}$"):
        stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 2)
    assert "bit-identical to" not in log(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_collapsed_confidence_is_warned_about_once(tiny, tmp_path, monkeypatch):
    def collapse(model):
        model.get_parameter(PREDICTOR + "confidence.bias").fill_(-20)

    monkeypatch.setattr(train_net, "Trainer", meddling(collapse, at=3))
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 8, *NO_TEST) == 0
    text = log(tmp_path)
    assert text.count("WARNING: the mean confidence fell to 0.000 at iteration 5: ") == 1
    assert text.count("the mean confidence fell") == 1
    assert "keep SOLVER.CLIP_GRADIENTS on, or lower SOLVER.BASE_LR or MODEL.DISALIGN.RHO" in text
    assert "the mean confidence fell" not in log(tiny.two)


def test_stage_one_has_no_such_hooks(tiny):
    assert "frozen tensors" not in log(tiny.one)


# --------------------------------------------------------------------------------------------------- devices


def test_cuda_without_a_gpu_falls_back_to_the_cpu_and_says_so(tiny, tmp_path):
    assert stage_two(tiny, tmp_path, "MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 1, *NO_TEST) == 0
    assert "Running on the CPU: CUDA finds no GPU" in log(tmp_path)
    assert "DEVICE: cpu" in (tmp_path / "config.yaml").read_text()
