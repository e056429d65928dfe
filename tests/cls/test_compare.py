"""Methods compared by the command, against the commands that evaluate one checkpoint."""

import json
import re
import shlex
import sys

import pytest
import torch

from disalign_cls import compare as compare_command
from disalign_cls import fit as fit_command
from disalign_tools.__main__ import main as console

from .runs import BASELINE, DISALIGN, PLAIN, evaluate, left_behind, train

BOUND = "cls/digits/bound_cnn_digits-lt.py"


def compare(stage_ones, out, *flags, config=DISALIGN["linear"]):
    """Exit status of ``disalign_cls.compare``."""
    return compare_command.main([config, "--stage-one", *map(str, stage_ones), "--out", str(out), *flags])


def comparison(folder):
    return json.loads((folder / "comparison.json").read_text())


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_its_figures_are_those_of_the_test_command(classifier, stage_ones, tmp_path, capfd):
    assert compare([stage_ones[classifier]], tmp_path / "out", "--sweep", config=DISALIGN[classifier]) == 0
    out = capfd.readouterr().out
    content = comparison(tmp_path / "out")
    (run,) = content["runs"]
    assert "disalign report" in out
    assert re.search(rf"DisAlign +rho 1.5 +{run['methods']['disalign']['figures']['average']:.1f} ", out)

    flags = ["--stage-one", str(stage_ones[classifier]), "--work-dir", str(tmp_path / "fit")]
    assert fit_command.main([DISALIGN[classifier], *flags]) == 0
    assert evaluate(DISALIGN[classifier], tmp_path / "fit" / "fit_rho-1.5.pth", tmp_path / "test") == 0
    report = json.loads((tmp_path / "test" / "results_test.json").read_text())
    names = {"average": "top1", "balanced": "balanced", "many": "many", "medium": "medium", "few": "few"}
    for name, expected in (("stage_one", report["stage_one"]), ("disalign", report)):
        found = run["methods"][name]
        assert {key: found["figures"][key] for key in names} == pytest.approx(
            {key: expected["figures"][theirs] for key, theirs in names.items()}
        )
        assert found["per_class"]["accuracy"] == pytest.approx(expected["per_class"]["accuracy"])
    assert content["classes"] == report["classes"]
    assert content["class_counts"] == report["class_counts"]
    assert (content["split"], content["examples"], content["rho"]) == ("test", 500, 1.5)
    given = [
        DISALIGN[classifier],
        "--stage-one",
        str(stage_ones[classifier]),
        "--out",
        str(tmp_path / "out"),
        "--sweep",
    ]
    assert shlex.split(content["command"]) == ["python", "-m", "disalign_cls.compare", *given]
    assert content["groups_text"] == {"many": "> 30 training images", "few": "< 6"}


def test_several_stage_ones_a_bound_and_kept_features(stage_one, tmp_path, capfd):
    assert train(BASELINE["linear"], tmp_path / "other", PLAIN, "randomness.seed=7") == 0
    other = tmp_path / "other" / "epoch_2.pth"
    flags = ["--methods", "disalign", "--rho", "1", "--bound", BOUND, "--features", str(tmp_path / "features")]
    assert compare([stage_one, other], tmp_path / "a", *flags) == 0
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")}
    assert len(before) == 2 * 3 * 3  # stage ones, sets, and x, y and weights
    assert compare([stage_one, other], tmp_path / "b", *flags) == 0
    out = capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")} == before
    assert "mean +- standard deviation of 2 stage ones" in out
    a, b = comparison(tmp_path / "a"), comparison(tmp_path / "b")
    assert [run["stage_one"] for run in a["runs"]] == [str(stage_one), str(other)]
    assert a["runs"][0]["methods"]["stage_one"] != a["runs"][1]["methods"]["stage_one"]
    assert [run["methods"]["disalign"]["figures"] for run in a["runs"]] == [
        run["methods"]["disalign"]["figures"] for run in b["runs"]
    ]
    assert set(a["runs"][0]["methods"]) == {"stage_one", "logit_adjust", "rho_0", "disalign", "bound"}
    assert [[one["value"] for one in run["sweep"]] for run in a["runs"]] == 2 * [[0.0, 0.5, 1.0, 1.5, 2.0]]
    assert [(run["seed"], run["pass_seconds"] > 0) for run in a["runs"]] == 2 * [(0, True)]
    assert (a["rho"], a["dataset"]) == (1.0, "digits-lt")
    few = [run["methods"][name]["figures"]["few"] for run in a["runs"][:1] for name in ("bound", "stage_one")]
    assert few[0] > few[1]


