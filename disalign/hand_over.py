"""The strict hand-over from stage one to stage two."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, some
from .io import load_file

#: Tensors that a checkpoint may hold in vain: BatchNorm's counters, which a frozen BatchNorm does not have.
COUNTERS = "*.num_batches_tracked"

#: Entries that training loops keep the weights in.
ENTRIES = ("state_dict_best", "state_dict", "model", "params")
#: Entries of a model in two parts (MiSLAS), whose names do not overlap.
PARTS = ("state_dict_model", "state_dict_classifier")


def weights_of(content: Mapping[Any, Any], others: Iterable[str] = ()) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """The mapping of weights in a checkpoint, and the entries that it stands in: none where the weights lie flat.

    Args:
        content: of the file.
        others: entries with weights that are not meant.

    Raises:
        InputError: several entries hold weights, under names that say nothing.
    """
    entries = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    if entries.keys() >= {*PARTS}:
        return {**entries[PARTS[0]], **entries[PARTS[1]]}, PARTS
    named = [key for key in ENTRIES if key in entries][:1]
    if not named and not holds_tensors(content):
        # Whatever they call it: {"net": ...}, {"model_state_dict": ...}.
        named = [key for key, value in entries.items() if key not in others and holds_tensors(value)]
    if len(named) > 1:
        raise InputError(f"expected one set of weights, got several: {some(named)}; save one of them alone")
    if not named:
        return content, ()
    weights = entries[named[0]]
    # It may be wrapped twice.
    return (weights if holds_tensors(weights) else weights_of(weights, others)[0]), (named[0],)


def holds_tensors(weights: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in weights.values())


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DDP (``module.``) and ``torch.compile`` (``_orig_mod.``) put into the names."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def state_dict_of(checkpoint: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whatever its training loop and wrappers call them (:func:`weights_of`).

    Raises:
        InputError: it holds no tensors, several sets of them, or some that are not stored in full.
    """
    weights = weights_of(checkpoint)[0] if isinstance(checkpoint, Mapping) else {}
    tensors = {key: value for key, value in weights.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise InputError("expected a state dict of tensors in the checkpoint, got none; is it a model's checkpoint?")
    require_dense(tensors)
    return plain_names(tensors)


def require_dense(tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Refuse tensors that are not stored in full: sparse, quantized, without data, or larger than their data.

    Raises:
        InputError: names them.
    """
    odd = [name for name, tensor in tensors.items() if not _is_dense(tensor)]
    if odd:
        raise InputError(f"expected dense tensors{where}, got others: {some(odd)}; save them dense and contiguous")


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    # A few repeated bytes, as of buffers of positions, do no harm.
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), 1 << 20)


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
    other = [name for name in target if _kind(source[name]) != _kind(target[name])]
    if other:
        raise InputError(
            f"expected {what} of the model's kinds of numbers{where}, got others: "
            f"{some(f'{name} of {source[name].dtype}' for name in other)}; save the weights as floating-point numbers"
        )
    require_finite({name: source[name] for name in target}, where)
    return surplus


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def require_finite(tensors: Mapping[str, Tensor], where: str, advice: str = "use an earlier one") -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: names the tensors.
    """
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"expected finite numbers{where}, but got NaN or infinity in {some(broken)}; {advice}")


def _below_a_wrapper(source: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the one module that all names begin with, if the model knows none of them (Lightning's ``model.``)."""
    while source.keys().isdisjoint(target) and len({name.partition(".")[:2] for name in source}) == 1:
        inner = {name.partition(".")[2]: tensor for name, tensor in source.items()}
        if "" in inner:
            break
        source = inner
    return source


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
        model: the frozen stage-two model (see :func:`disalign.freeze_except`); trainable parameters are new in stage
            two. Its optional attribute ``not_needed`` lists patterns (as in ``fnmatch``) of unused keys that a
            stage-one checkpoint may contain, besides BatchNorm's counters.
        checkpoint: a file, or a loaded checkpoint or state dict.
        name: file name of a loaded checkpoint, for messages.

    Returns:
        The names of loaded, new and ignored tensors.

    Raises:
        InputError: a frozen tensor is missing, has another shape or is not finite; the checkpoint holds a calibration
            or an unknown key; or the model is not frozen. The model is then unchanged.

    Examples:
        >>> checkpoint = nn.Linear(4, 3).state_dict()
        >>> model, loss = disalign.wrap_classifier(nn.Linear(4, 3), class_counts=[100, 10, 1], confidence="one")
        >>> print(disalign.load_stage_one(model, checkpoint))
        loaded 2 of 2 frozen tensors; new, starting at the identity: calibration.magnitude, calibration.margin
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        name = os.fspath(checkpoint)
        checkpoint = load_file(checkpoint)
    where = f" in {name!r}" if name else ""
    target = model.state_dict()
    source = _below_a_wrapper(state_dict_of(checkpoint), target)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new = {key for key, parameter in parameters.items() if parameter.requires_grad}
    # Files from before BatchNorm counted its batches lack all counters, and nothing reads them.
    uncounted = not any(fnmatchcase(key, COUNTERS) for key in source)
    frozen = {
        key: tensor
        for key, tensor in target.items()
        if key not in new and not (uncounted and fnmatchcase(key, COUNTERS))
    }

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
