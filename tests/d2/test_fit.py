"""The command that calibrates a detector by one pass and a solver."""

import json
import re

import pytest

detectron2 = pytest.importorskip("detectron2")

import torch

from disalign_d2 import fit, train_net

from . import runs
from .runs import figures, load, main

PREDICTOR = "roi_heads.box_predictor.cls_score.calibration."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.trained(tmp_path_factory.getbasetemp() / "d2")


def fitted(config, stage_one, folder, *options, flags=()) -> int:
    """Exit status of the command, in this process."""
    flags = [str(flag) for flag in flags]
    with runs.quiet():
        command = [str(config), "--stage-one", str(stage_one), *flags, "--opts", "OUTPUT_DIR", str(folder)]
        return fit.main([*command, *map(str, options)])


def test_its_checkpoint_is_one_of_stage_two(tiny, tmp_path, capfd):
    out = tmp_path / "fit"
    assert fitted(tiny.config_two, tiny.weights_one, out, flags=["--background", 32]) == 0
    stage_one, stage_two = load(tiny.weights_one)["model"], load(out / "fit_rho-0.8.pth")
    new = {name for name in stage_two["model"] if name not in stage_one}
    assert new == {PREDICTOR + name for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")}
    assert all(torch.equal(stage_two["model"][name], tensor) for name, tensor in stage_one.items())
    assert (stage_two["model"][PREDICTOR + "magnitude"] != 1).all()
    facts = stage_two["disalign"]
    assert (facts["rho"], facts["background_weight"], facts["class_counts"]) == (0.8, 1.0, [12, 7, 3, 2, 2])
    seen = facts["fit"][0]["train_accuracy"]
    assert f"stage one gets {seen:.1f} % of its training set right, averaged over the classes" in capfd.readouterr().out
    assert facts["fit"][0]["solution"]["end"] < facts["fit"][0]["solution"]["start"]
    # What it printed is what its checkpoint gives.
    weights = ["MODEL.WEIGHTS", out / "fit_rho-0.8.pth"]
    assert main(tiny.config_two, tmp_path / "again", *weights, flags=["--eval-only"]) == 0
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "results.json").write_text((out / "results_fit_rho-0.8.json").read_text())
    assert figures(tmp_path / "found") == figures(tmp_path / "again")
    assert not (out / "last_checkpoint").exists()


def test_several_rho_from_one_pass_each_evaluated_when_asked(tiny, tmp_path, monkeypatch):
    evaluated = []
    test = train_net.Trainer.test.__func__
    monkeypatch.setattr(
        train_net.Trainer, "test", classmethod(lambda cls, *given: evaluated.append(1) or test(cls, *given))
    )
    flags = ["--rho", 0, 0.5, 1.5, "--features", tmp_path / "rows"]
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path / "fit", flags=flags) == 0
    found = {rho: load(tmp_path / "fit" / f"fit_rho-{rho:g}.pth") for rho in (0, 0.5, 1.5)}
    assert [found[rho]["disalign"]["rho"] for rho in found] == [0, 0.5, 1.5]
    margins = torch.stack([one["model"][PREDICTOR + "margin"] for one in found.values()])
    assert len(margins.unique(dim=0)) == 3
    assert not evaluated
    written = (tmp_path / "rows" / "x.npy").stat().st_mtime_ns
    flags = ["--rho", 0.5, "--features", tmp_path / "rows"]
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path / "again", flags=flags) == 0
    again = load(tmp_path / "again" / "fit_rho-0.5.pth")["model"]
    assert all(torch.equal(again[name], tensor) for name, tensor in found[0.5]["model"].items())
    assert (tmp_path / "rows" / "x.npy").stat().st_mtime_ns == written
    assert len(evaluated) == 1
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path / "all", flags=["--rho", 0, 1, "--test"]) == 0
    assert len(evaluated) == 3
    assert {path.name for path in (tmp_path / "all").glob("results*")} == {
        "results_fit_rho-0.json",
        "results_fit_rho-1.json",
    }


def test_a_balanced_background_weighs_as_the_classes_do(tiny, tmp_path):
    options = ["MODEL.DISALIGN.BACKGROUND_BALANCE", "balanced", "DATASETS.TEST", "()"]
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path / "fit", *options) == 0
    assert load(tmp_path / "fit" / "fit_rho-0.8.pth")["disalign"]["background_weight"] == "balanced"
    assert (
        main(tiny.config_two, tmp_path / "sgd", "MODEL.WEIGHTS", tiny.weights_one, "SOLVER.MAX_ITER", 2, *options) == 0
    )
    assert load(tmp_path / "sgd" / "model_final.pth")["disalign"]["background_weight"] == "balanced"


