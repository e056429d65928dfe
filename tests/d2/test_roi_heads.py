import copy
from contextlib import contextmanager
from unittest import mock

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model as build_stock_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Keypoints
from torch.nn.modules.module import register_module_forward_pre_hook

from disalign_d2 import DisAlignOutputLayers, build_model

from .models import COUNTS, batch, detections, identical, lively, random_calibration, stages, tiny_cfg

pytestmark = pytest.mark.usefixtures("storage")

KINDS = [
    pytest.param(
        dict(cascade=cascade, classifier=classifier), id=f"{'cascade' if cascade else 'standard'}-{classifier}"
    )
    for cascade in (False, True)
    for classifier in ("linear", "cosine")
]
#: Training sees other proposals than testing.
SPARSE_TEST = ("MODEL.RPN.POST_NMS_TOPK_TEST", 5)
KEYPOINT_HEAD = "MODEL.ROI_KEYPOINT_HEAD"
KEYPOINTS = ("MODEL.KEYPOINT_ON", True, f"{KEYPOINT_HEAD}.CONV_DIMS", (8,), f"{KEYPOINT_HEAD}.NUM_KEYPOINTS", 3)


def keypoint_batch():
    inputs = batch()
    for one in inputs:
        centers = one["instances"].gt_boxes.get_centers()[:, None].expand(-1, 3, -1)
        one["instances"].gt_keypoints = Keypoints(torch.cat([centers, torch.full((4, 3, 1), 2.0)], dim=2))
    return inputs


@contextmanager
def seeded_sampling(heads):
    """RoI sampling draws the same numbers whatever was drawn before; yields what went in and what came out."""
    sample, seen = heads.label_and_sample_proposals, []

    def seeded(proposals, targets):
        torch.manual_seed(7)
        seen.append([(len(one), one.proposal_boxes.tensor, one.objectness_logits) for one in proposals])
        sampled = sample(proposals, targets)
        seen.append([(len(one), one.proposal_boxes.tensor, one.gt_classes) for one in sampled])
        return sampled

    with mock.patch.object(heads, "label_and_sample_proposals", seeded):
        yield seen


def same_regions(one, two):
    return len(one) == len(two) and all(
        left[0] == right[0] and torch.equal(left[1], right[1]) and torch.equal(left[2], right[2])
        for images in zip(one, two, strict=True)
        for left, right in zip(*images, strict=True)
    )


class EveryLoss(DisAlignOutputLayers):
    """The frozen box regression keeps its loss."""

    def losses(self, predictions, proposals):
        return FastRCNNOutputLayers.losses(self, predictions, proposals) | super().losses(predictions, proposals)


def computing_every_loss(two):
    """The same stage two in training, as the official code runs it: nothing is skipped."""
    full = copy.deepcopy(two)
    full.train()
    full.proposal_generator.__class__ = RPN
    for predictor in full.roi_heads.box_predictors():
        predictor.__class__ = EveryLoss
    for branch in ("mask", "keypoint"):
        if hasattr(full.roi_heads, f"{branch}_head"):
            setattr(full.roi_heads, f"{branch}_on", True)
            getattr(full.roi_heads, f"{branch}_head").training = True
    return full


@contextmanager
def ran():
    """The modules that run within it."""
    modules = set()
    handle = register_module_forward_pre_hook(lambda module, _: modules.add(module))
    yield modules
    handle.remove()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------ start


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_starts_at_stage_ones_detections(kind):
    one, two = stages(**kind)
    for predictor in two.roi_heads.box_predictors():
        for parameter in predictor.cls_score.calibration.confidence.parameters():
            torch.nn.init.normal_(parameter)
    inputs = batch(3)
    before = detections(one, inputs)
    assert sum(len(image["scores"]) for image in before) > 5
    assert len({label for image in before for label in image["pred_classes"].tolist()}) > 1
    assert {"pred_boxes", "scores", "pred_classes", "pred_masks"} == set(before[0])
    assert any(image["pred_masks"].any() for image in before)
    assert identical(before, detections(two, inputs))
    assert not identical(before, detections(random_calibration(two), inputs))


