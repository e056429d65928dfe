"""Runs stop at the first loss that is not finite; one run per folder; records and settings of another type."""

import copy
import subprocess
import sys

import pytest

pytest.importorskip("detectron2")

import torch

from disalign import InputError
from disalign.io.annotations import read_annotations
from disalign.io.locks import LOCK, locked_folder
from disalign_d2.fast_rcnn import DisAlignOutputLayers

from . import runs
from .annotations import coco, write
from .runs import load, main

NO_TEST = ["DATASETS.TEST", "()"]
HOLD = """
import sys
from disalign.io import locked_folder
with locked_folder(sys.argv[1], "OUTPUT_DIR"):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.trained(tmp_path_factory.getbasetemp() / "d2")


def stage_two(tiny, folder, *options, flags=()):
    return main(tiny.config_two, folder, "MODEL.WEIGHTS", tiny.weights_one, *NO_TEST, *options, flags=flags)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_stops_at_its_first_loss_that_is_not_finite(value, tiny, tmp_path, monkeypatch, capsys):
    losses, calls = DisAlignOutputLayers.losses, []

    def broken(self, *args):
        calls.append(None)
        found = losses(self, *args)
        return found | {"loss_cls": found["loss_cls"] * (value if len(calls) == 3 else 1)}

    monkeypatch.setattr(DisAlignOutputLayers, "losses", broken)
    options = ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2]
    assert stage_two(tiny, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert "error: expected a finite loss, but: Loss became infinite or NaN at iteration=2!; " in error
    assert len(calls) == 3
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "model_0000001.pth")["model"].values())


@pytest.mark.parametrize("name", ["SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY"])
def test_settings_that_are_not_finite_are_refused(name, tiny, tmp_path, capsys):
    assert stage_two(tiny, tmp_path, name, "1e999") == 2
    assert "expected a finite number as the optimizer's " in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", -1], "expected 1 or more as MODEL.ROI_HEADS.NUM_CLASSES, got -1"),
        (["MODEL.DEVICE", "tpu"], "expected a device that torch has here as MODEL.DEVICE, got 'tpu': "),
        (["MODEL.DEVICE", ""], "expected a device that torch has here as MODEL.DEVICE, got '': "),
    ],
)
def test_settings_that_no_model_has_are_refused(options, sentence, tiny, tmp_path, capsys):
    assert stage_two(tiny, tmp_path, *options) == 2
    assert sentence in capsys.readouterr().err


def test_a_second_run_in_a_folder_is_refused(tiny, tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 1) == 2
        assert f"as OUTPUT_DIR, but another run writes to {str(tmp_path)!r} (process {other.pid} on" in (
            capsys.readouterr().err
        )
        other.kill()
    assert (tmp_path / LOCK).exists()
    assert stage_two(tiny, tmp_path, "SOLVER.MAX_ITER", 1) == 0
    assert not (tmp_path / LOCK).exists()
    with locked_folder(tmp_path, "OUTPUT_DIR"):
        pass


ODD = {"number": 5, "text": "x", "list": [1, "a"], "nothing": None, "tensor": torch.ones(2), "nested": {"state": 1}}


@pytest.mark.parametrize(
    "entry", ["model", "trainer", "trainer.iteration", "trainer._trainer", "trainer.hooks", "disalign"]
)
def test_records_of_another_type_are_one_sentence_or_do_no_harm(entry, tiny, tmp_path, capsys):
    whole = load(tiny.weights_two)
    refusals = 0
    for name, value in ODD.items():
        checkpoint, folder = copy.deepcopy(whole), tmp_path / name
        above, _, last = entry.rpartition(".")
        (checkpoint[above] if above else checkpoint)[last] = value
        folder.mkdir()
        torch.save(checkpoint, folder / "model_0000001.pth")
        (folder / "last_checkpoint").write_text("model_0000001.pth")
        status = stage_two(tiny, folder, "SOLVER.MAX_ITER", 2, flags=["--resume"])
        error = capsys.readouterr().err
        assert status in (0, 2), name
        if status:
            refusals += 1
            assert error.count("error: expected ") == 1, (name, error)
    assert refusals or entry == "disalign"  # which only tells


@pytest.mark.parametrize(
    ("counts", "size"),
    [
        ([3, -2, 5], [2, 3]),
        ([3, 3], [2, 4]),
        ([6], [-2, -3]),
        ([0], [0, 5]),
        ("abc", [1 << 20, 1 << 20]),
        ([1.5, 4.5], [2, 3]),
        (None, [2, 3]),
        ([6], 6),
    ],
)
def test_an_rle_that_fills_no_mask_is_refused(counts, size, tmp_path):
    content = coco()
    content["annotations"][0]["segmentation"] = {"counts": counts, "size": size}
    with pytest.raises(InputError, match=r"as segmentation in '.*', got another in annotation"):
        read_annotations(write(tmp_path, content, "a.json"))
