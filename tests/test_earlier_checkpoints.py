"""A checkpoint of 0.1.0, as stored in ``written_by_0.1.0``, loads bit for bit in every host and gives its scores.

Each file holds what its host saved, and an ``"example"``: inputs, and the scores that the model gave for them then.
"""

from pathlib import Path

import pytest
import torch
from core.models import SmallCNN

import disalign
from disalign.hand_over import state_dict_of
from disalign.stage_two import calibrations

ROOT = Path(__file__).parent.parent
WRITTEN = Path(__file__).parent / "written_by_0.1.0"


def read(name):
    """The path of a file, its tensors, and its example's inputs and scores, each by torch alone."""
    content = torch.load(WRITTEN / name, weights_only=True)
    return str(WRITTEN / name), content, *content["example"].values()


def assert_loaded(model, content, kept):
    """All tensors of the file are the model's to the bit, and none is left over; so are the counts and rho."""
    tensors, state = state_dict_of(content), model.state_dict()
    assert tensors.keys() == state.keys()
    assert [name for name in tensors if tensors[name].dtype != state[name].dtype] == []
    assert [name for name in tensors if not torch.equal(tensors[name], state[name])] == []
    (*_, calibration) = calibrations(model).values()
    assert (calibration.magnitude != 1).any()  # the file is of a run that has learnt
    assert (calibration.margin != 0).any()
    losses = [module for module in model.modules() if isinstance(module, disalign.GRWCrossEntropyLoss)]
    assert losses
    for loss in losses:
        assert {key: loss.metadata()[key] for key in ("class_counts", "rho")} == kept


def kept(metadata):
    return {key: metadata[key] for key in ("class_counts", "rho")}


def assert_scores(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_core(kind):
    path, content, inputs, scores = read(f"core_{kind}.pth")
    found = disalign.load_file(path)
    before = kept(found["disalign"])
    model, loss = disalign.wrap_classifier(SmallCNN(kind), before["class_counts"], rho=before["rho"])
    model.load_state_dict(found["state_dict"])
    model.loss = loss
    assert_loaded(model, content, kept(content["disalign"]))
    with torch.no_grad():
        assert_scores(model.eval()(inputs), scores)


def test_classification():
    pytest.importorskip("mmengine")
    from mmengine.config import Config

    from disalign_cls.cli import load_model

    path, content, inputs, scores = read("cls.pth")
    config = Config.fromfile(ROOT / "configs/cls/digits/disalign_cnn_1xb64-60e_digits-lt.py")
    model, checkpoint = load_model(config, path)
    model.set_class_counts(disalign.load_class_counts(checkpoint["meta"]["disalign"]["class_counts"]))
    assert_loaded(model, content, kept(content["meta"]["disalign"]))
    with torch.no_grad():
        assert_scores(model(inputs), scores)


@pytest.mark.parametrize("cascade", [False, True])
def test_detection(cascade):
    pytest.importorskip("detectron2")
    from d2.models import tiny_cfg

    from disalign_d2 import DisAlignCheckpointer, build_model

    path, content, inputs, scores = read("d2_cascade.pth" if cascade else "d2.pth")
    model = build_model(tiny_cfg(calibrate=True, cascade=cascade))
    DisAlignCheckpointer(model).resume_or_load(path, resume=False)
    for predictor in model.roi_heads.box_predictors():
        predictor.class_counts = content["disalign"]["class_counts"]
        predictor.resolve_class_counts()
    assert_loaded(model, content, kept(content["disalign"]))
    assert len(calibrations(model)) == (3 if cascade else 1)
    with torch.no_grad():
        assert_scores(model.roi_heads.box_predictors()[-1].eval()(inputs)[0], scores)


def test_segmentation(tmp_path):
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.registry import RUNNERS, DefaultScope
    from seg.runs import quick, write_configs

    path, content, inputs, scores = read("mmseg.pth")
    config = Config.fromfile(write_configs(tmp_path, tmp_path / "no_data").two)
    smaller = {"backbone.base_channels": 4, "backbone.stem_channels": 4, "decode_head.in_channels": 32}
    options = {f"model.{key}": value for key, value in smaller.items()} | {"model.decode_head.channels": 8}
    options |= dict(option.split("=") for option in quick())
    config.merge_from_dict(options | {"work_dir": str(tmp_path / "run")})
    with DefaultScope.overwrite_default_scope("mmseg"):
        runner = RUNNERS.build(config)
        runner.load_checkpoint(path)
        model = runner.model.eval()
        assert_loaded(model, content, kept(content["meta"]["disalign"]))
        with torch.no_grad():
            assert_scores(model(inputs, mode="tensor")[..., :2, :2], scores)
