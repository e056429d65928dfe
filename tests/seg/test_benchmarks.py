"""benchmarks/segmentation_step.py on small images: what its steps compute, and the table."""

import argparse
import importlib
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
from mmengine.optim import AmpOptimWrapper

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STOCK = "fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py"


@pytest.fixture
def segmentation_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("segmentation_step")


@pytest.fixture
def cfg(segmentation_step):
    cfg = segmentation_step.settings(argparse.Namespace(config=STOCK, crop=[32, 32], classes=5))
    cfg.backbone.update(depth=18, base_channels=8, stem_channels=8)
    cfg.decode_head.update(in_channels=64, channels=8)
    cfg.auxiliary_head.update(in_channels=32, channels=8)
    return cfg


def test_each_step_computes_the_losses_that_it_says(segmentation_step, cfg):
    batch = segmentation_step.inputs(cfg, 2)
    logged, trained = {}, {}
    for name in segmentation_step.STEPS:
        model, optimizer = segmentation_step.build(name, cfg, 50)
        logged[name] = segmentation_step.step(model, optimizer, False, batch)
        trained[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    both = {"decode.loss_ce", "decode.acc_seg", "aux.loss_ce", "aux.acc_seg"}
    assert both <= set(logged["full"])
    assert both <= set(logged["official"])
    ours = [logged[name] for name in ("plain", "exact", "sampled")]
    assert all(not key.startswith("aux") for losses in ours for key in losses)
    assert float(ours[1]["decode.loss_grw"]) == pytest.approx(float(ours[0]["decode.loss_grw"]), rel=1e-5)
    assert float(ours[2]["decode.loss_grw"]) == pytest.approx(float(ours[0]["decode.loss_grw"]), rel=0.2)
    assert logged["forward"] == {}
    calibration = 2 * 5 + 8 + 1
    assert [trained[name] for name in ("official", "plain", "exact", "sampled")] == [calibration] * 4


def test_the_table_has_a_row_for_each_step(segmentation_step, monkeypatch, capsys, tmp_path):
    names = dict.fromkeys(segmentation_step.STEPS)
    monkeypatch.setattr(
        segmentation_step,
        "measure",
        lambda *_: (dict.fromkeys(names, 100.0), {name: [1.0, 2.0, 3.0] for name in names}, {}),
    )
    out = tmp_path / "out.json"
    assert segmentation_step.main(["--crop", "32", "32", "--classes", "5", "--repeats", "3", "--out", str(out)]) == 0
    rows = re.findall(r"^\| .* \| 2 \| 1\.00 \(1\.00-1\.00\) \| 100 \| 1\.00 \|$", capsys.readouterr().out, re.M)
    assert len(rows) == len(names)
    written = json.loads(out.read_text())
    assert [row["turns"] for row in written["rows"]] == [[1.0, 2.0, 3.0]] * len(names)
    assert written["torch"] == torch.__version__
    assert written["dtype"] == "float32"
    assert written["turns"] == 3


def test_mixed_precision_runs_through_mmengine(segmentation_step, cfg, monkeypatch):
    # MMEngine's wrapper insists on a GPU; its scale and the autocast work on a CPU alike
    module = importlib.import_module("mmengine.optim.optimizer.amp_optimizer_wrapper")
    monkeypatch.setattr(module, "is_cuda_available", lambda: True)
    monkeypatch.setattr(module, "GradScaler", lambda: torch.amp.GradScaler("cpu"))
    monkeypatch.setattr(segmentation_step, "AmpOptimWrapper", OnTheCPU)
    batch = segmentation_step.inputs(cfg, 1)
    for name in segmentation_step.STEPS:
        losses = []
        for amp in (False, True):
            seen, built = [], segmentation_step.build(name, cfg, 50, amp)
            built[0].decode_head.convs[0].register_forward_hook(lambda _, x, y, seen=seen: seen.append(y.dtype))
            losses.append(segmentation_step.step(*built, amp, batch))
            assert seen[-1] == (torch.bfloat16 if amp else torch.float32)
        if name != "forward":
            assert float(losses[1]["loss"]) == pytest.approx(float(losses[0]["loss"]), rel=0.02)


class OnTheCPU(AmpOptimWrapper):
    @contextmanager
    def optim_context(self, model):
        with torch.autocast("cpu"):
            yield


def test_mixed_precision_needs_a_gpu(segmentation_step, monkeypatch, capsys):
    monkeypatch.setattr(segmentation_step, "DEVICE", "cpu")
    assert segmentation_step.main(["--amp"]) == 2
    assert "expected a GPU for --amp" in capsys.readouterr().err
