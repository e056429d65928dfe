"""What stage two adds to Detectron2's hooks: the proof that all else is frozen, and a watch over the confidence."""

import logging

from detectron2.engine import HookBase

from disalign.freezing import fingerprints, frozen_tensors, refuse_changes
from disalign.modules import AdaptiveCalibration

from .freezing import calibrations

logger = logging.getLogger(__name__)


class FrozenProof(HookBase):
    """Compares all frozen tensors, bit by bit, before and after training.

    Raises:
        RuntimeError: after training, if any changed.
    """

    def __init__(self, model):
        self._model = getattr(model, "module", model)

    def before_train(self):
        self._before = self._fingerprints()

    def after_train(self):
        refuse_changes(self._before, self._fingerprints())
        logger.info(f"{len(self._before)} of {len(self._before)} frozen tensors are bit-identical to stage one's")

    def _fingerprints(self):
        return fingerprints(frozen_tensors(self._model, calibrations(self._model)))


class ConfidenceWatch(HookBase):
    """Warns once when a confidence has collapsed to 0: magnitude and margin then get no gradient.

    Args:
        model: with calibrations.
        threshold: of a batch's mean confidence.
    """

    def __init__(self, model, threshold: float = 0.05):
        self._calibrations = [module for module in model.modules() if isinstance(module, AdaptiveCalibration)]
        self._threshold = threshold
        self._warned = False

    def after_step(self):
        if self._warned:
            return
        for calibration in self._calibrations:
            mean = calibration.statistics().get("confidence_mean")
            if mean is not None and float(mean) < self._threshold:
                self._warned = True
                logger.warning(
                    f"the mean confidence fell to {float(mean):.3f} at iteration {self.trainer.iter + 1}: magnitude "
                    "and margin hardly get gradients any more and stage two may end as stage one; keep "
                    "SOLVER.CLIP_GRADIENTS on, or lower SOLVER.BASE_LR or MODEL.DISALIGN.RHO"
                )
                return
