"""MMEngine's Runner, with safe and strict loading of checkpoints."""

import os
from contextlib import nullcontext
from typing import Any

from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, load_state_dict
from torch import nn

from disalign import InputError
from disalign.errors import input_errors
from disalign.hand_over import state_dict_of
from disalign.io import locked_folder
from disalign.stage_two import calibrations

from .checkpoints import load_checkpoint, load_whole
from .models import unwrapped
from .saving import latest_checkpoint


@RUNNERS.register_module()
class DisAlignRunner(Runner):
    """The Runner of both stages (``runner_type = "DisAlignRunner"`` in a config).

    - Stage two starts from ``stage_one``, which :class:`~disalign_mmengine.hooks.StageTwoHook` hands over;
      ``load_from`` is another name for it.
    - ``--resume`` continues from the run's own last checkpoint, regardless of ``stage_one`` and ``load_from``.
    - Any other checkpoint must hold exactly the model's tensors, except for a stage one that ``starts_from_others``.
    - Files are read with ``weights_only``, on upstream MMEngine too.

    Raises:
        InputError: nothing to start from, or a checkpoint that does not fit.
    """

    #: Whether ``load_from`` of a stage one may fit in part, as with MMEngine: weights of another dataset.
    starts_from_others = False
    _trains = False

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """MMEngine's, and those for whole and plain checkpoints, regardless of the config."""
        super().register_default_hooks({"plain_checkpoint": dict(type="PlainCheckpointHook"), **(hooks or {})})

    def train(self) -> nn.Module:
        self._trains = True
        with locked_folder(self.work_dir, "work_dir") if is_main_process() else nullcontext():
            return super().train()

    def load_or_resume(self) -> None:
        if self._trains and self._resume:
            self._load_from = to_resume(self.work_dir)
        elif self._trains and calibrations(self.model):
            return
        elif not self._trains and not self._load_from:
            raise InputError("expected a checkpoint to test, got none; give it as CHECKPOINT")
        expected = f"expected a checkpoint of this run in {self._load_from!r}"  # its records may have any type
        with input_errors(expected, "resume another, or start a new run"):
            super().load_or_resume()

    def load_checkpoint(
        self, filename: str | os.PathLike[str], map_location: Any = "cpu", strict: bool = True, revise_keys: Any = ()
    ) -> dict:
        """Load a checkpoint completely or not at all; tensors are read on the CPU regardless of ``map_location``."""
        checkpoint, model = load_checkpoint(filename), unwrapped(self.model)
        if self.starts_from_others and self._trains and not self._resume:
            load_state_dict(model, state_dict_of(checkpoint), strict=False, logger=self.logger)
        else:
            load_whole(model, checkpoint, os.fspath(filename))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        self._has_loaded = True
        return checkpoint


def to_resume(work_dir: str) -> str:
    """The checkpoint to resume in a work folder, which must have one."""
    path = latest_checkpoint(work_dir)
    if path is None:
        raise InputError(f"expected a checkpoint to resume in {work_dir!r}, got none; start without --resume")
    return path
