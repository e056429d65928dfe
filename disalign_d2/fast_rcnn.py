"""The box predictor: a linear or cosine classifier, calibrated in stage two.

Shapes: R regions of interest (RoIs), K foreground classes, d the length of the box head's feature.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat

# Private, but it logs the figures that Detectron2's users know; our only import of this kind.
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, _log_classification_stats
from detectron2.utils.events import get_event_storage

from disalign import CosineClassifier, GRWCrossEntropyLoss, InputError, calibrate_classifier, load_class_counts

from .class_counts import class_counts_from_config

NO_BACKGROUND_SCORE = (
    "expected softmax cross-entropy in stage two, got sigmoid or federated loss, which has no background score; switch "
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE and USE_FED_LOSS off, or leave calibration off"
)


class DisAlignOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor with a classifier of choice and, in stage two, DisAlign on top of it.

    Only the K foreground scores are calibrated (eq. 4-5); the background score is unchanged, and its class weight is
    ``background_weight`` while the foreground weights average 1 (eq. 11). ``cls_score`` and ``bbox_pred`` keep their
    names; stage two adds ``cls_score.calibration``.

    Args:
        input_shape: of the box head's features.
        classifier: ``"linear"`` (eq. 2) or ``"cosine"`` (eq. 3).
        scale, learn_scale: of the cosine classifier, see :class:`disalign.CosineClassifier`.
        calibrate: stage two; the model must then be frozen, see :func:`disalign_d2.freeze`.
        learn_magnitude, learn_margin, confidence: see :class:`disalign.AdaptiveCalibration`.
        class_counts: training counts of the K classes, anything :func:`disalign.load_class_counts` takes, or a function
            that returns it; needed when training starts, never for inference.
        rho, reduction, background_weight: of the loss, see :class:`disalign.GRWCrossEntropyLoss`.
        stock: the arguments of ``FastRCNNOutputLayers``.

    Raises:
        InputError: an unknown classifier, or a calibration with sigmoid or federated loss.
    """

    @configurable
    def __init__(
        self,
        input_shape: Any,
        *,
        classifier: str = "linear",
        scale: float = 20.0,
        learn_scale: bool = True,
        calibrate: bool = False,
        learn_magnitude: bool = True,
        learn_margin: bool = True,
        confidence: str = "learnt",
        class_counts: Callable | object | None = None,
        rho: float = 0.8,
        reduction: str = "weighted_mean",
        background_weight: float | str = 1.0,
        **stock: Any,
    ) -> None:
        super().__init__(input_shape, **stock)
        if classifier not in ("linear", "cosine"):
            raise InputError(f"expected the classifier 'linear' or 'cosine', got {classifier!r}")
        if classifier == "cosine":
            linear = self.cls_score  # type: ignore[has-type]
            self.cls_score = CosineClassifier(linear.in_features, linear.out_features, scale, learn_scale)
        self.calibrated = calibrate
        if not calibrate:
            return
        if self.use_sigmoid_ce or self.use_fed_loss:
            raise InputError(NO_BACKGROUND_SCORE)
        options = dict(learn_magnitude=learn_magnitude, learn_margin=learn_margin, confidence=confidence)
        calibrate_classifier(self.cls_score, passthrough=1, **options)
        self.class_counts = class_counts
        self.loss = GRWCrossEntropyLoss(rho=rho, reduction=reduction, background_weight=background_weight)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict:
        ret = super().from_config(cfg, input_shape)
        disalign = cfg.MODEL.DISALIGN
        ret.update(
            classifier=disalign.CLASSIFIER,
            scale=disalign.SCALE,
            learn_scale=disalign.LEARN_SCALE,
            calibrate=disalign.CALIBRATE,
            learn_magnitude=disalign.MAGNITUDE,
            learn_margin=disalign.MARGIN,
            confidence=disalign.CONFIDENCE,
            class_counts=partial(class_counts_from_config, cfg),  # unlike a lambda it pickles
            rho=disalign.RHO,
            reduction=disalign.REDUCTION,
            background_weight=background_weight(cfg),
        )
        return ret

    def resolve_class_counts(self) -> None:
        """Get the class counts, once.

        Raises:
            InputError: no counts, or not one for each class.
        """
        if self.loss.weight is not None:
            return
        counts = self.class_counts() if callable(self.class_counts) else self.class_counts
        if counts is None:
            raise InputError(
                "expected class counts for stage two, got none; set MODEL.DISALIGN.CLASS_COUNTS, or class_counts=... "
                "of the box predictor"
            )
        counts = load_class_counts(counts)
        if len(counts) != self.num_classes:
            raise InputError(
                f"expected one class count for each of the {self.num_classes} classes, got {len(counts)}; do the "
                "counts belong to this dataset?"
            )
        self.loss.set_class_counts(counts)

    def losses(self, predictions: Any, proposals: Any) -> dict:
        """The re-weighted loss (eq. 8-11) of the calibrated scores; Detectron2's own losses in stage one.

        Args:
            predictions: scores (R, K + 1) and box deltas.
            proposals: list of Instances with ``gt_classes`` (Ri,) int64 in [0, K], K the background.

        Returns:
            ``{"loss_cls": scalar}`` in stage two: frozen parts have no loss.
        """
        if not self.calibrated:
            return super().losses(predictions, proposals)
        self.resolve_class_counts()
        scores, deltas = predictions
        if deltas.requires_grad:
            raise InputError(
                "expected a frozen model in stage two, got one whose box regression trains; build it with "
                "disalign_d2.build_model, or call disalign_d2.freeze(model) before training"
            )
        target = cat([p.gt_classes for p in proposals]) if proposals else scores.new_empty(0, dtype=torch.int64)
        _log_classification_stats(scores, target)
        storage = get_event_storage()
        calibration: Any = self.cls_score.calibration
        for name, value in calibration.statistics().items():
            storage.put_scalar(f"disalign/{name}", float(value))
        return {"loss_cls": self.loss(scores, target) * self.loss_weight.get("loss_cls", 1.0)}


def background_weight(cfg: CfgNode) -> float | str:
    """The loss's ``background_weight`` that ``MODEL.DISALIGN.BACKGROUND_BALANCE`` and ``BACKGROUND_WEIGHT`` select."""
    balance, weight = cfg.MODEL.DISALIGN.BACKGROUND_BALANCE, float(cfg.MODEL.DISALIGN.BACKGROUND_WEIGHT)
    if balance not in ("fixed", "balanced"):
        raise InputError(f"expected MODEL.DISALIGN.BACKGROUND_BALANCE 'fixed' or 'balanced', got {balance!r}")
    return "balanced" if balance == "balanced" else weight
