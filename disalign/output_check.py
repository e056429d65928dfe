"""Whether the calibrated classifier's scores are what the model returns, seen at its first forward."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError


class Unchecked(nn.Module):
    """Mixin before the class of a model until its first eager forward, which compares and takes the mixin away.

    (A class, since a hook would not be scripted, and a changed ``forward`` not be copied or pickled.)
    """

    unchecked_classifier: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        scores: list[Tensor] = []
        layer = self.get_submodule(self.unchecked_classifier)
        handle = layer.register_forward_hook(lambda module, inputs, output: scores.append(output))
        try:
            output = super().__call__(*args, **kwargs)
        finally:
            handle.remove()
        if scores:  # else this call was for features only
            _require_same(scores[-1], output, self.unchecked_classifier, type(self).__name__)
            forget_check(self)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[1],), super().__reduce_ex__(protocol)[2]


def check_output(model: nn.Module, name: str) -> None:
    """Let a model's first forward prove that the scores of the classifier of this name are what it returns, in place.

    Raises:
        InputError: at that forward, if the scores, flattened, differ from the output (a tensor, its ``logits``, or the
            first of a tuple) by more than a constant per sample.
    """
    if name:
        model.__class__ = _unchecked(type(model))  # type: ignore[arg-type]  # mypy thinks that it can't be hashed
        model.unchecked_classifier = name  # type: ignore[assignment]  # a plain attribute


def forget_check(model: nn.Module) -> None:
    """Take the comparison away, in place, if there is one."""
    if isinstance(model, Unchecked):
        model.__class__ = type(model).__bases__[1]
        del model.unchecked_classifier


@functools.cache
def _unchecked(kind: Any) -> type[nn.Module]:
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (Unchecked, kind), names)


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    unchecked = _unchecked(kind)  # type: ignore[arg-type]
    return unchecked.__new__(unchecked)


def _require_same(scores: Tensor, output: Any, name: str, kind: str) -> None:
    returned = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    returned = returned[0] if isinstance(returned, (tuple, list)) and returned else returned
    if isinstance(returned, Tensor) and returned.numel() == scores.numel() and len(returned) == len(scores):
        ours, theirs = scores.detach().flatten(1).double(), returned.detach().flatten(1).double()
        difference = ours - theirs
        # Half precision, where a model casts its output; NaN is for the loss to refuse.
        tolerance = 1e-2 * theirs.abs().clamp(min=1.0)
        if not ((difference - difference[:, :1]).abs() > tolerance).any():
            return
    got = f"{type(returned).__name__} of shape {list(returned.shape)}" if isinstance(returned, Tensor) else type(output)
    raise InputError(
        f"expected the scores of the classifier {name!r} as the output of {kind}, but it returns another {got}; name "
        "the layer that scores the classes with classifier=..., or leave the comparison out with check=False"
    )
