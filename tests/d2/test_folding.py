"""A folded detector runs in Detectron2's own heads and finds what the calibrated one finds."""

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, StandardROIHeads

from disalign_tools import convert

from .models import batch, detections, identical, random_calibration, stages, tiny_cfg

CONFIDENCE = "MODEL.DISALIGN.CONFIDENCE"


def stock_model(path, cascade):
    """Detectron2's own model with a checkpoint, every tensor of it and no other."""
    name = "CascadeROIHeads" if cascade else "StandardROIHeads"
    model = build_model(tiny_cfg("MODEL.ROI_HEADS.NAME", name, cascade=cascade)).eval()
    incompatible = DetectionCheckpointer(model).load(str(path))
    assert not incompatible.get("missing_keys")
    assert not incompatible.get("unexpected_keys")
    assert type(model.roi_heads) is (CascadeROIHeads if cascade else StandardROIHeads)
    predictors = model.roi_heads.box_predictor if cascade else [model.roi_heads.box_predictor]
    assert all(type(predictor) is FastRCNNOutputLayers for predictor in predictors)
    return model, predictors


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize("cascade", [False, True])
def test_the_stock_heads_find_the_same(cascade, suffix, tmp_path):
    one, two = stages(CONFIDENCE, "one", cascade=cascade)
    random_calibration(two)
    torch.save({"model": two.state_dict()}, tmp_path / "two.pth")
    folded = tmp_path / f"folded.{suffix}"
    assert convert.main([str(tmp_path / "two.pth"), str(folded), "--to", "d2", "--fold"]) == 0
    stock, predictors = stock_model(folded, cascade)

    inputs = batch()
    expected, found = detections(two, inputs), detections(stock, inputs)
    assert sum(len(image["scores"]) for image in expected) > 5
    for theirs, ours in zip(found, expected, strict=True):
        assert torch.equal(theirs["pred_classes"], ours["pred_classes"])
        for field in ("scores", "pred_boxes"):
            assert torch.allclose(theirs[field], ours[field], rtol=1e-5, atol=1e-4)
        assert torch.equal(theirs["pred_masks"], ours["pred_masks"])
    assert not identical(detections(one, inputs), expected)
    for theirs, ours in zip(predictors, two.roi_heads.box_predictors(), strict=True):
        assert torch.equal(theirs.cls_score.weight[-1], ours.cls_score.weight[-1])  # the background's
        assert torch.equal(theirs.cls_score.bias[-1], ours.cls_score.bias[-1])


def test_a_learnt_confidence_is_refused(tmp_path, capsys):
    torch.save({"model": stages()[1].state_dict()}, tmp_path / "two.pth")
    assert convert.main([str(tmp_path / "two.pth"), str(tmp_path / "folded.pth"), "--to", "d2", "--fold"]) == 2
    assert "confidence" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["two.pth"]
