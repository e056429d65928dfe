"""disalign_d2's own box predictor."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform

from disalign import freeze_except
from disalign_d2 import DisAlignOutputLayers

from .adapters import COUNTS, Adapter, below, labels


def predictor(classifier):
    def build(**options):
        return DisAlignOutputLayers(
            ShapeSpec(channels=6),
            box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
            num_classes=len(COUNTS),
            classifier=classifier,
            **options,
        )

    def stage_two():
        layers = build(calibrate=True, class_counts=COUNTS)
        freeze_except(layers, ["cls_score.calibration"])
        return layers

    def loss(class_counts, normalize="mean", **options):
        layers = build(calibrate=True, class_counts=class_counts, **options)
        layers.loss.normalize = normalize
        layers.resolve_class_counts()
        return layers.loss

    return Adapter(
        name=f"DisAlignOutputLayers, {classifier}",
        class_counts=COUNTS,
        stage_one=build,
        stage_two=stage_two,
        batch=lambda n: (torch.randn(n, 6), labels(n, num_classes=6, ignore_index=-100)),
        scores=lambda layers, features: layers.cls_score.scores(features),
        loss=loss,
        trainable=below("cls_score.calibration"),
        passthrough=1,
    )


ADAPTERS = [predictor("linear"), predictor("cosine")]
