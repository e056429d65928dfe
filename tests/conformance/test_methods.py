"""A method gives the same scores through each host, on the same features."""

import numpy as np
import pytest
import torch
from torch import nn

from disalign import AdaptiveCalibration, Features, comparison
from disalign.comparison import METHODS, Problem
from disalign.modules import with_calibration

COUNTS, WIDTH = [80, 40, 20, 10, 5], 6
NAMES = comparison.chosen_methods(["all"], "classification", cosine=False)
CALIBRATIONS = [name for name in NAMES if name not in ("crt", "ncm", "ncm_l2", "disalign_cross_fit")]


def features():
    y = np.repeat(range(5), COUNTS)
    x = np.random.default_rng(9).normal(size=(5, WIDTH))[y] + np.random.default_rng(0).normal(size=(len(y), WIDTH))
    return Features.from_arrays(x.astype(np.float32), y)


def classifier(outputs=5):
    """The first rows of a layer for five classes and a background."""
    torch.manual_seed(0)
    layer, found = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, outputs)
    found.load_state_dict({name: tensor[:outputs] for name, tensor in layer.state_dict().items()})
    return found


def options_of(calibration):
    return {"confidence": "one" if calibration.confidence is None else "learnt"}


def copied(calibration, target):
    """``target`` with the other's numbers, as a checkpoint would bring them."""
    with torch.no_grad():
        for name in ("magnitude", "margin"):
            getattr(target, name).copy_(getattr(calibration, name))
        if calibration.confidence is not None:
            for own, given in zip(target.confidence.parameters(), calibration.confidence.parameters(), strict=True):
                own.copy_(given.view_as(own))


def of_classification(calibration, x):
    pytest.importorskip("mmengine")
    from disalign_cls.classifiers import DisAlignClassifier

    model = DisAlignClassifier(dict(name="small_cnn", in_chans=1), 5, calibration=options_of(calibration))
    model.classifier = with_calibration(classifier(), AdaptiveCalibration(5, WIDTH, **options_of(calibration)))
    copied(calibration, model.classifier.calibration)
    return model.classifier(x)


def of_detection(calibration, x):
    pytest.importorskip("detectron2")
    from .detection import predictor

    build = predictor("linear").stage_one
    layers = build(calibrate=True, class_counts=COUNTS, **options_of(calibration))
    layers.cls_score.load_state_dict(classifier(6).state_dict(), strict=False)
    copied(calibration, layers.cls_score.calibration)
    scores, _ = layers(x)
    assert torch.equal(scores[:, 5], classifier(6)(x)[:, 5])
    return scores[:, :5]


def of_segmentation(calibration, x):
    pytest.importorskip("mmseg")
    from mmengine.registry import DefaultScope

    from disalign_mmseg.decode_heads import HEADS

    with DefaultScope.overwrite_default_scope("mmseg"):
        head = HEADS["DisAlignFCNHead"](
            in_channels=WIDTH,
            channels=WIDTH,
            num_convs=0,
            concat_input=False,
            num_classes=5,
            calibration=options_of(calibration),
        ).eval()
    own = head.conv_seg.state_dict()
    given = classifier().state_dict()
    head.conv_seg.load_state_dict({name: given[name].view_as(tensor) for name, tensor in own.items()})
    copied(calibration, head.calibration)
    return head([x[:, :, None, None]])[:, :, 0, 0]


@pytest.mark.parametrize("host", [of_classification, of_detection, of_segmentation])
@pytest.mark.parametrize("name", CALIBRATIONS)
def test_the_same_scores_through_each_host(name, host):
    problem = Problem(features(), classifier())
    learnt = comparison.learnt(name, problem, comparison.setting_of(name, problem))
    x = problem.features.x[::7]
    with torch.no_grad():
        torch.testing.assert_close(host(learnt.calibration, x), learnt.classifier(x), rtol=1e-5, atol=1e-5)
        moved = (learnt.classifier(x) - classifier()(x)).abs().max()
    assert (moved > 0.01) == (name != "stage_one")


@pytest.mark.parametrize("name", [name for name in CALIBRATIONS if METHODS[name].setting in ("strength", "tau")])
def test_in_closed_form_a_background_changes_nothing(name):
    """Without learning the calibration of K classes is the same beside a background."""
    own, y = features(), np.concatenate([features().y.numpy(), np.full(50, 5)])
    x = np.concatenate([own.x.numpy(), np.zeros((50, WIDTH), np.float32)])
    detector = Problem(Features.from_arrays(x, y, class_counts=COUNTS, background=True), classifier(6))
    value = comparison.setting_of(name, detector)
    found, expected = (
        comparison.learnt(name, one, value).calibration for one in (detector, Problem(own, classifier()))
    )
    torch.testing.assert_close(found.magnitude, expected.magnitude)
    torch.testing.assert_close(found.margin, expected.margin)
