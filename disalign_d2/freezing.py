"""Stage two of a Detectron2 model: everything but the calibrations is frozen."""

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling import build_model as build_stock_model
from detectron2.modeling.proposal_generator import RPN
from torch import nn

from disalign import FreezeReport, InputError, stage_two

from .fast_rcnn import NO_BACKGROUND_SCORE
from .roi_heads import LeanTraining

logger = logging.getLogger(__name__)

#: Tensors of Detectron2's checkpoints that are not needed: old ones hold the pixel mean and std, and the anchors.
NOT_NEEDED = ("pixel_*", "*anchor*")


class LeanRPN(RPN):
    """A frozen RPN: the same proposals, but no losses and no anchors labelled for them."""

    def label_and_sample_anchors(self, anchors: Any, gt_instances: Any) -> Any:
        return [], []

    def losses(
        self, anchors: Any, pred_objectness_logits: Any, gt_labels: Any, pred_anchor_deltas: Any, gt_boxes: Any
    ) -> dict:
        return {}


def freeze(model: nn.Module) -> FreezeReport:
    """Freeze a Detectron2 R-CNN except for its calibrations, in place; before DDP wraps it.

    BatchNorm becomes FrozenBatchNorm, and frozen modules stay in eval mode after ``model.train()``, except for the
    meta-architecture, the RPN and the ROI heads, which need it for their training path; the RPN has no losses.

    Args:
        model: ``GeneralizedRCNN`` with ROI heads whose box predictors are calibrated.

    Returns:
        The parameters that train.

    Raises:
        InputError: the model has no calibration, or ROI heads that would train the frozen masks or keypoints.
    """
    if not stage_two.calibrations(model):
        raise InputError(
            "expected a model with a calibrated box predictor, got none; build DisAlignOutputLayers with "
            "calibrate=True, or set MODEL.DISALIGN.CALIBRATE True and MODEL.ROI_HEADS.NAME DisAlignROIHeads"
        )
    heads = model.roi_heads
    branches = getattr(heads, "mask_on", False) or getattr(heads, "keypoint_on", False)
    if branches and not isinstance(heads, LeanTraining):
        raise InputError(
            "expected DisAlignROIHeads or DisAlignCascadeROIHeads for a model with masks or keypoints, got "
            f"{type(heads).__name__}, which would train them; change the ROI heads"
        )
    model = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    if type(model.proposal_generator) is RPN:
        model.proposal_generator.__class__ = LeanRPN
    parents = ("", "proposal_generator", "roi_heads")
    following = (*parents, "roi_heads.box_predictor")
    held = [name for name, _ in model.named_modules() if name.rpartition(".")[0] in parents and name not in following]
    model.not_needed = NOT_NEEDED  # type: ignore[assignment]  # for the hand-over
    return stage_two.freeze(model, held)


def build_model(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``, frozen when the config calibrates.

    Raises:
        InputError: ROI heads that support neither a calibration nor a cosine classifier, or sigmoid or federated loss
            with a calibration.
    """
    asks = cfg.MODEL.DISALIGN.CALIBRATE or cfg.MODEL.DISALIGN.CLASSIFIER != "linear"
    if asks and not issubclass(ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME), LeanTraining):
        raise InputError(
            "expected MODEL.ROI_HEADS.NAME DisAlignROIHeads or DisAlignCascadeROIHeads for a calibration or a cosine "
            f"classifier, got {cfg.MODEL.ROI_HEADS.NAME}; change it"
        )
    head = cfg.MODEL.ROI_BOX_HEAD
    if cfg.MODEL.DISALIGN.CALIBRATE and (head.USE_SIGMOID_CE or head.USE_FED_LOSS):
        # Before Detectron2 builds its federated loss, which asks for metadata that own datasets lack.
        raise InputError(NO_BACKGROUND_SCORE)
    model = build_stock_model(cfg)
    logger.info("Model:\n%s", model)
    if cfg.MODEL.DISALIGN.CALIBRATE:
        logger.info(str(freeze(model)))
    return model
