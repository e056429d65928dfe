"""benchmarks/lean_step.py on a tiny model: what its steps compute, and the table."""

import importlib
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch

from .models import tiny_cfg

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NUM_IMAGES, NUM_FOREGROUND, NUM_ROIS = 2, 8, 32
SIZE = [64, 96]


@pytest.fixture
def lean_step(monkeypatch):
    """The script as a module of its own name, so that its processes can import it too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("lean_step")


@pytest.fixture
def cfg():
    return tiny_cfg("MODEL.RESNETS.NORM", "FrozenBN", calibrate=True)


@pytest.fixture
def steps(lean_step, cfg):
    """Name -> model, optimizer and losses after one step on the same images."""
    batch = lean_step.inputs(cfg, SIZE, NUM_IMAGES)
    built = {name: lean_step.build(name, cfg) for name in lean_step.STEPS}
    return {name: (*pair, lean_step.step(*pair, batch)[1]) for name, pair in built.items()}


def test_each_step_computes_the_losses_that_it_says(steps):
    rpn, stock = {"loss_rpn_cls", "loss_rpn_loc"}, {"loss_cls", "loss_box_reg", "loss_mask"}
    losses = {name: set(of) for name, (_, _, of) in steps.items()}
    assert losses == {"lean": {"loss_cls"}, "full": rpn | stock, "official": rpn | stock, "forward": set()}


def test_each_step_trains_what_it_says(steps):
    def trained(name):
        model, optimizer, _ = steps[name]
        listed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return {path for path, parameter in model.named_parameters() if id(parameter) in listed}

    assert trained("lean") == trained("official")
    assert all(".cls_score.calibration." in path for path in trained("lean"))
    assert trained("full") == {path for path, _ in steps["full"][0].named_parameters()}
    assert steps["forward"][1] is None


def test_all_steps_see_the_same_rois(steps):
    rois = [model.roi_heads.sampled for model, _, _ in steps.values()]
    assert all(torch.equal(other, rois[0]) for other in rois)
    assert rois[0].shape == (NUM_IMAGES * NUM_ROIS, 5)
    assert (rois[0][:, 4] < 5).sum() == NUM_IMAGES * NUM_FOREGROUND
    assert torch.equal(steps["lean"][2]["loss_cls"], steps["official"][2]["loss_cls"])


def test_table(lean_step, cfg, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(cfg.dump())
    size = [str(side) for side in SIZE]
    options = ["--size", *size, "--images", str(NUM_IMAGES), "--repeats", "1"]
    assert lean_step.main(["--config-file", str(path), *options, "MODEL.ROI_HEADS.NUM_CLASSES", "7"]) == 0
    output = capsys.readouterr().out
    assert "2 image(s) of 64x96, 32 RoIs an image, 8 of them foreground, the same in every step; K = 7" in output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if "| (" in line]
    assert [row[0][:3] for row in rows] == ["(a)", "(b)", "(c)"]
    lean = next(line for line in output.splitlines() if line.startswith("| lean"))
    lean_s, lean_mib = float(lean.split("|")[2]), float(lean.split("|")[4])
    for _, seconds, ratio, mib, mib_ratio in rows:
        value, least, most = map(float, re.fullmatch(r"(\S+) \((\S+)-(\S+)\)", ratio).groups())
        assert value == least == most == pytest.approx(lean_s / float(seconds), rel=0.1, abs=0.02)
        assert float(mib_ratio) == pytest.approx(lean_mib / float(mib), abs=0.01)
