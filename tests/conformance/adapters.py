"""What an adapter is, and every adapter that the invariants are checked on."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from core.models import SmallCNN
from torch import Tensor, nn

from disalign import (
    AdaptiveCalibration,
    GRWCrossEntropyLoss,
    freeze_except,
    wrap_classifier,
)


@dataclass(frozen=True)
class Adapter:
    """One way of putting DisAlign on a model.

    K classes are calibrated; scores have K + passthrough columns.
    """

    name: str
    #: (K,) training counts.
    class_counts: list[int]
    #: () -> a fresh stage-one model.
    stage_one: Callable[[], nn.Module]
    #: () -> a fresh stage-two model for these counts, frozen but for its calibration; it has one AdaptiveCalibration.
    stage_two: Callable[[], nn.Module]
    #: n -> n inputs and their (n, *) labels; n may be 0; n = 8 holds every label, the ignored one included.
    batch: Callable[[int], tuple[object, Tensor]]
    #: (stage-two model, inputs) -> stage one's scores and the calibrated ones, each (n, K + passthrough, *).
    scores: Callable[[nn.Module, object], tuple[Tensor, Tensor]]
    #: (class_counts, rho=, reduction=, normalize=) -> module of (scores, labels) with the adapter's ignored label.
    loss: Callable[..., nn.Module]
    #: Names in stage two of the parameters that train.
    trainable: tuple[str, ...]
    ignore_index: int = -100
    passthrough: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)


COUNTS = [80, 40, 20, 10, 5]
PARTS = ("magnitude", "margin", "confidence.weight", "confidence.bias")


def below(name):
    return tuple(f"{name}.{part}" for part in PARTS)


def labels(n, *place, num_classes, ignore_index):
    """(n, *place) labels that run through all classes; the last one is ignored."""
    target = torch.arange(n * math.prod(place)).remainder(num_classes)
    target[-1:] = ignore_index
    return target.view(n, *place)


# ------------------------------------------------------------------------------------- any classifier, wrapped


def wrapped(kind):
    def batch(n):
        return torch.randn(n, 1, 8, 8), labels(n, num_classes=5, ignore_index=-100)

    return Adapter(
        name=f"wrapped {kind} classifier",
        class_counts=COUNTS,
        stage_one=lambda: SmallCNN(kind),
        stage_two=lambda: wrap_classifier(SmallCNN(kind), COUNTS)[0],
        batch=batch,
        scores=lambda model, images: model.fc.scores(model.features(images)),
        loss=GRWCrossEntropyLoss,
        trainable=below("fc.calibration"),
    )


# ------------------------------------------------------------------------------------------------------- pixels


class Segmentor(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv_seg = nn.Conv2d(6, 5, 1)

    def features(self, images):
        return F.dropout(F.relu(self.bn(self.conv(images))), 0.5, training=self.training)

    def scores(self, images):
        features = self.features(images)
        logits = self.conv_seg(features)
        return logits, self.calibration(logits, features)


def spatial():
    def stage_two():
        model = Segmentor()
        model.calibration = AdaptiveCalibration(5, 6, spatial=True)
        freeze_except(model, ["calibration"])
        return model

    def batch(n):
        return torch.randn(n, 1, 4, 6), labels(n, 4, 6, num_classes=5, ignore_index=255)

    def loss(class_counts, **options):
        return GRWCrossEntropyLoss(class_counts, ignore_index=255, **options)

    return Adapter(
        name="spatial",
        class_counts=COUNTS,
        stage_one=Segmentor,
        stage_two=stage_two,
        batch=batch,
        scores=lambda model, images: model.scores(images),
        loss=loss,
        trainable=below("calibration"),
        ignore_index=255,
    )


# -------------------------------------------------------------------------------------------------------- boxes


class BoxHead(nn.Module):
    """K foreground scores and a background score, the last."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 6)
        self.bn = nn.BatchNorm1d(6)
        self.cls_score = nn.Linear(6, 5 + 1)

    def scores(self, boxes):
        features = F.relu(self.bn(self.fc(boxes)))
        logits = self.cls_score(features)
        return logits, self.calibration(logits, features)


def box_loss(class_counts, **options):
    """The background weighs 1 beside the foreground's weights."""
    return GRWCrossEntropyLoss(class_counts, background_weight=1.0, **options)


def detection_like():
    def stage_two():
        model = BoxHead()
        model.calibration = AdaptiveCalibration(5, 6, passthrough=1)
        freeze_except(model, ["calibration"])
        return model

    def batch(n):
        return torch.randn(n, 7), labels(n, num_classes=6, ignore_index=-100)

    return Adapter(
        name="detection-like",
        class_counts=COUNTS,
        stage_one=BoxHead,
        stage_two=stage_two,
        batch=batch,
        scores=lambda model, boxes: model.scores(boxes),
        loss=box_loss,
        trainable=below("calibration"),
        passthrough=1,
    )


# ----------------------------------------------------------------------------------------------------- registry

ADAPTERS = [wrapped("linear"), wrapped("cosine"), spatial(), detection_like()]

#: Modules beside this one that define their own ADAPTERS -> the framework that each needs.
PACKAGES = {"classification": "mmengine", "detection": "detectron2", "segmentation": "mmseg"}


def parameters():
    """Every adapter as a pytest parameter; a package whose framework is not installed as a visible skip."""
    found = [pytest.param(adapter, id=adapter.name) for adapter in ADAPTERS]
    for module, framework in PACKAGES.items():
        if find_spec(framework) is None:
            skip = pytest.mark.skip(reason=f"{framework} is not installed")
            found.append(pytest.param(None, id=module, marks=skip))
        else:
            adapters = importlib.import_module(f"{__package__}.{module}").ADAPTERS
            found += [pytest.param(adapter, id=adapter.name) for adapter in adapters]
    return found
