"""Detectors of all origins: into disalign_d2's stage two, into Detectron2's own pickle, scores compared by hand."""

import pickle

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("timm")

import numpy as np
import torch
from d2.models import batch, detections, lively, tiny_cfg
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_stock_model
from torch import nn

from disalign import load_file, load_stage_one
from disalign_d2 import DisAlignCheckpointer, build_model

from .convert_sources import (
    assert_scores,
    calibration,
    confidence_by_hand,
    cosine_by_hand,
    detection_by_hand,
    linear_by_hand,
    refused,
    run,
    saved,
    small_resnet,
)

CLASSES, WIDTH = 5, 16


def config_file(folder, *options, **kind):
    path = folder / "config.yaml"
    cfg = tiny_cfg(*options, **kind)
    cfg.VERSION = 2
    path.write_text(cfg.dump())
    return path


def stage_one(**kind):
    return lively(build_model(tiny_cfg(**kind))).state_dict()


def official(classifier="linear", cascade=False):
    """A cvpods detector's stage two: the calibrations lie flat on the predictors, the cosine's scale is a vector."""
    state = stage_one(classifier=classifier, cascade=cascade)
    for base in bases(cascade):
        for name, tensor in calibration(CLASSES, WIDTH, shape=(-1,)).items():
            state[f"{base}.{name}"] = tensor
        if classifier == "cosine":
            state[f"{base}.cls_score.scale"] = state[f"{base}.cls_score.scale"].reshape(1) + 3
    return state


def bases(cascade=False):
    return [f"roi_heads.box_predictor.{stage}" for stage in range(3)] if cascade else ["roi_heads.box_predictor"]


def expected_scores(x, state, base):
    weight = state[f"{base}.cls_score.weight"]
    if f"{base}.cls_score.scale" in state:
        z = cosine_by_hand(x, weight, float(state[f"{base}.cls_score.scale"]))
    else:
        z = linear_by_hand(x, weight, state[f"{base}.cls_score.bias"])
    confidence = confidence_by_hand(x, state[f"{base}.confidence_layer.weight"], state[f"{base}.confidence_layer.bias"])
    return detection_by_hand(z, confidence, state[f"{base}.logit_scale"], state[f"{base}.logit_bias"])


@pytest.mark.parametrize("cascade", [False, True], ids=["mask", "cascade"])
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_the_official_stage_two_loads_whole_and_scores_as_its_formula(classifier, cascade, tmp_path):
    kind = dict(classifier=classifier, cascade=cascade, calibrate=True)
    state = official(classifier, cascade)
    path = saved(tmp_path, {"model": state | {"pixel_mean": torch.zeros(3, 1, 1)}, "iteration": 4499, "optimizer": {}})
    out = tmp_path / "out.pth"
    assert run(path, out, "--to", "d2", "--config", config_file(tmp_path, **kind)) == 0
    model = build_model(tiny_cfg(**kind))
    DisAlignCheckpointer(model).load(str(out))
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    for base in bases(cascade):
        assert_scores(model.get_submodule(f"{base}.cls_score"), x, expected_scores(x, state, base))
    others = [name for name in model.state_dict() if "cls_score" not in name]
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in others)


def test_a_cvpods_cosine_stage_one_needs_its_constant_scale(tmp_path, capsys):
    state = stage_one(classifier="cosine")
    del state["roi_heads.box_predictor.cls_score.scale"]
    path, out = saved(tmp_path, {"model": state}), tmp_path / "out.pth"
    assert "--scale 20" in refused(capsys, tmp_path, path, out, "--to", "d2")
    assert run(path, out, "--to", "d2", "--scale", "20") == 0
    model = build_model(tiny_cfg(classifier="cosine", calibrate=True))
    load_stage_one(model, out)
    assert model.roi_heads.box_predictor.cls_score.scale == 20


def test_the_zoos_pickle_goes_through_and_into_a_pickle_again(tmp_path):
    state = stage_one()
    source, out = tmp_path / "source.pkl", tmp_path / "out.pkl"
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    source.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    assert run(source, out, "--to", "d2", "--config", config_file(tmp_path, calibrate=True)) == 0
    content = pickle.loads(out.read_bytes())
    assert content["__author__"]
    assert all(isinstance(array, np.ndarray) for array in content["model"].values())
    assert load_file(out)["model"].keys() == state.keys()
    load_stage_one(build_model(tiny_cfg(calibrate=True)), load_file(out))


def test_class_counts_and_rho_are_kept(tmp_path):
    kept = {"class_counts": [80, 40, 20, 10, 5], "rho": 0.8}
    state = build_model(tiny_cfg(calibrate=True)).state_dict()
    assert run(saved(tmp_path, {"model": state, "disalign": kept}), tmp_path / "out.pth", "--to", "d2") == 0
    assert torch.load(tmp_path / "out.pth", weights_only=True)["disalign"] == kept


