"""benchmarks/lean_step.py on a tiny model: what its steps compute, and the table."""

import importlib
import json
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
    return run(lean_step, cfg)


def run(lean_step, cfg):
    batch = lean_step.inputs(cfg, SIZE, NUM_IMAGES)
    built = {name: lean_step.build(name, cfg) for name in lean_step.STEPS}
    return {name: (*made[:2], lean_step.step(*made, batch)) for name, made in built.items()}


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


def test_mixed_precision(lean_step, cfg, steps):
    cfg.SOLVER.AMP.ENABLED = True
    seen = {}
    for name, (model, optimizer, losses) in run(lean_step, cfg).items():
        assert losses.keys() == steps[name][2].keys()
        assert all(loss.isfinite() for loss in losses.values())
        seen[name] = model.roi_heads.sampled
        if optimizer is not None:  # the loss was scaled by as much, and unscaled by no one
            (rough, exact) = (
                next(p.grad for path, p in one.named_parameters() if path.endswith("calibration.margin"))
                if name != "full"
                else one.roi_heads.box_predictor.cls_score.bias.grad
                for one in (model, steps[name][0])
            )
            assert torch.allclose(rough, exact, rtol=0.2, atol=0.02 * float(exact.abs().max()))
    # bfloat16 moves the proposals a little, so autocast was on
    assert not torch.equal(seen["forward"], steps["forward"][0].roi_heads.sampled)


def test_table(lean_step, cfg, tmp_path, capsys):
    path, out = tmp_path / "tiny.yaml", tmp_path / "out.json"
    path.write_text(cfg.dump())
    size = [str(side) for side in SIZE]
    options = ["--size", *size, "--images", str(NUM_IMAGES), "--repeats", "3", "--out", str(out)]
    assert lean_step.main(["--config-file", str(path), *options, "MODEL.ROI_HEADS.NUM_CLASSES", "7"]) == 0
    output = capsys.readouterr().out
    about = "2 image(s) of 64x96, 32 RoIs an image, 8 of them foreground, the same in every step; K = 7"
    assert about in output
    written = json.loads(out.read_text())
    assert about in written["about"]
    facts = {key: written[key] for key in ("torch", "device", "dtype", "threads", "turns")}
    assert facts == dict(
        torch=torch.__version__, device="CPU", dtype="float32", threads=torch.get_num_threads(), turns=3
    )
    assert "CPU, float32" in output
    assert [row["step"][:4] for row in written["rows"]] == ["lean", "(a) ", "(b) ", "(c) "]
    lean = written["rows"][0]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()[-4:]]
    for row, cells in zip(written["rows"], shown, strict=True):
        assert len(row["turns"]) == 3
        assert min(row["turns"]) > 0
        ratios = sorted(ours / theirs for ours, theirs in zip(lean["turns"], row["turns"], strict=True))
        assert [row["least"], row["ratio"], row["most"]] == ratios
        assert row["seconds"] == sorted(row["turns"])[1]
        assert row["peak_ratio"] == lean["peak_mib"] / row["peak_mib"]
        ratio = f"{ratios[1]:.2f} ({ratios[0]:.2f}-{ratios[2]:.2f})"
        memory = [f"{row['peak_mib']:.0f}", f"{row['peak_ratio']:.2f}"]
        assert cells == [row["step"], f"{row['seconds']:.4g}", ratio, *memory]
