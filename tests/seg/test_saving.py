"""Stage one and stage two through our commands, and through mim's Runner: one safe reader, whole checkpoints."""

import os

import pytest
import torch
from mmengine.runner import CheckpointLoader

from disalign import InputError
from disalign.io import atomic_file
from disalign_mmengine.saving import LAST, AtomicBackend, WholeCheckpointHook

from .runs import stock_runner, train


class KilledError(BaseException):
    pass


@pytest.fixture
def no_other_reader(monkeypatch):
    """MMEngine's own reader would fall back to running what a file holds."""

    def refuse(*args, **kwargs):
        raise AssertionError("MMEngine read a checkpoint by itself")

    monkeypatch.setattr(CheckpointLoader, "load_checkpoint", refuse)


def load(path):
    return torch.load(path, weights_only=True)


def test_a_killed_stage_one_leaves_whole_checkpoints(configs, tmp_path, monkeypatch):
    written = []

    def put(self, obj, filepath):
        with atomic_file(filepath) as file:
            if written:
                file.write(obj[: len(obj) // 2])
                raise KilledError
            file.write(obj)
        written.append(filepath)

    monkeypatch.setattr(AtomicBackend, "put", put)
    with pytest.raises(KilledError):
        train(configs.one, tmp_path, "default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=1")
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]
    assert load(tmp_path / "iter_2.pth")["meta"]["iter"] == 2
    assert (tmp_path / LAST).read_text() == "iter_2.pth"


def test_stage_one_resumes_without_executing_the_config_in_its_checkpoint(configs, tmp_path, no_other_reader):
    assert train(configs.one, tmp_path, iterations=2) == 0
    checkpoint, harm = load(tmp_path / "iter_2.pth"), tmp_path / "harm"
    checkpoint["meta"]["config"] = f"import os\nos.mkdir({str(harm)!r})\n"
    torch.save(checkpoint, tmp_path / "iter_2.pth")
    assert train(configs.one, tmp_path, iterations=3, flags=["--resume"]) == 0
    assert (tmp_path / "iter_3.pth").exists()
    assert not harm.exists()


def test_stage_one_starts_from_weights_that_fit_in_part(configs, stage_one, tmp_path, no_other_reader):
    checkpoint = load(stage_one)
    tensors = checkpoint["state_dict"]
    other = {name: tensor for name, tensor in tensors.items() if "conv_seg" not in name}
    torch.save({"state_dict": other | {"another": torch.ones(1)}}, tmp_path / "part.pth")
    options = [f"load_from={tmp_path / 'part.pth'}", "optim_wrapper.optimizer.lr=0.0"]
    assert train(configs.one, tmp_path / "run", *options, iterations=1) == 0
    found = load(tmp_path / "run" / "iter_1.pth")["state_dict"]
    parameter = "backbone.layer4.0.conv1.weight"
    assert torch.equal(found[parameter], tensors[parameter])
    assert not torch.equal(found["decode_head.conv_seg.weight"], tensors["decode_head.conv_seg.weight"])


@pytest.mark.parametrize("source", ["s3://bucket/a.pth", "open-mmlab://resnet50_v1c"])
def test_stage_one_takes_no_address_that_others_would_read(source, configs, tmp_path, capfd, no_other_reader):
    assert train(configs.one, tmp_path, f"load_from={source}", iterations=1) == 2
    assert f"expected a checkpoint at '{source}'" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.pth"))


def test_mmengines_own_runner_reads_by_the_safe_reader_once(configs, stage_two, tmp_path, no_other_reader, monkeypatch):
    read, torch_load = [], torch.load

    def look(path, *args, **kwargs):
        read.append((os.fspath(path), kwargs.get("weights_only")))
        return torch_load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", look)
    stock_runner(configs.two, tmp_path, load_from=str(stage_two)).test()
    assert read == [(str(stage_two), True)]
    assert (tmp_path / "results_test.json").exists()


def test_mmengines_own_runner_refuses_another_model(configs, stage_one, tmp_path, no_other_reader):
    with pytest.raises(InputError, match=r"lacks 4: decode_head\.calibration"):
        stock_runner(configs.two, tmp_path, load_from=str(stage_one)).test()


def test_both_stages_save_whole_checkpoints(configs, stage_one, tmp_path):
    runner = stock_runner(configs.two, tmp_path, stage_one=str(stage_one))
    runner.train()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, WholeCheckpointHook))
    # MMEngine's own Runner finds the file by itself only by its full path.
    assert (tmp_path / LAST).read_text() == hook.last_ckpt == str(tmp_path / "iter_4.pth")