def test_bfloat16_has_no_place_in_a_pickle_of_numpy_arrays(tmp_path, capsys):
    state = {name: tensor.bfloat16() for name, tensor in stage_one().items()}
    path = saved(tmp_path, {"model": state})
    assert "bfloat16" in refused(capsys, tmp_path, path, tmp_path / "out.pkl", "--to", "d2")


# ------------------------------------------------------------------------------------------------------------- folded


def confident(classifier="linear"):
    options = ("MODEL.DISALIGN.CONFIDENCE", "one")
    model = lively(build_model(tiny_cfg(*options, calibrate=True, classifier=classifier))).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.calibration.magnitude.uniform_(0.5, 2)
        model.roi_heads.box_predictor.cls_score.calibration.margin.normal_()
    return model


def test_a_folded_stage_two_runs_in_stock_detectron2(tmp_path):
    ours = confident()
    path, out = saved(tmp_path, {"model": ours.state_dict()}), tmp_path / "out.pth"
    assert run(path, out, "--to", "d2", "--fold", "--config", config_file(tmp_path)) == 0
    cfg = tiny_cfg()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock = build_stock_model(CfgNode(cfg)).eval()
    stock.load_state_dict(torch.load(out, weights_only=True)["model"])
    images = batch()
    for one, two in zip(detections(stock, images), detections(ours, images), strict=True):
        assert len(one["scores"]) > 5
        assert torch.equal(one["pred_classes"], two["pred_classes"])
        torch.testing.assert_close(one["scores"], two["scores"])
        torch.testing.assert_close(one["pred_boxes"], two["pred_boxes"])


def test_a_folded_cosine_stage_two_and_the_line_that_makes_its_place(tmp_path, capsys):
    ours = confident("cosine")
    path, out = saved(tmp_path, {"model": ours.state_dict()}), tmp_path / "out.pth"
    assert run(path, out, "--to", "d2", "--fold") == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("before loading it: ")
    model = build_model(tiny_cfg())
    exec(line, {"model": model, "nn": nn})
    model.load_state_dict(torch.load(out, weights_only=True)["model"])
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    layer = ours.roi_heads.box_predictor.cls_score
    z = cosine_by_hand(x, layer.weight, float(layer.scale))
    expected = detection_by_hand(z, [1.0] * len(x), layer.calibration.magnitude, layer.calibration.margin)
    assert_scores(model.roi_heads.box_predictor.cls_score, x, expected)


# ----------------------------------------------------------------------------------------------- an image classifier


def test_an_image_classifiers_trunk_becomes_the_backbone(tmp_path, capsys):
    # This Detectron2 ResNet is torchvision's ResNet-18 but for the width.
    options = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18]
    options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
    options += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.BACKBONE.FREEZE_AT", 0]
    source = small_resnet(layers=(2, 2, 2, 2), channels=(64, 128, 256, 512))
    path, out = saved(tmp_path, source.state_dict()), tmp_path / "out.pth"
    assert run(path, out, "--to", "d2", "--config", config_file(tmp_path, *options)) == 0
    said = capsys.readouterr().out
    assert "a backbone has no classifier" in said
    assert "INPUT.FORMAT RGB" in said
    assert "MODEL.RESNETS.STRIDE_IN_1X1 True, not False" in said
    assert "INPUT.FORMAT BGR, not RGB" in said
    right = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.RESNETS.STRIDE_IN_1X1", False]
    right += ["MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
    assert run(path, out, "--force", "--to", "d2", "--config", config_file(tmp_path, *options, *right)) == 0
    assert ", not " not in capsys.readouterr().out
    other = [*options, "MODEL.RESNETS.DEPTH", 34]
    sentence = refused(capsys, tmp_path, path, out, "--force", "--to", "d2", "--config", config_file(tmp_path, *other))
    assert "tensors of the config's backbone, but it lacks" in sentence
    model = build_model(tiny_cfg(*options)).eval()
    state = torch.load(out, weights_only=True)["model"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "bottom_up" in name]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        feature = model.backbone.bottom_up(images)["res5"]
        torch.testing.assert_close(feature, source.eval().forward_features(images))


def test_a_trunk_that_is_no_resnet_is_refused(tmp_path, capsys):
    path = saved(tmp_path, {"blocks.0.weight": torch.ones(4, 4), "head.weight": torch.ones(5, 4)})
    assert "as Detectron2's backbone" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "d2")


def test_what_does_not_fit_is_said(tmp_path, capsys):
    path, out = saved(tmp_path, {"model": stage_one()}), tmp_path / "out.pth"
    other = config_file(tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 7, calibrate=True)
    assert "shapes" in refused(capsys, tmp_path, path, out, "--to", "d2", "--config", other)
    other.write_text("{VERSION: 2, MODEL: {NOTHING: 1}}\n")
    assert "can be built" in refused(capsys, tmp_path, path, out, "--to", "d2", "--config", other)
    lazy = tmp_path / "lazy.py"
    lazy.write_text("model = dict()\n")
    assert "a config in YAML" in refused(capsys, tmp_path, path, out, "--to", "d2", "--config", lazy)
    assert "--to d2" in refused(capsys, tmp_path, path, out, "--to", "cls")
