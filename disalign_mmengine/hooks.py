"""What a run adds on MMEngine: plain and whole checkpoints, the proof of freezing, the watch over the confidence."""

import numpy as np
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from disalign import AdaptiveCalibration, InputError
from disalign.freezing import fingerprints, frozen_tensors, refuse_changes
from disalign.io import atomic_file, require_folder

from .checkpoints import metadata


def unwrapped(model):
    """The model itself, not DDP's wrapper."""
    return model.module if is_model_wrapper(model) else model


@register_backend("disalign_atomic")
class AtomicBackend(LocalBackend):
    """mmengine's own, but a file appears whole or not at all: a full disk costs no earlier checkpoint."""

    def put(self, obj: bytes, filepath) -> None:
        with atomic_file(filepath) as file:
            file.write(obj)


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Keeps checkpoints whole, and plain: tensors and values that ``weights_only`` loads.

    mmengine saves its log buffers and a numpy scalar as pickled objects, which ``weights_only`` refuses. The buffers
    only smooth the first log lines after a resume, so they are left out; the scalar becomes a plain number.
    """

    def before_train(self, runner) -> None:
        for hook in runner.hooks:
            ours = isinstance(hook, CheckpointHook) and not (hook.backend_args or hook.file_client_args)
            if ours and "://" not in (hook.out_dir or runner.work_dir):
                require_folder(hook.out_dir or runner.work_dir)
                hook.backend_args = {"backend": "disalign_atomic"}

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        # On resuming mmengine would run the config in it, which is Python.
        metadata(checkpoint).pop("config", None)

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value for key, value in hub["runtime_info"].items()
        }
        hub["resumed_keys"] = {key: kept for key, kept in hub["resumed_keys"].items() if key in hub["runtime_info"]}


@HOOKS.register_module()
class FrozenHook(Hook):
    """Says what trains, and proves at the end of a run that nothing else changed by a bit.

    For models that froze themselves (with ``trained`` and a ``freeze_report``); others train as they are.
    """

    def before_train(self, runner) -> None:
        model = unwrapped(runner.model)
        if not hasattr(model, "freeze_report"):
            return
        _refuse_magnitude_decay(model, runner.optim_wrapper.optimizer)
        runner.logger.info(str(model.freeze_report))
        self._before = fingerprints(frozen_tensors(model, model.trained))

    def after_train(self, runner) -> None:
        model = unwrapped(runner.model)
        if not hasattr(model, "freeze_report"):
            return
        refuse_changes(self._before, fingerprints(frozen_tensors(model, model.trained)))
        count = len(self._before)
        runner.logger.info(f"{count} of {count} frozen tensors are bit-identical to what this run started from")


@HOOKS.register_module()
class ConfidenceHook(Hook):
    """Warns when the confidence has collapsed to 0: magnitude and margin then get no gradient (docs/deviations.md).

    Args:
        threshold: of the batch's mean confidence.
    """

    def __init__(self, threshold: float = 0.05) -> None:
        self.threshold = threshold
        self._warned = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        confidence = next((v for name, v in (outputs or {}).items() if name.endswith("confidence_mean")), None)
        if confidence is None or self._warned or float(confidence) >= self.threshold:
            return
        self._warned = True
        runner.logger.warning(
            f"the mean confidence fell to {float(confidence):.3f} at iteration {runner.iter + 1}: magnitude and margin "
            "hardly get gradients any more and stage two may end as stage one; keep "
            "optim_wrapper.clip_grad=dict(max_norm=1.0), or lower the learning rate or rho"
        )


def _refuse_magnitude_decay(model, optimizer) -> None:
    magnitudes = {id(module.magnitude) for module in model.modules() if isinstance(module, AdaptiveCalibration)}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(parameter) in magnitudes for parameter in group["params"]):
            raise InputError(
                "expected no weight decay on the magnitude, whose identity is 1 and not 0; set optim_wrapper."
                'paramwise_cfg=dict(custom_keys={"calibration.magnitude": dict(decay_mult=0.0)})'
            )
