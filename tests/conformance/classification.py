"""disalign_cls' own classifier."""

import torch

from disalign import GRWCrossEntropyLoss
from disalign_cls.classifiers import DisAlignClassifier, ImageClassifier

from .adapters import COUNTS, Adapter, below, labels


def classifier(kind):
    options = dict(backbone=dict(name="small_cnn"), num_classes=len(COUNTS), classifier=kind)

    def stage_two():
        model = DisAlignClassifier(**options)
        model.set_class_counts(torch.tensor(COUNTS))
        return model

    return Adapter(
        name=f"DisAlignClassifier, {kind}",
        class_counts=COUNTS,
        stage_one=lambda: ImageClassifier(**options),
        stage_two=stage_two,
        batch=lambda n: (torch.randn(n, 1, 8, 8), labels(n, num_classes=5, ignore_index=-100)),
        scores=lambda model, images: model.classifier.scores(model.backbone(images)),
        loss=GRWCrossEntropyLoss,
        trainable=below("classifier.calibration"),
    )


ADAPTERS = [classifier("linear"), classifier("cosine")]
