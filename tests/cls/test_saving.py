"""Checkpoints of a run outlive kills, full disks, moves and numbers that are not finite."""

import copy
import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import disalign_mmengine.saving
from disalign.io import atomic_file
from disalign.io.files import TEMPORARY
from disalign.io.locks import LOCK, try_lock
from disalign_cls.classifiers import DisAlignClassifier
from disalign_mmengine.saving import LAST, AtomicBackend, latest_checkpoint

from .runs import BASELINE, DISALIGN, evaluate, train

BEST = ("default_hooks.checkpoint.save_best=val/top1", "train_cfg.val_interval=1")


def kept(number):
    return f"default_hooks.checkpoint.max_keep_ckpts={number}"


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def load(path):
    return torch.load(path, weights_only=True)


class KilledError(BaseException):
    pass


@pytest.fixture
def at_save(monkeypatch):
    """``at_save(number, how)``: the writing of that checkpoint (from 0 on) ends half-way by ``how()``."""

    def after(number, how):
        written = []

        def put(self, obj, filepath):
            with atomic_file(filepath) as file:
                if len(written) == number:
                    file.write(obj[: len(obj) // 2])
                    how()
                file.write(obj)
            written.append(filepath)

        monkeypatch.setattr(AtomicBackend, "put", put)

    return after


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill():
    raise KilledError


def scores(monkeypatch, *values):
    """Let the validations find these top-1 accuracies."""
    given = iter(values)
    monkeypatch.setattr(
        disalign_mmengine.saving.CheckpointHook,
        "after_val_epoch",
        lambda self, runner, metrics: self._save_best_checkpoint(runner, {"val/top1": next(given)}),
    )


def test_a_full_disk_costs_no_checkpoint(stage_one, tmp_path, at_save, capsys):
    at_save(2, full)
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", kept(1), epochs=4) == 2
    assert "expected a place to write" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["epoch_2.pth"]
    assert (tmp_path / LAST).read_text() == "epoch_2.pth"
    assert load(tmp_path / "epoch_2.pth")["meta"]["epoch"] == 2
    assert not list(tmp_path.glob(f"*{TEMPORARY}"))


def test_the_old_checkpoint_goes_when_the_new_one_is_named(stage_one, tmp_path, monkeypatch):
    seen = []
    unlink = Path.unlink

    def look(self, **options):
        seen.append((self.name, (tmp_path / LAST).read_text(), checkpoints(tmp_path)))
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", look)
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", kept(1), epochs=3) == 0
    assert seen == [
        ("epoch_1.pth", "epoch_2.pth", ["epoch_1.pth", "epoch_2.pth"]),
        ("epoch_2.pth", "epoch_3.pth", ["epoch_2.pth", "epoch_3.pth"]),
    ]


def test_the_last_checkpoints_are_kept_over_a_resume(stage_one, tmp_path):
    options = [f"stage_one={stage_one}", kept(2)]
    assert train(DISALIGN["linear"], tmp_path, *options, epochs=3) == 0
    assert train(DISALIGN["linear"], tmp_path, *options, epochs=5, flags=["--resume"]) == 0
    assert checkpoints(tmp_path) == ["epoch_4.pth", "epoch_5.pth"]


@pytest.mark.parametrize("end", [full, kill])
def test_the_best_checkpoint_outlives_the_writing_of_a_better_one(end, stage_one, tmp_path, at_save, monkeypatch):
    scores(monkeypatch, 50.0, 60.0)
    at_save(4, end)  # the best of epoch 2, after epoch 1, its best, epoch 1 again, and epoch 2
    with pytest.raises(KilledError) if end is kill else pytest.MonkeyPatch.context():
        train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", *BEST, kept(1), epochs=3)
    assert checkpoints(tmp_path) == ["best_val_top1_epoch_1.pth", "epoch_2.pth"]
    assert load(tmp_path / "best_val_top1_epoch_1.pth")["state_dict"]


@pytest.mark.parametrize("save_best", ["val/top1", "auto"])
def test_a_resumed_run_knows_the_best_checkpoint_that_no_other_tells_of(
    save_best, stage_one, tmp_path, at_save, monkeypatch
):
    options = [f"stage_one={stage_one}", *BEST, f"default_hooks.checkpoint.save_best={save_best}", kept(1)]
    scores(monkeypatch, 50.0, 70.0)
    at_save(5, kill)  # epoch 2 again, with the best of epoch 2 in its records
    with pytest.raises(KilledError):
        train(DISALIGN["linear"], tmp_path, *options, epochs=4)
    assert checkpoints(tmp_path) == ["best_val_top1_epoch_1.pth", "best_val_top1_epoch_2.pth", "epoch_2.pth"]
    assert load(tmp_path / "epoch_2.pth")["message_hub"]["runtime_info"]["best_score"] == 50.0

    monkeypatch.undo()
    scores(monkeypatch, 60.0, 65.0)
    assert train(DISALIGN["linear"], tmp_path, *options, epochs=4, flags=["--resume"]) == 0
    assert "best_val_top1_epoch_2.pth" in checkpoints(tmp_path)
    assert not {"best_val_top1_epoch_3.pth", "best_val_top1_epoch_4.pth"} & {*checkpoints(tmp_path)}
    runtime = load(tmp_path / "epoch_4.pth")["message_hub"]["runtime_info"]
    assert (runtime["best_score"], Path(runtime["best_ckpt"]).name) == (70.0, "best_val_top1_epoch_2.pth")


def test_a_moved_folder_resumes(stage_one, tmp_path):
    assert train(DISALIGN["linear"], tmp_path / "old", f"stage_one={stage_one}") == 0
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert train(DISALIGN["linear"], tmp_path / "new", epochs=3, flags=["--resume"]) == 0
    assert "epoch_3.pth" in checkpoints(tmp_path / "new")
    assert not (tmp_path / "old").exists()


def test_the_name_of_the_last_checkpoint_is_replaced_and_not_written_over(stage_one, tmp_path):
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=1) == 0
    os.link(tmp_path / LAST, tmp_path / "before")  # shows what is written in place
    assert train(DISALIGN["linear"], tmp_path, epochs=2, flags=["--resume"]) == 0
    assert (tmp_path / LAST).read_text() == "epoch_2.pth"
    assert (tmp_path / "before").read_text() == "epoch_1.pth"


@pytest.mark.parametrize("last", ["", None, "epoch_9.pth", "/gone/epoch_1.pth", "epoch_3.pth", "\0"])
def test_the_newest_whole_checkpoint_is_resumed_where_the_last_one_is_not_known(last, tmp_path):
    for number, content in enumerate([torch.zeros(1), torch.ones(1), b"half"], 1):
        path = tmp_path / f"epoch_{number}.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        os.utime(path, (number, number))
    if last is not None:
        (tmp_path / LAST).write_text(last)
    named = "epoch_1.pth" if last and last.startswith("/gone") else "epoch_2.pth"
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / named)


