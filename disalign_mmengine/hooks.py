"""Hooks of a run on MMEngine: plain and whole checkpoints, and checks of stage two from its first step on."""

import os
from types import MethodType
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from disalign import InputError, load_class_counts, load_stage_one
from disalign.hand_over import require_finite
from disalign.io import require_folder
from disalign.stage_two import (
    StageTwoRun,
    calibrations,
    require_finite_loss,
    require_finite_settings,
    require_own_folder,
    require_same_classes,
)

from .checkpoints import class_names, load_checkpoint, metadata
from .models import unwrapped
from .runner import DisAlignRunner
from .saving import WholeCheckpointHook, latest_checkpoint


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Keeps checkpoints whole, finite and plain: tensors and values that ``weights_only`` loads.

    A run stops at its first loss that is NaN or infinite.

    MMEngine saves its log buffers and a numpy scalar as pickled objects, which ``weights_only`` refuses. The buffers
    only smooth the first log lines after a resume, so they are left out; the scalar becomes a plain number.
    """

    def before_train(self, runner: Runner) -> None:
        require_finite_settings(runner.optim_wrapper.optimizer)
        for hook in runner.hooks:
            ours = isinstance(hook, CheckpointHook) and not (hook.backend_args or hook.file_client_args)
            if ours and "://" not in (hook.out_dir or runner.work_dir):
                require_folder(hook.out_dir or runner.work_dir)
                hook.backend_args = {"backend": "disalign_atomic"}
                if type(hook) is CheckpointHook:
                    hook.__class__ = WholeCheckpointHook

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # The logs read the number anyway: no extra GPU synchronization.
        if outputs and "loss" in outputs:
            require_finite_loss(outputs["loss"].item(), runner.iter + 1)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # On resuming MMEngine would run the config in it, which is Python.
        metadata(checkpoint).pop("config", None)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        advice = "nothing was saved; resume the last checkpoint with a lower learning rate"
        require_finite(checkpoint["state_dict"], f" of the model at iteration {checkpoint['meta']['iter']}", advice)
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value for key, value in hub["runtime_info"].items()
        }
        hub["resumed_keys"] = {key: kept for key, kept in hub["resumed_keys"].items() if key in hub["runtime_info"]}


@HOOKS.register_module()
class StageTwoHook(Hook):
    """Starts stage two from ``stage_one`` of the config, and watches the run (:class:`disalign.stage_two.StageTwoRun`).

    A resumed run starts from its own checkpoint. Without a calibration in the model, only the work folder is checked.

    Args:
        threshold: mean confidence of a batch below which the run warns, once, that it has collapsed.
    """

    # Before the hooks that train or copy the model.
    priority = "HIGH"

    def __init__(self, threshold: float = 0.05) -> None:
        self.threshold = threshold
        self._run: StageTwoRun | None = None

    def before_run(self, runner: Runner) -> None:
        if not isinstance(runner, DisAlignRunner):
            # `mim test` takes MMEngine's own Runner, which would unpickle anything in the file, and only warn.
            runner.starts_from_others = False
            runner.load_checkpoint = MethodType(DisAlignRunner.load_checkpoint, runner)

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        if runner.iter == 0:
            _require_own_folder(runner, bool(calibrations(model)))
        if not calibrations(model):
            return
        if runner.iter == 0:
            hand_over(runner, model)
        if hasattr(model, "freeze_report"):
            runner.logger.info(str(model.freeze_report))
        advice = "keep optim_wrapper.clip_grad=dict(max_norm=1.0), or lower the learning rate or rho"
        self._run = StageTwoRun(model, runner.optim_wrapper.optimizer, advice, self.threshold)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._run and (warning := self._run.warning(runner.iter + 1)):
            runner.logger.warning(warning)

    def after_train(self, runner: Runner) -> None:
        if self._run:
            runner.logger.info(self._run.finish())


def stage_one_of(config: Config) -> str | None:
    """The stage-one checkpoint of a training config: ``stage_one``, or ``load_from``, which is another name for it."""
    stage_one, load_from = config.get("stage_one"), config.get("load_from")
    if stage_one and load_from and stage_one != load_from:
        raise InputError(
            f"expected one stage-one checkpoint, got stage_one={stage_one!r} and load_from={load_from!r}; give one of "
            "them, and set the other to None"
        )
    return stage_one or load_from


def hand_over(runner: Runner, model: nn.Module) -> None:
    """Load the config's stage one, trained on the same classes, strictly into stage two's model."""
    path = stage_one_of(runner.cfg)
    if not path:
        raise InputError("expected the stage-one checkpoint, got none; give it: --cfg-options stage_one=FILE")
    checkpoint = load_checkpoint(path)
    dataset = runner.train_dataloader.dataset
    require_same_classes(dataset.metainfo.get("classes"), class_names(checkpoint), repr(path))
    theirs = (metadata(checkpoint).get("disalign") or {}).get("class_counts")
    ours = getattr(dataset, "class_counts", None)
    if theirs and ours is not None and (seen := load_class_counts(theirs)).tolist() != ours.tolist():
        runner.logger.warning(
            f"stage one was trained on another training set ({int(seen.sum())} images, here {int(ours.sum())}); make "
            "sure that none of its images is evaluated"
        )
    runner.logger.info(f"{os.path.basename(path)}: {load_stage_one(model, checkpoint, name=path)}")


def _require_own_folder(runner, calibrated: bool) -> None:
    folder = os.path.realpath(runner.work_dir)
    found = (latest_checkpoint(folder), runner.cfg.get("stage_one"), runner.cfg.get("load_from"))
    paths = [path for path in found if path and os.path.dirname(os.path.realpath(path)) == folder]
    named = [path for path in paths if os.path.basename(path).startswith(("epoch_", "iter_", "best_"))]
    require_own_folder(runner.work_dir, named, calibrated, "work_dir", load_checkpoint)
