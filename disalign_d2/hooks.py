"""Stage two's checks of a run, as a hook of Detectron2's trainers."""

import logging

from detectron2.engine import HookBase

from disalign.stage_two import StageTwoRun

logger = logging.getLogger(__name__)


class StageTwoHook(HookBase):
    """Checks that nothing but the calibrations changes, and warns of a collapsed confidence.

    See :class:`disalign.stage_two.StageTwoRun`; the trainer needs a ``model`` and an ``optimizer``.
    """

    _run = None

    def before_train(self) -> None:
        model = getattr(self.trainer.model, "module", self.trainer.model)
        advice = "keep SOLVER.CLIP_GRADIENTS on, or lower SOLVER.BASE_LR or MODEL.DISALIGN.RHO"
        self._run = StageTwoRun(model, self.trainer.optimizer, advice)

    def after_step(self) -> None:
        if self._run and (warning := self._run.warning(self.trainer.iter + 1)):
            logger.warning(warning)

    def after_train(self) -> None:
        if self._run:  # called even where before_train failed
            logger.info(self._run.finish())
