"""Frozen means frozen: parameters, buffers and behaviour."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InputError, some


@dataclass(frozen=True)
class FreezeReport:
    """What trains after :func:`freeze_except`: name -> shape; and how many tensors do not."""

    trainable: dict[str, tuple[int, ...]]
    num_trainable: int
    num_frozen_tensors: int

    def __str__(self) -> str:
        names = ", ".join(f"{name} {list(shape)}" for name, shape in self.trainable.items())
        return f"{self.num_trainable:,} numbers train ({names}); {self.num_frozen_tensors} tensors are frozen"


def _within(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _train(model: nn.Module, kept: tuple[str, ...], mode: bool = True) -> nn.Module:
    """``nn.Module.train`` of a frozen model: only the kept modules follow."""
    type(model).train(model, False)
    for name in kept:
        model.get_submodule(name).train(mode)
    return model


def freeze_except(model: nn.Module, names: Sequence[str], held: Sequence[str] = ("",)) -> FreezeReport:
    """Freeze a model except for the named parts, in place.

    The rest gets no gradients and stays in eval mode through every later ``model.train()``, so that BatchNorm
    statistics stay fixed and dropout stays off; so does the model's own flag, since many models apply dropout in their
    forward. The named modules follow ``train()`` and ``eval()``. Call it before wrapping the model in DDP, which
    then needs no ``find_unused_parameters``.

    Args:
        model: any module.
        names: modules or parameters that are not frozen (``"fc.calibration"``), submodules included.
        held: modules that stay in eval mode, submodules included; default: the model itself. Narrow it if a framework's
            modules choose their training path by the flag (Detectron2's ROI heads).

    Returns:
        What trains.

    Raises:
        InputError: the model has no such name, or nothing is left to train.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        >>> print(disalign.freeze_except(model, ["2"]))
        15 numbers train (2.weight [3, 4], 2.bias [3]); 7 tensors are frozen
        >>> [layer.training for layer in model.train()]
        [False, False, True]
    """
    modules = dict(model.named_modules())
    known = set(modules) | {name for name, _ in model.named_parameters()}
    unknown = [name for name in (*names, *held) if name not in known]
    if unknown:
        raise InputError(f"expected names of modules or parameters to keep training, got {some(unknown)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_within(name, names))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise InputError(f"expected something to train, but {some(names)} holds no parameters")

    for holder in held:
        prefix = f"{holder}." if holder else ""
        kept = tuple(name.removeprefix(prefix) for name in names if name in modules and name.startswith(prefix))
        module = modules[holder]
        # Bound to the module, so that a deep copy (an EMA, say) or a pickle freezes itself.
        module.train = functools.partial(_train, module, kept)
    model.train(model.training)
    return FreezeReport(
        trainable={name: tuple(parameter.shape) for name, parameter in trainable.items()},
        num_trainable=sum(parameter.numel() for parameter in trainable.values()),
        num_frozen_tensors=len(frozen_tensors(model, names)),
    )


def unhold(model: nn.Module) -> None:
    """Let a model follow ``train()`` again, in place; what has no gradients still has none."""
    for module in model.modules():
        override = vars(module).get("train")
        if isinstance(override, functools.partial) and override.func is _train:
            del module.train


def frozen_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """All parameters and buffers (persistent or not) outside the named parts."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if not _within(name, names)}


def fingerprints(tensors: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes."""
    prints = {}
    for name, tensor in tensors.items():
        # Viewed as bytes: numpy has no bfloat16, and -0.0 == 0.0 must not pass for bit-identical.
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        prints[name] = hashlib.sha256(head + data).hexdigest()
    return prints


@contextmanager
def assert_frozen(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Check that no tensor outside the named parts changes by a single bit within the ``with`` block.

    Raises:
        RuntimeError: on leaving, with the tensors that changed.
    """
    before = fingerprints(frozen_tensors(model, names))
    yield
    refuse_changes(before, fingerprints(frozen_tensors(model, names)))


def refuse_changes(before: dict[str, str], after: dict[str, str]) -> None:
    """Compare two :func:`fingerprints`.

    Raises:
        RuntimeError: some differ.
    """
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        raise RuntimeError(f"expected {len(before)} frozen tensors to stay bit-identical, but changed: {some(changed)}")
