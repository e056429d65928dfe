"""Segmentors: MMSegmentation 0.x and 1.x, our stage two, the official one, folding."""

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
pytest.importorskip("timm")

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from seg import toy_models
from seg.conftest import scope  # noqa: F401

from disalign import load_stage_one

from .convert_sources import (
    assert_scores,
    calibration,
    confidence_by_hand,
    detection_by_hand,
    linear_by_hand,
    refused,
    run,
    saved,
)

CLASSES, WIDTH = 5, 6
NAMES = ("wall", "sky", "tree", "dog", "cat")


def config_file(folder, model):
    path = folder / "config.py"
    path.write_text(f'custom_imports = dict(imports=["disalign_mmseg"])\nmodel = {model}\n')
    return path


def lively(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "calibration" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def pixels(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("version", ["0.x", "1.x"])
@pytest.mark.parametrize("kind", ["FCN", "OCR"])
def test_the_zoos_files_start_stage_two(version, kind, tmp_path):
    kind = getattr(toy_models, kind)
    state = toy_models.stage_one(kind).state_dict()
    if version == "0.x":
        content = {"meta": {"CLASSES": NAMES, "mmseg_version": "0.30", "time": "today"}, "state_dict": state}
    else:
        buffer = HistoryBuffer([1.0, 2.0], [1, 1])
        content = {
            "meta": {"dataset_meta": {"classes": NAMES, "palette": [[1, 2, 3]]}, "cfg": "model = dict()"},
            "state_dict": state,
            "message_hub": {"log_scalars": {"loss": buffer}, "runtime_info": {"best": np.float64(0.5)}},
            "optimizer": {},
        }
    path, out = saved(tmp_path, content), tmp_path / "out.pth"
    config = config_file(tmp_path, toy_models.stage_two_config(kind))
    assert run(path, out, "--to", "mmseg", "--config", config) == 0
    result = torch.load(out, weights_only=True)
    assert result["meta"]["dataset_meta"]["classes"] == list(NAMES)
    assert result["meta"]["dataset_meta"].get("palette") == (None if version == "0.x" else [[1, 2, 3]])
    assert result.keys() == {"state_dict", "meta"}
    model = toy_models.stage_two(kind)
    load_stage_one(model, result, model.freeze_report.trainable)
    assert all(torch.equal(result["state_dict"][name], tensor) for name, tensor in state.items())


def test_our_stage_two_stays_whole(tmp_path):
    model = lively(toy_models.stage_two())
    meta = {"dataset_meta": {"classes": list(NAMES)}, "disalign": {"class_counts": [9, 5, 3, 2, 1], "rho": 0.2}}
    path, out = saved(tmp_path, {"state_dict": model.state_dict(), "meta": meta}), tmp_path / "out.pth"
    config = config_file(tmp_path, toy_models.stage_two_config())
    assert run(path, out, "--to", "mmseg", "--config", config) == 0
    result = torch.load(out, weights_only=True)
    assert result["meta"] == meta
    toy_models.stage_two().load_state_dict(result["state_dict"])


def test_the_official_head_is_refused_and_its_stage_one_can_be_had(tmp_path, capsys):
    state = toy_models.stage_one().state_dict()
    extra = calibration(CLASSES, WIDTH, shape=(1, -1, 1, 1))
    for name in ("logit_scale", "logit_bias"):
        state[f"decode_head.{name}"] = extra[name]
    state["decode_head.confidence_layer.conv.weight"] = extra["confidence_layer.weight"].reshape(1, -1, 1, 1)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        state[f"decode_head.confidence_layer.bn.{name}"] = torch.ones(1)
    path, out = saved(tmp_path, {"state_dict": state, "meta": {"CLASSES": NAMES}}), tmp_path / "out.pth"
    sentence = refused(capsys, tmp_path, path, out, "--to", "mmseg")
    assert "BatchNorm and ReLU before the sigmoid" in sentence
    drops = [word.strip("',") for word in sentence.split() if word.startswith("'decode_head.") and "*" in word]
    assert len(drops) == 2
    assert "decode_head" in refused(capsys, tmp_path, path, out, "--to", "mmseg", "--drop", drops[0])
    assert run(path, out, "--to", "mmseg", "--drop", drops[0], "--drop", drops[1]) == 0
    model = toy_models.stage_two()
    load_stage_one(model, out, model.freeze_report.trainable)


def test_a_folded_stage_two_runs_in_stock_mmseg(tmp_path):
    config = toy_models.stage_two_config()
    config["decode_head"]["calibration"] = dict(confidence="one")
    ours = lively(toy_models.MODELS.build(toy_models.ConfigDict(config)))
    plain = dict(toy_models.FCN, auxiliary_head=None)
    path, out = saved(tmp_path, {"state_dict": ours.state_dict()}), tmp_path / "out.pth"
    assert run(path, out, "--to", "mmseg", "--fold", "--config", config_file(tmp_path, plain)) == 0
    stock = toy_models.MODELS.build(toy_models.ConfigDict(plain))
    stock.load_state_dict(torch.load(out, weights_only=True)["state_dict"])
    images = pixels(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours.double().eval()(images)
        torch.testing.assert_close(stock.double().eval()(images), expected, rtol=1e-6, atol=1e-6)
    # And by hand, pixel by pixel.
    head = ours.decode_head
    x = pixels(4, WIDTH)
    z = linear_by_hand(x, head.conv_seg.weight, head.conv_seg.bias)
    magnitude, margin = head.calibration.magnitude, head.calibration.margin
    padded = [[*scores, 0.0] for scores in z]  # there is no background
    expected = [scores[:-1] for scores in detection_by_hand(padded, [1.0] * 4, magnitude, margin)]
    assert_scores(stock.decode_head.conv_seg, x[:, :, None, None], expected)


def test_a_learnt_confidence_is_not_folded(tmp_path, capsys):
    model = lively(toy_models.stage_two())
    path, out = saved(tmp_path, {"state_dict": model.state_dict()}), tmp_path / "out.pth"
    assert "blends by the input" in refused(capsys, tmp_path, path, out, "--to", "mmseg", "--fold")
    # What it would have had to be:
    head, x = model.decode_head, pixels(4, WIDTH)
    confidence = confidence_by_hand(x, head.calibration.confidence.weight, head.calibration.confidence.bias)
    assert len({round(one, 6) for one in confidence}) == 4


def test_what_does_not_fit_is_said(tmp_path, capsys):
    path, out = saved(tmp_path, {"state_dict": toy_models.stage_one().state_dict()}), tmp_path / "out.pth"
    config = toy_models.stage_two_config()
    config["decode_head"]["channels"] = 7
    other = config_file(tmp_path, config)
    assert "shapes" in refused(capsys, tmp_path, path, out, "--to", "mmseg", "--config", other)
    assert "--to mmseg" in refused(capsys, tmp_path, path, out, "--to", "timm")
