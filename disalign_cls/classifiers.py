"""Stage one's classifier and its stage two."""

from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from disalign import CosineClassifier, GRWCrossEntropyLoss, InputError, calibrate_classifier
from disalign.stage_two import freeze

from .backbones import build_backbone
from .losses import build_stage_one_loss

CLASSIFIERS = ("linear", "cosine")


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A backbone and a classifier: stage one. Trained with plain cross-entropy it is the paper's Baseline.

    Args:
        backbone: options of :func:`disalign_cls.backbones.build_backbone`, including its ``name``.
        num_classes: K.
        classifier: ``"linear"`` (eq. 2), or ``"cosine"`` (eq. 3; the paper's starred rows).
        cosine: options of :class:`disalign.CosineClassifier` (``scale``, ``learn_scale``).
        data_preprocessor: mmengine's; it normalises the uint8 images on the device.
        stage_one_loss: options of a loss of :mod:`disalign_cls.losses`, including its ``type``; ``None`` for
            cross-entropy. Not called ``loss``, because stage two's config inherits this one and sets its own ``loss``.

    Shapes: inputs (N, C, H, W), data_samples (N,) int64 labels; scores (N, K).

    Raises:
        InputError: an unknown backbone, classifier or loss, or a loss that does not fit the classifier.
    """

    def __init__(
        self,
        backbone: dict,
        num_classes: int,
        classifier: str = "linear",
        cosine: dict | None = None,
        data_preprocessor: dict | None = None,
        stage_one_loss: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        if classifier not in CLASSIFIERS:
            raise InputError(f"expected a classifier among {', '.join(CLASSIFIERS)}, got {classifier!r}")
        self.num_classes = num_classes
        self.class_counts: Tensor | None = None
        self.backbone = build_backbone(**backbone)
        width = self.backbone.num_features
        self.classifier: Any = (
            nn.Linear(width, num_classes)
            if classifier == "linear"
            else CosineClassifier(width, num_classes, **(cosine or {}))
        )
        self.stage_one_loss = build_stage_one_loss(stage_one_loss, self.classifier) if stage_one_loss else None

    def init_weights(self) -> None:
        """Do nothing: the constructor initialises. (MMEngine's would call timm's and overwrite pretrained weights.)"""

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Set the training set's (K,) counts, for the metric's groups and the loss."""
        if len(class_counts) != self.num_classes:
            raise InputError(
                f"expected one count for each of the model's {self.num_classes} classes, got {len(class_counts)}; set "
                "model.num_classes to the dataset's"
            )
        self.class_counts = class_counts
        if self.stage_one_loss is not None:
            self.stage_one_loss.set_class_counts(class_counts)
            self.stage_one_loss.to(self.classifier.weight.device)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, before it begins."""
        if self.stage_one_loss is not None:
            self.stage_one_loss.epoch = epoch

    def metadata(self) -> dict:
        """Plain values stored in a checkpoint; without a ``stage_one_loss``, the loss was cross-entropy."""
        loss = {} if self.stage_one_loss is None else {"stage_one_loss": self.stage_one_loss.metadata()}
        return {"class_counts": None if self.class_counts is None else self.class_counts.tolist()} | loss

    def forward(self, inputs: Tensor, data_samples: Tensor | None = None, mode: str = "tensor") -> Any:
        """mmengine's: scores (``"tensor"``), named losses (``"loss"``) or each image's top-5 (``"predict"``)."""
        features = self.backbone(inputs)
        if mode == "tensor":
            return self.classifier(features)
        if mode == "loss":
            return self.losses(features, data_samples)
        return self.predictions(features, data_samples)

    def losses(self, features: Tensor, labels: Any) -> dict[str, Tensor]:
        scores = self.classifier(features)
        if self.stage_one_loss is None:
            return {"loss": F.cross_entropy(scores, labels)}
        return {"loss": self.stage_one_loss(scores, labels, self.classifier)}

    def predictions(self, features: Tensor, labels: Any) -> list[dict]:
        return _best_five(labels, top=self.classifier(features))


@MODELS.register_module()
class DisAlignClassifier(ImageClassifier):
    """Stage two: the same classifier, frozen, with a trainable calibration on top (Sec. 3.2).

    Parameter names are stage one's, plus ``classifier.calibration.*``. The constructor freezes the model, so DDP needs
    no ``find_unused_parameters``.

    Args:
        calibration: options of :class:`disalign.AdaptiveCalibration`.
        loss: options of :class:`disalign.GRWCrossEntropyLoss`; the class counts come from the training set. Counts
            given here must match them.
        stage_one_loss: inherited from stage one's config; not used.
        options: :class:`ImageClassifier`'s.
    """

    def __init__(
        self,
        *args: Any,
        calibration: dict | None = None,
        loss: dict | None = None,
        stage_one_loss: dict | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        calibrate_classifier(self.classifier, **(calibration or {}))
        self.loss = GRWCrossEntropyLoss(**(loss or {}))
        self._given_counts = self.loss.class_counts
        self.freeze_report = freeze(self)

    def set_class_counts(self, class_counts: Tensor) -> None:
        super().set_class_counts(class_counts)
        given = self._given_counts
        if given is not None and given.tolist() != class_counts.tolist():
            raise InputError(
                f"expected the counts of the training set ({int(class_counts.sum())} images of {len(class_counts)} "
                f"classes) as model.loss.class_counts, got others ({int(given.sum())} of {len(given)}); leave it out "
                "to use the training set's"
            )
        self.loss.set_class_counts(class_counts)

    def metadata(self) -> dict:
        return super().metadata() | self.loss.metadata()

    def losses(self, features: Tensor, labels: Any) -> dict[str, Tensor]:
        loss = self.loss(self.classifier(features), labels)
        return {"loss": loss} | self.classifier.calibration.statistics()

    def predictions(self, features: Tensor, labels: Any) -> list[dict]:
        # The trunk is frozen, so the same pass gives stage one's scores: its figures cost nothing.
        stage_one, calibrated = self.classifier.scores(features)
        return _best_five(labels, top=calibrated, stage_one=stage_one)


def _best_five(labels: Tensor, **scores: Tensor) -> list[dict]:
    """For each image its label and, for each of the named (N, K) scores, the (up to) five highest-scoring labels."""
    best = {name: z.topk(min(5, z.shape[1]), dim=1).indices.cpu() for name, z in scores.items()}
    return [{"label": label} | {name: best[name][i] for name in best} for i, label in enumerate(labels.cpu())]
