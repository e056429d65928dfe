"""ROI heads whose box predictors are :class:`DisAlignOutputLayers`."""

from typing import TYPE_CHECKING, Any

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn

from .fast_rcnn import DisAlignOutputLayers

if TYPE_CHECKING:  # the classes that the mixin precedes
    from detectron2.modeling.roi_heads import StandardROIHeads as _Host
else:
    _Host = object


class LeanTraining(_Host):
    """Mixin before ROI heads: in stage two, training skips the mask and keypoint branches, which are frozen.

    Subclasses build ``output_layers``; with calibration off nothing is skipped.

    Attributes:
        output_layers: class of the box predictors; a subclass of the heads may name a subclass of
            :class:`DisAlignOutputLayers`.
    """

    output_layers = DisAlignOutputLayers

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        skip = mode and any(getattr(predictor, "calibrated", False) for predictor in self.box_predictors())
        self.mask_on = hasattr(self, "mask_head") and not skip
        self.keypoint_on = hasattr(self, "keypoint_head") and not skip
        return self

    def box_predictors(self) -> list[nn.Module]:
        """The box predictor, or those of all cascade stages."""
        found: Any = self.box_predictor
        in_stages = isinstance(found, nn.ModuleList)
        return list(found) if in_stages else [found]


@ROI_HEADS_REGISTRY.register()
class DisAlignROIHeads(LeanTraining, StandardROIHeads):
    """``StandardROIHeads`` with :class:`DisAlignOutputLayers`; the keys are those of ``add_disalign_config``."""

    # Detectron2 does the same to its own heads when it exports them, and TorchScript does not inherit it.
    mask_on: torch.jit.Final[bool]  # type: ignore[misc]
    keypoint_on: torch.jit.Final[bool]  # type: ignore[misc]

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = cls.output_layers(cfg, ret["box_head"].output_shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class DisAlignCascadeROIHeads(LeanTraining, CascadeROIHeads):
    """``CascadeROIHeads`` with :class:`DisAlignOutputLayers`, one calibration a stage."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictors"] = [
            cls.output_layers(cfg, head.output_shape, box2box_transform=stock.box2box_transform)
            for head, stock in zip(ret["box_heads"], ret["box_predictors"], strict=True)
        ]
        return ret
