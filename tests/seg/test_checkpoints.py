"""Stage ones of other origins: MMEngine's own checkpoints with their log buffers, MMSegmentation 0.x's, DDP's."""

import pickle

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch

from disalign_mmengine.checkpoints import class_names, load_checkpoint

from .runs import CALIBRATION, load, stock_runner, train

NO_VALIDATION = ["val_cfg=None", "val_dataloader=None", "val_evaluator=None"]


def tensors(checkpoint):
    return {name: tensor for name, tensor in checkpoint["state_dict"].items() if "auxiliary_head" not in name}


@pytest.fixture
def stock_checkpoint(configs, tmp_path):
    """MMEngine's own, with its log buffers."""
    stock_runner(configs.one, tmp_path, **{"train_cfg.max_iters": 2}).train()
    return tmp_path / "iter_2.pth"


def test_stock_checkpoints_are_read_without_their_log_buffers(stock_checkpoint):
    stage_one = stock_checkpoint
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        load(stage_one)
    whole, read = torch.load(stage_one, weights_only=False), load_checkpoint(stage_one)
    assert whole["message_hub"]["log_scalars"]["train/loss"].data[0].any()
    assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in read["state_dict"].items())
    assert read["state_dict"].keys() == whole["state_dict"].keys()
    assert class_names(read) == list(whole["meta"]["dataset_meta"]["classes"])
    # What made them readable is gone again.
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        load(stage_one)


class Call:
    """Pickled as a call of ``getattr``, which a log buffer's pickle holds too."""

    def __reduce__(self):
        return getattr, ("abc", "upper")


def test_the_getattr_in_a_log_buffer_is_not_pythons(tmp_path):
    torch.save({"value": Call()}, tmp_path / "call.pth")
    assert torch.load(tmp_path / "call.pth", weights_only=False)["value"]() == "ABC"
    found = load_checkpoint(tmp_path / "call.pth")["value"]
    assert not callable(found)
    assert not vars(found)


@pytest.mark.parametrize("classes", ["CLASSES", "no meta"])
def test_mmsegmentation_0x_and_ddp_name_it_otherwise(classes, configs, stage_one, tmp_path):
    one = load_checkpoint(stage_one)
    meta = {} if classes == "no meta" else {"meta": {"CLASSES": class_names(one), "PALETTE": [[0, 0, 0]] * 150}}
    renamed = {f"module.{name}": tensor for name, tensor in one["state_dict"].items()}
    torch.save({"state_dict": renamed} | meta, tmp_path / "zero.pth")
    assert class_names(load_checkpoint(tmp_path / "zero.pth")) == (class_names(one) if meta else None)

    work = tmp_path / "work"
    assert train(configs.two, work, f"stage_one={tmp_path / 'zero.pth'}", *NO_VALIDATION, iterations=2) == 0
    two = load(work / "iter_2.pth")["state_dict"]
    assert two.keys() - CALIBRATION == tensors(one).keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in tensors(one).items())