@pytest.mark.parametrize("cascade", [False, True])
def test_the_heads_are_detectron2s_but_for_the_predictors(cascade):
    heads = build_model(tiny_cfg(cascade=cascade)).roi_heads
    assert isinstance(heads, CascadeROIHeads if cascade else StandardROIHeads)
    predictors = heads.box_predictors()
    assert [type(predictor) for predictor in predictors] == [DisAlignOutputLayers] * (3 if cascade else 1)
    weights = [predictor.box2box_transform.weights for predictor in predictors]
    stock = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert [tuple(one) for one in weights] == (stock if cascade else stock[:1])


# -------------------------------------------------------------------------------------------------- stage one


@pytest.mark.parametrize("cascade", [False, True])
def test_without_calibration_it_is_detectron2s_own(cascade):
    results = []
    for name in ("DisAlignCascadeROIHeads", "CascadeROIHeads") if cascade else ("DisAlignROIHeads", "StandardROIHeads"):
        torch.manual_seed(1)
        cfg = tiny_cfg("MODEL.ROI_HEADS.NAME", name, cascade=cascade)
        model = (build_model if name.startswith("DisAlign") else build_stock_model)(cfg)
        torch.manual_seed(2)
        lively(model)
        inputs = batch()
        model.train()
        torch.manual_seed(3)
        losses = model(inputs)
        sum(losses.values()).backward()
        results.append([losses, model.state_dict(), gradients(model), *detections(model.eval(), inputs)])
    ours, stock = results
    assert identical(ours, stock)
    assert list(ours[1]) == list(stock[1])
    stages_of = ["_stage0", "_stage1", "_stage2"] if cascade else [""]
    boxes = {f"{loss}{stage}" for loss in ("loss_cls", "loss_box_reg") for stage in stages_of}
    assert set(ours[0]) == boxes | {"loss_mask", "loss_rpn_cls", "loss_rpn_loc"}


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_adds_its_calibrations_to_the_model_zoos_names(kind):
    cascade, cosine = kind["cascade"], kind["classifier"] == "cosine"
    stock = tiny_cfg("MODEL.ROI_HEADS.NAME", "CascadeROIHeads" if cascade else "StandardROIHeads", cascade=cascade)
    names = set(build_stock_model(stock).state_dict())
    stem = "roi_heads.box_predictor"
    heads = [f"{stem}.{index}" for index in range(3)] if cascade else [stem]
    if cosine:
        names = {name.replace("cls_score.bias", "cls_score.scale") for name in names}
    assert set(build_model(tiny_cfg(**kind)).state_dict()) == names
    parts = ("magnitude", "margin", "confidence.weight", "confidence.bias")
    new = {f"{head}.cls_score.calibration.{part}" for head in heads for part in parts}
    assert {f"{head}.cls_score.weight" for head in heads} <= names
    assert set(build_model(tiny_cfg(**kind, calibrate=True)).state_dict()) == names | new


# ------------------------------------------------------------------------------------------------ lean stage two


