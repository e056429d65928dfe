"""Stage two's meta-architecture for LazyConfig, whose training loop neither freezes nor loads strictly."""

import logging
from typing import Any

from detectron2.modeling import GeneralizedRCNN

from disalign.hand_over import COUNTERS, require_tensors
from disalign.stage_two import calibrations

from .freezing import freeze

logger = logging.getLogger(__name__)


class DisAlignGeneralizedRCNN(GeneralizedRCNN):
    """``GeneralizedRCNN``, frozen from its constructor on: the ``model._target_`` of a LazyConfig.

    Args:
        parts: the arguments of ``GeneralizedRCNN``.

    Raises:
        InputError: see :func:`disalign_d2.freeze`; on loading, a tensor is missing, mis-shaped, not finite or unknown.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        logger.info(str(freeze(self)))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but even with ``strict=False`` only a whole calibration may be missing (in stage one)."""
        required = self.state_dict()
        new = [name for name in required if name.startswith(tuple(calibrations(self)))]
        if not any(name in state_dict for name in new):
            required = {name: tensor for name, tensor in required.items() if name not in new}
        require_tensors(state_dict, required, "tensors of the frozen model", (COUNTERS, *self.not_needed))
        return super().load_state_dict(state_dict, strict, assign)