def test_checkpoints_of_iterations_are_looked_for_too(tmp_path):
    for name, time in {"iter_9.pth": 1, "epoch_1.pth": 2, "iter_10.pth": 3}.items():
        torch.save(torch.ones(1), tmp_path / name)
        os.utime(tmp_path / name, (time, time))
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_10.pth")


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None
    assert latest_checkpoint(str(tmp_path / "gone")) is None


# ------------------------------------------------------------------------------------------- one run per folder

HOLD = """
import sys
from disalign.io import locked_folder
with locked_folder(sys.argv[1], "work_dir"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_in_a_folder_is_refused(other_run, stage_one, tmp_path, capsys):
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}") == 2
    assert f"(process {other_run.pid} on " in capsys.readouterr().err
    assert checkpoints(tmp_path) == []


def test_a_killed_runs_lock_is_stale(other_run, stage_one, tmp_path):
    other_run.kill()
    other_run.wait()
    assert str(other_run.pid) in (tmp_path / LOCK).read_text()
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=1) == 0


def test_the_next_run_removes_what_a_killed_one_left_half_written(stage_one, tmp_path):
    (tmp_path / f".abc{TEMPORARY}").write_bytes(b"half")
    with (tmp_path / f".def{TEMPORARY}").open("wb") as file:  # a living process is at it
        assert try_lock(file)
        assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=1) == 0
        assert [path.name for path in tmp_path.glob(f".*{TEMPORARY}")] == [f".def{TEMPORARY}"]


# ------------------------------------------------------------------------------------------------- finite numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_stops_at_its_first_loss_that_is_not_finite(value, stage_one, tmp_path, monkeypatch, capsys):
    losses, iterations = DisAlignClassifier.losses, []

    def broken(self, features, labels):
        iterations.append(len(iterations) + 1)
        found = losses(self, features, labels)
        return found | {"loss": found["loss"] * (value if len(iterations) == 6 else 1)}

    monkeypatch.setattr(DisAlignClassifier, "losses", broken)
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", kept(1), epochs=3) == 2
    assert f"expected a finite loss, got {value} at iteration 6, and stopped" in capsys.readouterr().err
    assert iterations == [1, 2, 3, 4, 5, 6]
    assert checkpoints(tmp_path) == ["epoch_1.pth"]
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "epoch_1.pth")["state_dict"].values())


def test_numbers_that_are_not_finite_are_not_saved(stage_one, tmp_path, monkeypatch, capsys):
    losses, iterations = DisAlignClassifier.losses, []

    def spoil(self, features, labels):
        iterations.append(None)
        if len(iterations) == 8:  # the last of epoch 2: its own loss is finite
            self.classifier.calibration.magnitude.register_hook(lambda gradient: gradient * float("nan"))
        return losses(self, features, labels)

    monkeypatch.setattr(DisAlignClassifier, "losses", spoil)
    options = [f"stage_one={stage_one}", kept(1), "optim_wrapper.clip_grad=None"]
    assert train(DISALIGN["linear"], tmp_path, *options, epochs=3) == 2
    assert "of the model at iteration 8, but got NaN or infinity in classifier.calibration.magnitude" in (
        capsys.readouterr().err
    )
    assert checkpoints(tmp_path) == ["epoch_1.pth"]


@pytest.mark.parametrize("config", [BASELINE, DISALIGN])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_settings_that_are_not_finite_are_refused(config, name, stage_one, tmp_path, capsys):
    options = [f"stage_one={stage_one}"] if config is DISALIGN else []
    assert train(config["linear"], tmp_path, *options, f"optim_wrapper.optimizer.{name}=nan") == 2
    assert f"expected a finite number as the optimizer's {name}, got nan" in capsys.readouterr().err
    assert checkpoints(tmp_path) == []


# ------------------------------------------------------------------------------------- records of another type

ODD = {
    "number": 5,
    "text": "x",
    "list": [1, "a"],
    "nothing": None,
    "tensor": torch.ones(2),
    "sparse": torch.eye(2).to_sparse(),
    "nested": {"classes": {"a": 1}, "disalign": 3, "state": [[]], "runtime_info": 7, "param_groups": {}},
}
PLACES = [
    *("meta", "state_dict", "message_hub", "optimizer", "param_schedulers", "meta.dataset_meta", "meta.disalign"),
    *("meta.epoch", "meta.iter", "meta.seed", "message_hub.runtime_info", "message_hub.log_scalars"),
    *("optimizer.state", "optimizer.param_groups", "meta.dataset_meta.classes", "meta.disalign.class_counts"),
]


@pytest.fixture(scope="module")
def resumable(stage_one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumable")
    assert train(DISALIGN["linear"], folder, f"stage_one={stage_one}", epochs=1) == 0
    return load(folder / "epoch_1.pth")


@pytest.mark.parametrize("command", ["resume", "test", "stage one"])
def test_records_of_another_type_are_one_sentence_or_do_no_harm(command, resumable, stage_one, tmp_path, capsys):
    refusals = 0
    source = load(stage_one) if command == "stage one" else resumable
    combinations = list(itertools.product(PLACES, ODD.items()))
    # A sixth of them for each command: all take a minute.
    for place, (name, value) in combinations[["resume", "test", "stage one"].index(command) :: 6]:
        checkpoint = copy.deepcopy(source)
        *above, last = place.split(".")
        entry = checkpoint
        for key in above:
            entry = entry[key]
        entry[last] = value
        path = tmp_path / "run" / "epoch_1.pth"
        path.parent.mkdir()
        torch.save(checkpoint, path)
        if command == "resume":
            status = train(DISALIGN["linear"], path.parent, epochs=1, flags=["--resume"])
        elif command == "test":
            status = evaluate(DISALIGN["linear"], path, tmp_path / "out")
        else:
            status = train(DISALIGN["linear"], tmp_path / "out", f"stage_one={path}", epochs=1)
        error = capsys.readouterr().err
        assert status in (0, 2), (place, name)
        if status:
            refusals += 1
            lines = [line for line in error.splitlines() if line.startswith("error: expected ")]
            assert len(lines) == 1, (place, name, error)
            assert "Traceback" not in error, (place, name)
        shutil.rmtree(path.parent)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refusals > 10
