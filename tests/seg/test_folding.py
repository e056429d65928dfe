"""A folded segmentor runs in MMSegmentation's own heads and gives the calibrated scores."""

import copy

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.config import ConfigDict
from mmengine.runner import load_checkpoint
from mmseg.models.decode_heads import FCNHead, OCRHead
from mmseg.registry import MODELS

import disalign_mmseg  # noqa: F401  (importing registers)
from disalign import at_identity
from disalign_tools import convert

from .toy_models import FCN, OCR, stage_one, stage_two_config


def calibrated(config, confidence):
    """A segmentor calibrated at random, over a stage one with scores like a trained one's."""
    made = stage_two_config(config)
    last = made["decode_head"][-1] if isinstance(made["decode_head"], list) else made["decode_head"]
    last["calibration"] = dict(confidence=confidence)
    model = MODELS.build(ConfigDict(made)).eval()
    model.load_state_dict(stage_one(config).state_dict(), strict=False)
    with torch.no_grad():
        for parameter in model.calibrated_head.calibration.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("config", [FCN, OCR], ids=["FCN", "OCR"])
def test_the_stock_head_gives_the_same_scores(config, tmp_path):
    two = calibrated(config, "one")
    torch.save({"state_dict": two.state_dict()}, tmp_path / "two.pth")
    assert convert.main([str(tmp_path / "two.pth"), str(tmp_path / "folded.pth"), "--to", "mmseg", "--fold"]) == 0

    stock = MODELS.build(ConfigDict({**copy.deepcopy(config), "auxiliary_head": None})).eval()
    load_checkpoint(stock, str(tmp_path / "folded.pth"), strict=True)
    head = stock.decode_head[-1] if config is OCR else stock.decode_head
    assert type(head) is (OCRHead if config is OCR else FCNHead)
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected, scores = two(images), stock(images)
        with at_identity(two):
            assert (two(images) - expected).abs().max() > 0.1
    assert (scores - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_learnt_confidence_is_refused(tmp_path, capsys):
    torch.save({"state_dict": calibrated(FCN, "learnt").state_dict()}, tmp_path / "two.pth")
    assert convert.main([str(tmp_path / "two.pth"), str(tmp_path / "folded.pth"), "--to", "mmseg", "--fold"]) == 2
    assert "confidence" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["two.pth"]
