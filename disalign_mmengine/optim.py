"""The optimizer gets the parameters that train, and no others."""

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from disalign.stage_two import calibrations, keep_magnitude_from_decay


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class CalibrationOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's, over the calibration alone if the model is a stage two, otherwise over the whole model.

    In ``paramwise_cfg`` the calibration's parameters are ``calibration.magnitude`` and so on. The magnitude has no
    weight decay.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        found = [module for module in calibrations(model).values() if any(p.requires_grad for p in module.parameters())]
        if not found:
            return super().__call__(model)
        (calibration,) = found
        wrapper = super().__call__(nn.ModuleDict({"calibration": calibration}))
        keep_magnitude_from_decay(wrapper.optimizer, calibration)
        return wrapper
