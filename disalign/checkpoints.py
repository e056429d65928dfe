"""Safe files, and the strict hand-over from stage one to stage two."""

import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .errors import InputError, first_line, some
from .unpickling import load_arrays

#: Keys of a stage-one file that stage two has no use for; an adapter may pass its own list.
IGNORABLE = ("*.num_batches_tracked", "auxiliary_head.*", "pixel_*", "*anchor*")

_REFUSED = "re-save it with torch.save(model.state_dict(), ...), or convert it, if you trust its source"


@contextmanager
def atomic_file(path, mode: str = "wb"):
    """Open a file that appears under ``path`` only once it is whole: written beside it, then renamed.

    Raises:
        InputError: it can't be written (no such place, read-only, disk full); what was at ``path`` is still there.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    temporary = None
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
        with os.fdopen(descriptor, mode) as file:
            yield file
        os.chmod(temporary, 0o666 & ~_umask())  # as any new file; mkstemp's is private
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            os.unlink(temporary)
        # torch.save wraps it in a RuntimeError.
        reason = error.__context__ if type(error) is RuntimeError else error
        if isinstance(reason, OSError):
            raise InputError(
                f"expected a place to write {path!r}, but: {reason.strerror or first_line(reason)}; free it, or give "
                "another"
            ) from error
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_json(path, value) -> None:
    """Write JSON (NaN refused), whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_file(path, "w") as file:
        file.write(text + "\n")


def load_file(path) -> dict:
    """Read a checkpoint without ever running code from it.

    Torch files are read with ``weights_only``; a ``.pkl`` of numpy arrays (Detectron2's model zoo) by
    :func:`disalign.unpickling.load_arrays`. A ``.pkl`` may be either: its content tells.

    Args:
        path: the file.

    Returns:
        What it holds, on the CPU, numpy arrays as tensors.

    Raises:
        InputError: a missing or truncated file, or one that holds anything but tensors and plain values.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".pkl") and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                content = load_arrays(file)
            if content != torch.serialization.MAGIC_NUMBER:
                return content
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"expected a checkpoint at {path!r}, but there is no such file") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected only tensors and plain values in {path!r}, but {_what_else(path, error)}; {_REFUSED}"
        ) from None
    except Exception as error:  # a broken file can break a reader anywhere
        raise InputError(
            f"expected a checkpoint at {path!r}, but it can't be read ({first_line(error).split('. ')[0]}); is it "
            "truncated or of another format?"
        ) from None


def _what_else(path, error):
    if zipfile.is_zipfile(path):
        return f"it also holds {some(torch.serialization.get_unsafe_globals_in_checkpoint(path))}"
    # torch's own words advise to switch weights_only off; ours keep the name it found.
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"it also holds {found[1]}"
    said = first_line(error)
    return "torch's safe reader can't read it" if said.startswith("Weights only load failed") else said


def state_dict_of(checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint: under ``"state_dict"`` or ``"model"`` or flat, without DDP's ``module.``.

    Raises:
        InputError: it holds no tensors.
    """
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    tensors = (
        {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if isinstance(checkpoint, Mapping)
        else {}
    )
    if not tensors:
        raise InputError("expected a state dict of tensors in the checkpoint, got none; is it a model's checkpoint?")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def require_tensors(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    what: str,
    ignorable: Iterable[str] = (),
    where: str = "",
) -> list[str]:
    """Check that a state dict holds all of the target's tensors, in their shapes, finite, and nothing unknown.

    Args:
        source: the state dict.
        target: the model's tensors that it must hold.
        what: what they are, for the sentence ("frozen tensors").
        ignorable: patterns (as in ``fnmatch``) of keys that ``source`` may hold in vain.
        where: the file, for the sentence.

    Returns:
        The ignored keys.

    Raises:
        InputError: it does not.
    """
    missing = [name for name in target if name not in source]
    if missing:
        raise InputError(
            f"expected all {len(target)} {what}{where}, but it lacks {len(missing)}: {some(missing)}; is it "
            "a checkpoint of this very model?"
        )
    misshaped = [
        f"{name} ({list(source[name].shape)}, not {list(target[name].shape)})"
        for name in target
        if source[name].shape != target[name].shape
    ]
    if misshaped:
        raise InputError(
            f"expected {what} of the model's shapes{where}, but got {len(misshaped)} of others: {some(misshaped)}; is "
            "it trained for another number of classes or another width?"
        )
    ignorable = tuple(ignorable)
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
    checkpoint,
    new: Iterable[str] | None = None,
    ignorable: Iterable[str] = IGNORABLE,
    name: str | None = None,
) -> HandOver:
    """Load a stage-one checkpoint into a stage-two model, completely or not at all.

    Args:
        model: the frozen stage-two model (see :func:`disalign.freeze_except`).
        checkpoint: a file, or a loaded checkpoint or state dict.
        new: names of the tensors that stage two adds; default: whatever trains.
        ignorable: patterns (as in ``fnmatch``) of keys that the checkpoint may hold in vain.
        name: of the file that a loaded checkpoint comes from, for the sentences.

    Returns:
        What was loaded, what is new, what was left out.

    Raises:
        InputError: a frozen tensor is missing, mis-shaped, or not finite; a calibration in the checkpoint; or a key
            that neither the model nor ``ignorable`` knows. The model is then unchanged.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        name = os.fspath(checkpoint)
        checkpoint = load_file(checkpoint)
    where = f" in {name!r}" if name else ""
    source = state_dict_of(checkpoint)
    target = model.state_dict()
    if new is None:
        new = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    new = set(new)
    frozen = [name for name in target if name not in new]

    if not frozen:
        raise InputError("expected a model with frozen tensors, but all of its tensors train; call freeze_except first")
    calibrated = sorted(new & set(source))
    if calibrated:
        raise InputError(
            f"expected a stage-one checkpoint{where}, but it already holds a calibration ({some(calibrated)}); give "
            "the checkpoint that stage two started from"
        )
    surplus = require_tensors(source, {name: target[name] for name in frozen}, "frozen tensors", ignorable, where)
    with torch.no_grad():
        for name in frozen:
            target[name].copy_(source[name])
    return HandOver(tuple(frozen), tuple(name for name in target if name in new), tuple(surplus))