def test_settings_chosen_on_a_named_split(stage_one, tmp_path, capfd):
    flags = ["--choose-on", "val", "--methods", "disalign", "--cfg-options", "val_dataloader.dataset.split=balanced"]
    assert compare([stage_one], tmp_path / "out", *flags) == 0
    assert "settings: best balanced accuracy on 1240 others" in capfd.readouterr().out
    assert (comparison(tmp_path / "out")["split"], comparison(tmp_path / "out")["examples"]) == ("test", 500)


def test_the_recorded_command_can_be_run_again(stage_one, tmp_path, monkeypatch):
    arguments = [DISALIGN["linear"], "--stage-one", str(stage_one), "--out", str(tmp_path), "--methods", "disalign"]
    monkeypatch.setattr(sys, "argv", ["disalign", "compare", *arguments])
    assert console() == 0
    assert comparison(tmp_path)["command"] == " ".join(["python -m disalign_cls.compare", *arguments])


def test_the_seed_and_the_configs_zero_count_reach_the_core(stage_one, tmp_path, monkeypatch):
    given, inner = {}, compare_command.compare
    monkeypatch.setattr(compare_command, "compare", lambda *args, **own: given.update(own) or inner(*args, **own))
    flags = ["--seed", "3", "--methods", "disalign", "--cfg-options", "model.loss.zero_count=exclude"]
    assert compare([stage_one], tmp_path, *flags) == 0
    assert (given["seed"], given["zero_count"]) == (3, "exclude")
    assert comparison(tmp_path)["runs"][0]["seed"] == 3


REFUSED = {
    "an unknown method": (["--methods", "lwd"], "expected methods among stage_one, logit_adjust, .*, got lwd"),
    "no sense": (["--methods", "norcal"], "'norcal': it spares a background"),
    "the test split": (["--choose-on", "val"], "expected a val split other than the test split"),
    "rho": (["--rho", "-1"], "expected a finite rho >= 0, got -1"),
    "a rho of the sweep": (["--sweep", "1", "nan"], "expected a finite rho >= 0, got nan"),
    "a bound that is nowhere": (["--bound", "nowhere.py"], "expected a config file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, stage_one, tmp_path, capfd):
    flags, sentence = REFUSED[name]
    assert compare([stage_one], tmp_path / "out", *flags) == 2
    told = capfd.readouterr()
    assert re.search(f"^error: .*{sentence}", told.err, re.MULTILINE)
    assert str(stage_one) not in told.out  # refused before the passes
    assert left_behind(tmp_path / "out") == []


def test_stage_ones_are_files_each_once(stage_one, tmp_path, capfd):
    assert compare([stage_one, stage_one], tmp_path / "out") == 2
    assert "expected every stage one once" in capfd.readouterr().err
    assert (
        compare_command.main([DISALIGN["linear"], "--out", str(tmp_path / "out"), "--cfg-options", "stage_one="]) == 2
    )
    assert "expected stage-one checkpoints, got none; give them: --stage-one FILE" in capfd.readouterr().err
    assert compare([stage_one], tmp_path / "out", config=BASELINE["linear"]) == 2
    assert "expected the config of a stage two" in capfd.readouterr().err


def test_classes_in_another_order_are_refused(stage_one, tmp_path, capfd):
    checkpoint = torch.load(stage_one, weights_only=True)
    checkpoint["meta"]["dataset_meta"]["classes"] = [str(digit) for digit in reversed(range(10))]
    torch.save(checkpoint, tmp_path / "other.pth")
    assert compare([tmp_path / "other.pth"], tmp_path / "out") == 2
    assert re.search("^error: expected .*classes", capfd.readouterr().err, re.MULTILINE)
    assert left_behind(tmp_path / "out") == []


def test_an_earlier_comparison_is_kept(stage_one, tmp_path, capfd):
    (tmp_path / "comparison.json").write_text("mine")
    assert compare([stage_one], tmp_path, "--methods", "disalign") == 2
    assert "add --force to replace it" in capfd.readouterr().err
    assert (tmp_path / "comparison.json").read_text() == "mine"
    assert compare([stage_one], tmp_path, "--methods", "disalign", "--force") == 0
    assert comparison(tmp_path)["task"] == "classification"


def test_nothing_of_the_checkpoint_changes(stage_one, tmp_path):
    before = torch.load(stage_one, weights_only=True)["state_dict"]
    # Here it is the config that names the checkpoint.
    flags = ["--out", str(tmp_path), "--cfg-options", f"stage_one={stage_one}"]
    assert compare_command.main([DISALIGN["linear"], *flags]) == 0
    after = torch.load(stage_one, weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
