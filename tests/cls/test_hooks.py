"""What the hooks refuse, say and repair; whole runs are in test_train.py."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from disalign import InputError
from disalign_cls import hooks, train
from disalign_cls.cli import without_pretrained
from disalign_cls.datasets import DigitsLT
from disalign_mmengine.cli import load_config

from .runs import BASELINE, DISALIGN, PLAIN, left_behind, log, runner
from .runs import train as train_run


def changed(checkpoint, folder, **meta):
    content = torch.load(checkpoint, weights_only=True)
    for key, value in meta.items():
        content["meta"][key] |= value
    torch.save(content, folder / "changed.pth")
    return folder / "changed.pth"


def test_a_stage_one_of_other_classes_is_refused(stage_one, tmp_path):
    names = [str(digit) for digit in reversed(range(10))]
    other = changed(stage_one, tmp_path, dataset_meta={"classes": names})
    run = runner(DISALIGN["linear"], tmp_path, stage_one=str(other))
    with pytest.raises(InputError, match=r"in '.*changed.pth', .*class 0 is '9', not '0'.* and 7 more"):
        run.train()


def test_a_stage_one_of_another_training_set_is_said(stage_one, tmp_path):
    other = changed(stage_one, tmp_path, disalign={"class_counts": [3] * 10})
    assert train_run(DISALIGN["linear"], tmp_path, f"stage_one={other}") == 0
    assert "stage one was trained on another training set (30 images, here 242); make sure that none" in log(tmp_path)


def counts_file(folder, counts):
    (folder / "counts.json").write_text(json.dumps({"train_counts": counts}))
    return str(folder / "counts.json")


def test_a_file_of_the_training_sets_counts_is_taken_by_the_loss_and_the_metric(stage_one, tmp_path):
    counts = DigitsLT("train").class_counts.tolist()
    path = counts_file(tmp_path, counts)
    options = (f"model.loss.class_counts={path}", f"val_evaluator.class_counts={path}")
    assert train_run(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", *options, epochs=1) == 0
    content = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    assert content["meta"]["disalign"]["class_counts"] == counts


def test_other_counts_than_the_training_sets_are_refused_by_the_loss(stage_one, tmp_path, capsys):
    path = counts_file(tmp_path, [3] * 10)
    options = (f"stage_one={stage_one}", f"model.loss.class_counts={path}")
    assert train_run(DISALIGN["linear"], tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert error.strip() == (
        "error: expected the counts of the training set (242 images of 10 classes) as model.loss.class_counts, got "
        "others (30 of 10); leave it out to use the training set's"
    )
    assert left_behind(tmp_path / "run") == []


def test_other_counts_than_the_training_sets_are_the_metrics_own(stage_one, tmp_path):
    path = counts_file(tmp_path, [300, 50, 3, 3, 3, 3, 3, 3, 3, 3])
    run = runner(
        DISALIGN["linear"], tmp_path, epochs=1, stage_one=str(stage_one), **{"val_evaluator.class_counts": path}
    )
    run.train()
    (metric,) = run.val_evaluator.metrics
    assert metric.report["class_counts"] == [300, 50, 3, 3, 3, 3, 3, 3, 3, 3]


def test_load_from_is_another_name_for_stage_one(stage_one, tmp_path):
    given = ("stage_one=None", f"load_from={stage_one}")
    assert train_run(DISALIGN["linear"], tmp_path / "load_from", *given) == 0
    assert train_run(DISALIGN["linear"], tmp_path / "both", f"stage_one={stage_one}", f"load_from={stage_one}") == 0
    assert train_run(DISALIGN["linear"], tmp_path / "stage_one", f"stage_one={stage_one}") == 0
    ends = [torch.load(path, weights_only=True)["state_dict"] for path in sorted(tmp_path.glob("*/epoch_2.pth"))]
    assert len(ends) == 3
    for end in ends[1:]:
        assert all(torch.equal(end[name], tensor) for name, tensor in ends[0].items())


def test_a_stage_one_and_another_load_from_are_refused(stage_one, stage_two, tmp_path, capsys):
    given = (f"stage_one={stage_one}", f"load_from={stage_two}")
    assert train_run(DISALIGN["linear"], tmp_path, *given) == 2
    assert "expected one stage-one checkpoint, got stage_one=" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def evaluate_with_own_statistics(rank, store, answers):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank + 1)
    model.num_batches_tracked.fill_(10 * rank)
    hooks.BroadcastBuffersHook().before_val_epoch(SimpleNamespace(model=model))
    answers[rank] = [*model.running_mean.tolist(), model.num_batches_tracked.item()]
    dist.destroy_process_group()


def test_every_rank_evaluates_with_rank_0s_statistics(tmp_path):
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.spawn(evaluate_with_own_statistics, (tmp_path / "store", answers), nprocs=2)
        assert dict(answers) == {0: [1, 1, 1, 0], 1: [1, 1, 1, 0]}


def test_results_are_collected_below_the_work_folder(stage_one, tmp_path):
    run = runner(BASELINE["linear"], tmp_path, load_from=str(stage_one))
    run.val()
    (metric,) = run.val_evaluator.metrics
    assert metric.collect_dir == os.path.join(tmp_path, ".collect")


@pytest.mark.parametrize("option", ["train_cfg", "randomness.seed=[(1,2]"])
def test_an_option_that_is_no_key_and_value_exits_with_status_2(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([BASELINE["linear"], "--cfg-options", option])
    assert stopped.value.code == 2
    assert "--cfg-options: expected KEY=VALUE, got " in capsys.readouterr().err


def test_a_work_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert train.main([BASELINE["linear"], "--work-dir", str(tmp_path / "taken"), "--cfg-options", PLAIN]) == 2
    assert "error: expected a place to write" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_slurm_without_a_gpu_is_refused(tmp_path, capsys):
    assert train.main([BASELINE["linear"], "--work-dir", str(tmp_path), "--launcher", "slurm"]) == 2
    assert "error: expected a GPU for --launcher slurm, got none; on CPUs use torchrun" in capsys.readouterr().err


def test_pretrained_weights_are_not_fetched_when_a_checkpoint_follows():
    config = load_config("cls/places_lt/baseline_resnet152_8xb32-30e_places-lt-224.py", {})
    assert config.model.backbone.pretrained
    without_pretrained(config)
    assert not config.model.backbone.pretrained


@pytest.mark.parametrize("dataset", ["imagenet_lt", "inaturalist2018", "places_lt"])
def test_the_learning_rate_of_the_large_configs_follows_the_batch(dataset):
    from disalign.cli import shipped_configs

    for path in sorted((shipped_configs() / "cls" / dataset).glob("*.py")):
        config = load_config(str(path), {})
        assert config.auto_scale_lr == {"enable": True, "base_batch_size": 256}
        assert config.train_dataloader.batch_size * 8 == 256