def test_a_cascade_learns_a_calibration_a_stage(tiny, tmp_path):
    config_one = runs.write_config(tmp_path, tiny.data, "cascade_one", cascade=True)
    config_two = runs.write_config(tmp_path, tiny.data, "cascade_two", cascade=True, calibrate=True)
    steps = ["SOLVER.MAX_ITER", 20, "SOLVER.BASE_LR", 0.05, "DATASETS.TEST", "()"]
    assert main(config_one, tmp_path / "one", *steps) == 0
    weights = tmp_path / "one" / "model_final.pth"
    assert fitted(config_two, weights, tmp_path / "fit", "DATASETS.TEST", "()") == 0
    found = load(tmp_path / "fit" / "fit_rho-0.8.pth")
    names = [f"roi_heads.box_predictor.{stage}.cls_score.calibration.margin" for stage in range(3)]
    assert len(torch.stack([found["model"][name] for name in names]).unique(dim=0)) == 3
    assert len(found["disalign"]["fit"]) == 3


def test_a_strong_penalty_leaves_stage_one(tiny, tmp_path):
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path, flags=["--penalty", 1e9, "--images", 4]) == 0
    (reports,) = json.loads((tmp_path / "results_fit_rho-0.8.json").read_text()).values()
    for report in reports.values():
        assert report["figures"] == report["stage_one"]["figures"]


REFUSED = {
    "a stage one's config": (["one", "one"], [], [], "expected the config of a stage two"),
    "no stage one": (["two", None], [], [], "expected the stage-one checkpoint, got none"),
    "a stage two": (["two", "two"], [], [], "already holds a calibration"),
    "a rho": (["two", "one"], ["--rho", "-1"], [], "expected a finite rho >= 0, got -1"),
    "a penalty": (["two", "one"], ["--penalty", "-1"], [], "expected a finite penalty"),
    "an anchor": (["two", "one"], ["--anchor", "logit_adjust"], [], "'logit_adjust' with confidence='one'"),
    "a weightless background": (
        ["two", "one"],
        [],
        ["MODEL.DISALIGN.BACKGROUND_WEIGHT", "0.0"],
        "expected a background_weight > 0",
    ),
    "rho that look alike": (["two", "one"], ["--rho", "1", "1.0000001"], [], "differ in their first six digits"),
    "a seed": (["two", "one"], ["--seed", "-1"], [], "expected a seed >= 0, got -1"),
    "no images": (["two", "one"], ["--images", "0"], [], "expected 1 or more images"),
    "a setting": (["two", "one"], [], ["MODEL.NONE", "1"], "expected settings of"),
    "a balance": (
        ["two", "one"],
        [],
        ["MODEL.DISALIGN.BACKGROUND_BALANCE", "even"],
        "expected MODEL.DISALIGN.BACKGROUND_BALANCE 'fixed' or 'balanced', got 'even'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tiny, tmp_path, capfd):
    (config, weights), flags, options, sentence = REFUSED[name]
    weights = vars(tiny)[f"weights_{weights}"] if weights else ""
    assert fitted(vars(tiny)[f"config_{config}"], weights, tmp_path / "fit", *options, flags=flags) == 2
    (line,) = re.findall(r"^error: .*$", capfd.readouterr().err, re.M)
    assert sentence in line
    assert not list((tmp_path / "fit").glob("*.pth"))


@pytest.mark.parametrize("name", ["fit_rho-0.8.pth", "results_fit_rho-0.8.json"])
def test_an_earlier_fit_is_kept_without_force(name, tiny, tmp_path, capfd):
    (tmp_path / name).write_text("mine")
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path) == 2
    assert "add --force to replace it" in capfd.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_what_train_net_left_in_the_folder_stays(tiny, tmp_path):
    left = {name: f"{name} of another run" for name in ("results.json", "config.yaml", "log.txt", "metrics.json")}
    for name, text in left.items():
        (tmp_path / name).write_text(text)
    assert fitted(tiny.config_two, tiny.weights_one, tmp_path) == 0
    assert {name: (tmp_path / name).read_text() for name in left} == left
    log = (tmp_path / "fit" / "log.txt").read_text()
    assert "pass over" in log
    assert "DisAlign" in log
