"""What every host asks of a run of stage two, from its first step to its last."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from math import isfinite
from operator import not_
from typing import Any

import torch
from torch import nn

from .errors import InputError, some
from .freezing import FreezeReport, fingerprints, freeze_except, frozen_tensors, refuse_changes
from .hand_over import state_dict_of
from .io import load_file
from .losses import GRWCrossEntropyLoss
from .modules import AdaptiveCalibration, Model


def calibrations(model: nn.Module) -> dict[str, AdaptiveCalibration]:
    """All calibrations of a model by name, wrappers (DDP, test-time augmentation) included; empty in stage one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptiveCalibration)}


def is_calibrated(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are stage two's."""
    return any(".calibration." in f".{name}" for name in names)


def trained_parts(model: nn.Module) -> list[str]:
    """Names of what stage two does not freeze: the calibrations, and the losses, which have no parameters."""
    kept = (AdaptiveCalibration, GRWCrossEntropyLoss)
    return [name for name, module in model.named_modules() if isinstance(module, kept)]


def freeze(model: nn.Module, held: Sequence[str] = ("",)) -> FreezeReport:
    """Freeze a model with calibrations but for these, in place, before DDP wraps it: :func:`disalign.freeze_except`."""
    if not calibrations(model):
        raise InputError(f"expected a model with a calibration, got none in {type(model).__name__}; calibrate it first")
    return freeze_except(model, trained_parts(model), held)


@contextmanager
def at_identity(model: Model) -> Iterator[Model]:
    """Within it a model gives stage one's scores: magnitude 1 and margin 0 in all its calibrations.

    Examples:
        >>> model = disalign.calibrate_classifier(nn.Linear(4, 3))
        >>> model.calibration.margin.data[:] = torch.tensor([0.0, 1.0, 2.0])  # as learnt
        >>> with disalign.at_identity(model):
        ...     print(model.calibration.margin.tolist())
        [0.0, 0.0, 0.0]
        >>> model.calibration.margin.tolist()
        [0.0, 1.0, 2.0]
    """
    modules = calibrations(model).values()
    tensors = [tensor for module in modules for tensor in (module.magnitude, module.margin)]
    saved = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for module in modules:
            module.magnitude.fill_(1)
            module.margin.zero_()
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)


def keep_magnitude_from_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Move the magnitudes to a parameter group without weight decay, in place: their identity is 1, not 0.

    To be called before a scheduler is built over the optimizer's groups.
    """
    for group, chosen in _decaying(optimizer, model):
        keys: list[str] = [key for key in ("params", "param_names") if key in group]
        apart = {key: list(compress(group[key], chosen)) for key in keys}
        group.update({key: list(compress(group[key], map(not_, chosen))) for key in keys})
        if group["params"]:
            optimizer.add_param_group({**group, **apart, "weight_decay": 0.0})
        else:
            group.update(apart, weight_decay=0.0)


def _decaying(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[dict[str, Any], list[bool]]]:
    """The groups with weight decay on a magnitude, and which of their parameters are one."""
    magnitudes = {id(module.magnitude) for module in calibrations(model).values()}
    groups = [(group, [id(one) in magnitudes for one in group["params"]]) for group in optimizer.param_groups]
    return [(group, chosen) for group, chosen in groups if any(chosen) and group.get("weight_decay")]


def require_finite_settings(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a learning rate, weight decay or the like that is NaN or infinite.

    Raises:
        InputError: names it.
    """
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, float) and not isfinite(value):
                raise InputError(f"expected a finite number as the optimizer's {name}, got {value}; correct the config")


def require_finite_loss(loss: float, iteration: int) -> None:
    """Stop a run at its first loss that is NaN or infinite, before its numbers reach a checkpoint.

    Raises:
        InputError: this is it.
    """
    if not isfinite(loss):
        raise InputError(
            f"expected a finite loss, got {loss} at iteration {iteration}, and stopped; the last checkpoint is from "
            "before: resume it with a lower learning rate and gradients clipped, and look at the data of that iteration"
        )


class StageTwoRun:
    """Watches a run of stage two: nothing but the calibrations changes, and the confidence does not collapse.

    Args:
        model: frozen but for its calibrations.
        optimizer: of the run; weight decay on a magnitude is refused.
        advice: what to do in this host when the confidence collapses, for the warning.
        threshold: of a batch's mean confidence; below it magnitude and margin hardly get gradients any more.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, advice: str, threshold: float = 0.05
    ) -> None:
        if _decaying(optimizer, model):
            raise InputError(
                "expected no weight decay on the magnitude, whose identity is 1 and not 0; build the optimizer as the "
                "shipped configs do, or call disalign.stage_two.keep_magnitude_from_decay(optimizer, model)"
            )
        self._model, self._advice, self._threshold = model, advice, threshold
        self._warned = False
        self._before = self._fingerprints()

    def _fingerprints(self) -> dict[str, str]:
        return fingerprints(frozen_tensors(self._model, trained_parts(self._model)))

    def warning(self, iteration: int) -> str | None:
        """After a step: a sentence, once, when the mean confidence of a batch has collapsed (docs/deviations.md)."""
        for calibration in () if self._warned else calibrations(self._model).values():
            mean = calibration.statistics().get("confidence_mean")
            if mean is not None and float(mean) < self._threshold:
                self._warned = True
                return (
                    f"the mean confidence fell to {float(mean):.3f} at iteration {iteration}: magnitude and margin "
                    f"hardly get gradients any more and stage two may end as stage one; {self._advice}"
                )
        return None

    def finish(self) -> str:
        """After the last step: how many frozen tensors are what they were.

        Raises:
            RuntimeError: some changed.
        """
        refuse_changes(self._before, self._fingerprints())
        count = len(self._before)
        return f"{count} of {count} frozen tensors are bit-identical to what this run started from"


def require_own_folder(
    folder: str | os.PathLike[str],
    checkpoints: Iterable[str | os.PathLike[str]],
    calibrated: bool,
    option: str,
    load: Callable[[str], Any] = load_file,
) -> None:
    """Refuse a folder for a new run (``option`` names it) whose checkpoints would replace those of the other stage.

    ``checkpoints`` are those that the run could replace or continue; missing and unreadable files do not count.
    """
    ours, theirs = ("two", "one") if calibrated else ("one", "two")
    for path in dict.fromkeys(os.fspath(path) for path in checkpoints):
        try:
            other = is_calibrated(state_dict_of(load(path))) != calibrated
        except InputError:
            continue
        if other:
            raise InputError(
                f"expected a folder of stage {ours}'s own as {option}, got {os.fspath(folder)!r} with a checkpoint of "
                f"stage {theirs} ({path!r}), which has the same names; give another {option}"
            )


def require_same_classes(
    expected: Sequence[str] | None, found: Sequence[str] | None, where: str, whose: str = "the training set"
) -> None:
    """Refuse classes in ``where`` of other names or in another order than ``whose``; unknown ones are not compared."""
    if not expected or not found or list(expected) == list(found):
        return
    pairs = enumerate(zip(found, expected, strict=False))
    differing = [f"class {label} is {theirs!r}, not {ours!r}" for label, (theirs, ours) in pairs if theirs != ours]
    got = f"but {len(differing)} differ" if len(found) == len(expected) else f"got {len(found)}"
    raise InputError(
        f"expected the {len(expected)} classes of {whose} in {where}, in the same order, {got}"
        f"{': ' if differing else ''}{some(differing, 3)}; give both the same classes"
    )