@pytest.mark.parametrize("keypoints", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lean_training_is_bit_equal_to_computing_every_loss(kind, keypoints):
    _, two = stages(*SPARSE_TEST, *(KEYPOINTS if keypoints else ()), **kind)
    random_calibration(two)
    inputs = keypoint_batch() if keypoints else batch()
    full, lean = computing_every_loss(two), two.train()
    results = []
    for model in (full, lean):
        with seeded_sampling(model.roi_heads) as seen:
            losses = model(inputs)
        sum(losses.values()).backward()
        results.append((losses, gradients(model), seen))
    (all_losses, all_gradients, all_seen), (losses, lean_gradients, seen) = results

    suffixes = ["_stage0", "_stage1", "_stage2"] if kind["cascade"] else [""]
    assert set(losses) == {f"loss_cls{suffix}" for suffix in suffixes}
    skipped = {f"loss_box_reg{suffix}" for suffix in suffixes} | {"loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(all_losses) - set(losses) == skipped | ({"loss_keypoint"} if keypoints else set())
    assert all(all_losses[name] > 0 for name in ("loss_mask", "loss_rpn_cls", "loss_rpn_loc"))

    assert all(torch.equal(all_losses[name], value) and value.isfinite() for name, value in losses.items())
    assert len(lean_gradients) == 4 * len(suffixes)
    assert identical(all_gradients, lean_gradients)
    assert sum(bool(gradient.any()) for gradient in lean_gradients.values()) >= 4
    assert same_regions(all_seen, seen)


@pytest.mark.parametrize("cascade", [False, True])
def test_stage_two_trains_on_stage_ones_proposals_and_samples(cascade):
    one, two = stages(*SPARSE_TEST, cascade=cascade)
    inputs = batch()
    one = FrozenBatchNorm2d.convert_frozen_batchnorm(one)
    results = []
    for model in (one, two):
        # FrozenBatchNorm rounds otherwise where gradients flow.
        with torch.no_grad(), seeded_sampling(model.train().roi_heads) as seen:
            model(inputs)
        results.append(seen)
    assert same_regions(*results)
    # Not the 5 of testing.
    assert all(length > 5 for length, *_ in results[1][0])
    assert any((classes < len(COUNTS)).any() for *_, classes in results[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_training_skips_what_is_frozen_and_evaluation_does_not(kind):
    one, two = stages(*KEYPOINTS, **kind)
    inputs = keypoint_batch()
    expected = detections(one, inputs)
    assert {"pred_masks", "pred_keypoints"} <= set(expected[0])
    heads = two.roi_heads
    skipped = (heads.mask_head, heads.mask_pooler, heads.keypoint_head, heads.keypoint_pooler)
    unlabelled = mock.patch.object(RPN, "label_and_sample_anchors", side_effect=AssertionError)
    for _ in range(2):
        with unlabelled, ran() as modules:
            two.train()(inputs)
        assert heads.box_predictors()[0] in modules
        assert not modules.intersection(skipped)
        assert (heads.mask_on, heads.keypoint_on) == (False, False)
        assert identical(detections(two.eval(), inputs), expected)
        assert (heads.mask_on, heads.keypoint_on) == (True, True)


@pytest.mark.parametrize("calibrate", [False, True])
def test_heads_that_do_not_exist_are_never_switched_on(calibrate):
    model = build_model(tiny_cfg("MODEL.MASK_ON", False, calibrate=calibrate))
    for mode in (True, False):
        assert model.train(mode).roi_heads.train(mode) is model.roi_heads
        assert (model.roi_heads.mask_on, model.roi_heads.keypoint_on) == (False, False)
    assert "pred_masks" not in detections(model, batch())[0]


# ----------------------------------------------------------------------------------------------- empty images


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_ground_truth_give_finite_losses(kind):
    two = random_calibration(stages(**kind)[1]).train()
    full = batch()
    empty = [{**one, "instances": one["instances"][:0]} for one in full]
    for inputs in (empty, [full[0], empty[1]]):
        two.zero_grad()
        losses = two(inputs)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(gradient.isfinite().all() for gradient in gradients(two).values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_proposals_give_a_loss_of_0(kind):
    two = random_calibration(stages(**kind)[1]).train()
    inputs = [{**one, "instances": one["instances"][:0]} for one in batch()]
    find = two.proposal_generator.predict_proposals
    with mock.patch.object(two.proposal_generator, "predict_proposals", lambda *args: [p[:0] for p in find(*args)]):
        losses = two(inputs)
        sum(losses.values()).backward()
        assert all(loss == 0 for loss in losses.values())
        assert not any(gradient.any() for gradient in gradients(two).values())
        found = detections(two.eval(), inputs)
    assert [len(image["scores"]) for image in found] == [0, 0]


def test_a_stock_predictor_trains_in_our_heads_as_in_detectron2s():
    model = build_stock_model(tiny_cfg())
    predictor = model.roi_heads.box_predictor
    predictor.__class__ = FastRCNNOutputLayers
    del predictor.calibrated
    losses = model.train()(batch())
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= losses.keys()
