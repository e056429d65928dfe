"""The benchmarks of classification on small networks: what their steps do, and the tables."""

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import disalign

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--model", "resnet18", "--size", "32", "--classes", "7", "--images", "4", "--batches", "3"]


@pytest.fixture
def classification_step(monkeypatch):
    """The script as a module of its own name, so that its processes can import it too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("classification_step")


@pytest.fixture
def args():
    return argparse.Namespace(model="resnet18", size=32, classes=7, images=4, batches=3, amp=False)


def test_each_step_trains_what_it_says(classification_step, args):
    trained = {}
    for name in ("full", "stage_two"):
        run = classification_step.prepare(args, name)
        run()
        model = run.args[0]
        trained[name] = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
        assert model.bn1.training == (name == "full")  # a frozen trunk keeps its statistics
    assert trained["full"] == {path for path, _ in model.named_parameters() if ".calibration." not in path}
    assert {path.removeprefix("fc.calibration.") for path in trained["stage_two"]} == {
        "magnitude",
        "margin",
        "confidence.weight",
        "confidence.bias",
    }


def test_the_loss_is_that_of_the_stage(classification_step, args):
    gradients = {}
    for name, loss in {"full": F.cross_entropy, "stage_two": disalign.GRWCrossEntropyLoss(range(1, 8), 1.2)}.items():
        run = classification_step.prepare(args, name)
        run()
        model, images, labels = run.args[0], *run.args[-2:]
        last = model.fc.bias if name == "full" else model.fc.calibration.margin
        found = last.grad.clone()
        loss(model(images), labels).backward()  # in a training batch norm the same batch has the same statistics
        gradients[name] = (last.grad - found, found)
    for again, found in gradients.values():
        assert torch.allclose(again, found, atol=1e-6)


def test_collect_passes_over_the_batches(classification_step, args):
    run = classification_step.prepare(args, "collect")
    features, model = run(), run.args[0]
    images = run.args[-1].dataset.images
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.x.shape == (12, 512)
    assert torch.allclose(features.x, expected.repeat(3, 1), atol=1e-4)
    assert features.y.tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("amp", [False, True])
def test_table(classification_step, tmp_path, capsys, amp):
    out = tmp_path / "out.json"
    assert classification_step.main([*SMALL, "--repeats", "3", "--out", str(out), *["--amp"] * amp]) == 0
    output, written = capsys.readouterr().out, json.loads(out.read_text())
    about = "resnet18, 4 image(s) of 32x32, K = 7"
    assert about in output
    assert written["about"] == about
    assert (written["torch"], written["turns"]) == (torch.__version__, 3)
    assert ("autocast" in written["dtype"]) == amp
    rows = written["rows"]
    assert [row["step"] for row in rows] == list(classification_step.STEPS.values())
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()[-4:]]
    for row, cells in zip(rows, shown, strict=True):
        ratios = sorted(own / forward for own, forward in zip(row["turns"], rows[-1]["turns"], strict=True))
        assert [row["least"], row["ratio"], row["most"]] == ratios
        assert row["seconds"] == sorted(row["turns"])[1]
        assert row["peak_ratio"] == row["peak_mib"] / rows[0]["peak_mib"]
        assert cells[1:3] == [f"{row['seconds']:.4g}", f"{ratios[1]:.2f} ({ratios[0]:.2f}-{ratios[2]:.2f})"]


def test_frozen_features_of_the_classes_that_the_trunk_has_not_seen(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    labels = {"train": np.arange(200) % 100, "test": np.arange(100)}
    random = np.random.default_rng(0)
    arrays = {f"{split}_labels": y for split, y in labels.items()}
    arrays |= {
        f"{split}_images": random.integers(256, size=(len(y), 32, 32, 3)).astype(np.uint8)
        for split, y in labels.items()
    }
    np.savez("data.npz", **arrays)
    assert (
        importlib.import_module("frozen_features").main(["halves", "out", "--data", "data.npz", "--epochs", "1"]) == 0
    )
    for split, y in labels.items():
        features = disalign.Features.open(f"out/{split}")
        assert features.x.shape == (len(y) // 2, 64)
        assert features.y.tolist() == (y[y % 2 == 1] // 2).tolist()
    with np.load("out/even.npz") as seen:
        assert len(seen["train_labels"]) == 150
        even = np.concatenate([arrays[f"{split}_images"][y % 2 == 0] for split, y in labels.items()])
        assert np.array_equal(seen["train_images"], even)
