"""The strict hand-over from stage one to stage two."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, some
from .io import load_file

#: Tensors that a checkpoint may hold in vain: BatchNorm's counters, which a frozen BatchNorm does not have.
COUNTERS = "*.num_batches_tracked"


def state_dict_of(checkpoint: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint: under ``"state_dict"`` or ``"model"`` or flat, without DDP's ``module.``."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    entries = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise InputError("expected a state dict of tensors in the checkpoint, got none; is it a model's checkpoint?")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def require_tensors(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    what: str,
    ignorable: Sequence[str] = (),
    where: str = "",
) -> list[str]:
    """Refuse a state dict that lacks one of the target's tensors, or has one mis-shaped, not finite or unknown.

    Args:
        source: the state dict.
        target: the model's tensors that it must hold.
        what: they are, and ``where`` the state dict is from, for the message (``" in 'one.pth'"``).
        ignorable: patterns (as in ``fnmatch``) of keys that ``source`` may hold in vain.

    Returns:
        The ignored keys.
    """
    missing = [name for name in target if name not in source]
    if missing:
        raise InputError(
            f"expected all {len(target)} {what}{where}, but it lacks {len(missing)}: {some(missing)}; is it a "
            "checkpoint of this very model?"
        )
    shapes = [(name, list(source[name].shape), list(tensor.shape)) for name, tensor in target.items()]
    misshaped = [f"{name} ({found}, not {expected})" for name, found, expected in shapes if found != expected]
    if misshaped:
        raise InputError(
            f"expected {what} of the model's shapes{where}, but got {len(misshaped)} of others: {some(misshaped)}; is "
            "it trained for another number of classes or another width?"
        )
    surplus = [name for name in source if name not in target]
    unknown = [name for name in surplus if not any(fnmatchcase(name, pattern) for pattern in ignorable)]
    if unknown:
        raise InputError(
            f"expected no tensors beyond the model's{where}, but got {len(unknown)}: {some(unknown)}; is it a "
            "checkpoint of another model or classifier type?"
        )
    broken = [name for name in target if source[name].is_floating_point() and not source[name].isfinite().all()]
    if broken:
        raise InputError(
            f"expected finite numbers{where}, but got NaN or infinity in {some(broken)}; use an earlier one"
        )
    return surplus


@dataclass(frozen=True)
class HandOver:
    """What :func:`load_stage_one` did: names of the tensors loaded, new (at the identity) and left out."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        text = f"loaded {len(self.loaded)} of {len(self.loaded)} frozen tensors"
        text += f"; new, starting at the identity: {', '.join(self.new)}"
        return text + (f"; not needed: {', '.join(self.ignored)}" if self.ignored else "")


def load_stage_one(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    name: str | None = None,
) -> HandOver:
    """Load a stage-one checkpoint into a stage-two model, completely or not at all.

    Args:
        model: the frozen stage-two model (see :func:`disalign.freeze_except`); what trains is new in stage two. Its
            attribute ``not_needed``, if it has one, lists patterns (as in ``fnmatch``) of keys that a stage-one
            checkpoint may hold in vain, beside BatchNorm's counters.
        checkpoint: a file, or a loaded checkpoint or state dict.
        name: of the file that a loaded checkpoint comes from, for the messages.

    Returns:
        What was loaded, what is new, what was left out.

    Raises:
        InputError: a frozen tensor is missing, mis-shaped, or not finite; a calibration in the checkpoint; or a key
            that the model does not know; or a model that is not frozen. The model is then unchanged.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        name = os.fspath(checkpoint)
        checkpoint = load_file(checkpoint)
    where = f" in {name!r}" if name else ""
    source = state_dict_of(checkpoint)
    target = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new = {key for key, parameter in parameters.items() if parameter.requires_grad}
    frozen = {key: tensor for key, tensor in target.items() if key not in new}

    if len(new) == len(parameters):
        raise InputError("expected a frozen model, but all of its parameters train; call freeze_except first")
    calibrated = sorted(new & set(source))
    if calibrated:
        raise InputError(
            f"expected a stage-one checkpoint{where}, but it already holds a calibration ({some(calibrated)}); give "
            "the checkpoint that stage two started from"
        )
    surplus = require_tensors(source, frozen, "frozen tensors", (COUNTERS, *getattr(model, "not_needed", ())), where)
    with torch.no_grad():
        for key, tensor in frozen.items():
            tensor.copy_(source[key])
    return HandOver(tuple(frozen), tuple(key for key in target if key in new), tuple(surplus))
