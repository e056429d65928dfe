"""MMEngine's Runner, with what it loads read safely and fitting exactly."""

import os
from typing import Any

from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from disalign import InputError
from disalign.stage_two import calibrations

from .checkpoints import load_checkpoint, load_whole
from .models import unwrapped


@RUNNERS.register_module()
class DisAlignRunner(Runner):
    """The Runner of both stages (``runner_type = "DisAlignRunner"`` in a config).

    - Stage two starts from ``stage_one``, which :class:`~disalign_mmengine.hooks.StageTwoHook` hands over;
      ``load_from`` is another name for it.
    - ``--resume`` goes on from the run's own last checkpoint, whatever ``stage_one`` and ``load_from`` say.
    - Any other checkpoint must hold exactly the model's tensors.
    - Files are read with ``weights_only``, on upstream MMEngine too.

    Raises:
        InputError: nothing to start from, or a checkpoint that does not fit.
    """

    _trains = False

    def train(self) -> nn.Module:
        self._trains = True
        return super().train()

    def load_or_resume(self) -> None:
        if self._trains and self._resume:
            self._load_from = latest_checkpoint(self.work_dir)
        elif self._trains and calibrations(self.model):
            return
        elif not self._trains and not self._load_from:
            raise InputError("expected a checkpoint to test, got none; give it as CHECKPOINT")
        super().load_or_resume()

    def load_checkpoint(
        self, filename: str | os.PathLike[str], map_location: Any = "cpu", strict: bool = True, revise_keys: Any = ()
    ) -> dict:
        """Load a checkpoint completely or not at all; tensors are read on the CPU whatever ``map_location`` says."""
        checkpoint = load_checkpoint(filename)
        load_whole(unwrapped(self.model), checkpoint, os.fspath(filename))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        self._has_loaded = True
        return checkpoint


def latest_checkpoint(work_dir: str) -> str:
    """The checkpoint to resume in a work folder.

    Raises:
        InputError: there is none.
    """
    path = find_latest_checkpoint(work_dir) if os.path.isdir(work_dir) else None
    if path is None:
        raise InputError(f"expected a checkpoint to resume in {work_dir!r}, got none; start without --resume")
    return path
