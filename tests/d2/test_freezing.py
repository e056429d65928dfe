import copy
import io
import re

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model as build_stock_model
from torch import nn

from disalign import InputError, assert_frozen
from disalign.stage_two import calibrations, trained_parts
from disalign_d2 import build_model, freeze

from .models import COUNTS, batch, detections, identical, lively, random_calibration, stages, tiny_cfg

K, D = len(COUNTS), 16


class DropPath(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5)) if self.training else x


def noisy(model):
    """Dropout and drop-path in the backbone and the box head, and a BatchNorm that FrozenBatchNorm does not replace."""
    heads = model.roi_heads.box_head
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        head.add_module("bn", nn.BatchNorm1d(D))
        head.add_module("dropout", nn.Dropout(0.5))
    body = model.backbone.bottom_up
    for stage in ("res2", "res3"):
        setattr(body, stage, nn.Sequential(getattr(body, stage), nn.Dropout2d(0.5), DropPath()))
    body.stages = [getattr(body, name) for name in body.stage_names]
    return model


def calibrated(cascade=False):
    """Noisy, frozen, with counts."""
    model = noisy(build_stock_model(tiny_cfg(calibrate=True, cascade=cascade)))
    freeze(lively(model))
    for predictor in model.roi_heads.box_predictors():
        predictor.class_counts = COUNTS
        predictor.resolve_class_counts()
    return model


@pytest.mark.parametrize(("cascade", "heads"), [(False, 1), (True, 3)])
def test_2k_plus_d_plus_1_numbers_train_for_each_box_head(cascade, heads):
    model = build_stock_model(tiny_cfg(calibrate=True, cascade=cascade))
    report = freeze(model)
    assert report.num_trainable == heads * (2 * K + D + 1)
    places = [f"roi_heads.box_predictor.{index}" for index in range(heads)] if cascade else ["roi_heads.box_predictor"]
    shapes = {"magnitude": (K,), "margin": (K,), "confidence.weight": (1, D), "confidence.bias": (1,)}
    expected = {f"{place}.cls_score.calibration.{part}": shape for place in places for part, shape in shapes.items()}
    assert report.trainable == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(expected)
    assert list(calibrations(model)) == [f"{place}.cls_score.calibration" for place in places]


def test_build_model_says_what_trains(caplog):
    with caplog.at_level("INFO"):
        build_model(tiny_cfg())
        assert "numbers train" not in caplog.text
        build_model(tiny_cfg(calibrate=True))
    assert f"{2 * K + D + 1} numbers train" in caplog.text


def test_batchnorm_becomes_frozen_batchnorm():
    def norms(model):
        return {type(module) for module in model.modules() if "BatchNorm" in type(module).__name__}

    assert norms(build_model(tiny_cfg())) == {nn.BatchNorm2d}
    assert norms(build_model(tiny_cfg(calibrate=True))) == {FrozenBatchNorm2d}


@pytest.mark.parametrize("cascade", [False, True])
def test_only_what_chooses_its_path_by_it_follows_train(cascade):
    model = calibrated(cascade)
    following = ["", "proposal_generator", "roi_heads"]
    for _ in range(2):
        training = {name for name, module in model.train().named_modules() if module.training}
        rest = {name for name in training if not name.startswith("roi_heads.box_predictor")}
        assert rest == set(following)
        assert {f"{name}.confidence" for name in calibrations(model)} <= training
        assert not any(module.training for module in model.modules() if isinstance(module, (nn.Dropout, DropPath)))
        assert not any(module.training for module in model.eval().modules())


def test_a_trainer_does_not_switch_it_back():
    # Detectron2's trainers call train() when they are built, and its hooks after each evaluation.
    model = calibrated()
    SimpleTrainer(model, [batch()], torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(module.training for module in model.roi_heads.box_head.modules())


@pytest.mark.usefixtures("storage")
def test_training_draws_no_noise():
    model, inputs = calibrated().train(), batch()
    images = model.preprocess_image(inputs).tensor
    assert identical(model.backbone(images), model.backbone(images))
    pooled = torch.randn(3, 8, 4, 4)
    assert torch.equal(model.roi_heads.box_head(pooled), model.roi_heads.box_head(pooled))


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("cascade", [False, True])
def test_training_changes_the_calibrations_and_not_one_bit_of_the_rest(cascade):
    model = random_calibration(calibrated(cascade))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    with assert_frozen(model, trained_parts(model)):
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            sum(model(batch()).values()).backward()
            optimizer.step()
            detections(model.eval(), batch())
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_is_as_frozen_and_leaves_the_original_alone(copied):
    model = stages()[1].eval()
    twin = copied(model)
    twin.train()
    assert twin.roi_heads.training
    assert not any(module.training for module in twin.backbone.modules())
    assert not any(module.training for module in model.modules())
    inputs = batch()
    losses = twin(inputs)
    assert list(losses) == ["loss_cls"]
    losses["loss_cls"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert identical(detections(twin.eval(), inputs), detections(model, inputs))


def test_a_config_pickles_with_its_model():
    # Processes that are spawned get their model so.
    through_pickle(build_model(tiny_cfg(calibrate=True)))


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["DisAlignROIHeads", "StandardROIHeads"])
def test_a_model_without_calibration_cannot_be_frozen(name):
    model = build_stock_model(tiny_cfg("MODEL.ROI_HEADS.NAME", name))
    sentence = r"expected a model with a calibrated .* MODEL\.DISALIGN\.CALIBRATE True and MODEL\.ROI_HEADS\.NAME"
    with pytest.raises(InputError, match=sentence):
        freeze(model)
    # It is as it was.
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("kind", [dict(calibrate=True), dict(classifier="cosine")])
@pytest.mark.parametrize("cascade", [False, True])
def test_heads_that_know_neither_calibration_nor_cosine_are_refused(kind, cascade):
    name = "CascadeROIHeads" if cascade else "StandardROIHeads"
    cfg = tiny_cfg("MODEL.ROI_HEADS.NAME", name, cascade=cascade, **kind)
    sentence = f"expected MODEL.ROI_HEADS.NAME DisAlignROIHeads or DisAlignCascadeROIHeads .* got {name}; "
    with pytest.raises(InputError, match=re.sub(r"\.(?!\*)", r"\\.", sentence)):
        build_model(cfg)
    build_model(tiny_cfg("MODEL.ROI_HEADS.NAME", name, cascade=cascade))
