"""The optimizer sees what trains, and nothing else."""

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from disalign import AdaptiveCalibration

from .hooks import unwrapped


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class CalibrationOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's, over the calibration alone if the model is a stage two; over the whole model otherwise.

    ``paramwise_cfg`` knows the calibration's parameters as ``calibration.magnitude`` and so on.
    """

    def __call__(self, model: nn.Module):
        model = unwrapped(model)
        for module in model.modules():
            if isinstance(module, AdaptiveCalibration) and any(one.requires_grad for one in module.parameters()):
                model = nn.ModuleDict({"calibration": module})
                break
        return super().__call__(model)
