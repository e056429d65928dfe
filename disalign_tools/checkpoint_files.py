"""Opens a checkpoint of any training loop: its tensors under plain names, and what it says of classes and counts."""

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from disalign import InputError, load_file
from disalign.errors import first_line, some
from disalign.unpickling import records_left_out

#: Entry with the weights -> entry with their moving average: torchvision's references, timm.
AVERAGES = {"model": "model_ema", "state_dict": "state_dict_ema"}
#: Put before every name by DDP and moving averages, and by torch.compile.
PREFIXES = ("module.", "_orig_mod.")
#: What a moving average counts its updates in.
COUNTERS = ("n_averaged", "steps")
#: Entries that are read elsewhere, or say nothing.
KEPT = ("meta", "disalign", "__author__")
#: The parts of a classifier-balancing checkpoint.
HALVES = ("feat_model", "classifier")


@dataclass
class Checkpoint:
    """An opened file.

    Attributes:
        tensors: name -> tensor, on the CPU, without DDP's and others' prefixes.
        meta: what the result keeps beside the tensors: ``dataset_meta`` (classes, palette) and ``disalign`` (counts).
        left_out: other entries of the file.
        notes: sentences for the user.
    """

    tensors: dict[str, Tensor]
    meta: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_checkpoint(path, ema: bool = False, trust: bool = False) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file: torch's (``.pth`` and any other name), a ``.pkl`` of numpy arrays, or ``.safetensors``.
        ema: take the averaged weights of a file that has both.
        trust: unpickle it in full if it holds more than tensors and plain values.

    Raises:
        InputError: it can't be read, needs ``trust``, holds no tensors, or no averaged ones.
    """
    path = os.fspath(path)
    content, notes = _read(path, trust)
    if isinstance(content, nn.Module):  # saved whole, and trusted
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise InputError(f"expected a checkpoint in {path!r}, got a {type(content).__name__}; save the state dict")
    weights, entry = _weights(content, ema, path, notes)
    tensors, left_out = {}, [str(key) for key in content if content is not weights and key not in (entry, *KEPT)]
    for name, value in weights.items():
        if isinstance(value, Mapping) and name in HALVES:
            half = _stripped({key: item for key, item in value.items() if isinstance(item, Tensor)})
            tensors |= {f"{name}.{key}": item for key, item in half.items()}
        elif isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
        else:
            left_out.append(str(name))
    if not tensors:
        raise InputError(f"expected tensors in {path!r}, got none; is it a model's checkpoint?")
    odd = [name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_meta]
    if odd:
        raise InputError(f"expected dense tensors in {path!r}, got sparse or empty ones: {some(odd)}; save them dense")
    return Checkpoint(_stripped(tensors), _metadata(content), left_out, notes)


def _read(path, trust):
    if path.endswith(".safetensors"):
        return _read_safetensors(path), []
    try:
        with records_left_out():
            return load_file(path), []
    except InputError as error:
        if not re.search(r" it (also )?holds ", str(error)):
            raise
        if not trust:
            raise InputError(
                f"{str(error).split(';')[0]}; add --trust-checkpoint if you trust its source, or save its state dict"
            ) from None
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = _arrays_as_tensors(pickle.load(file, encoding="latin1"))  # as --trust-checkpoint asks
        else:
            content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code runs: anything may come
        raise InputError(
            f"expected a checkpoint in {path!r}, but unpickling it in full fails ({first_line(error)}); install what "
            "it was saved with"
        ) from None
    return content, [f"{path!r} was unpickled in full, as --trust-checkpoint asks: its code ran, if it had any"]


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file as load_safetensors
    except ModuleNotFoundError:
        raise InputError(f"expected safetensors to read {path!r}, got none; pip install safetensors") from None
    try:
        return load_safetensors(path)
    except FileNotFoundError:
        raise InputError(f"expected a checkpoint at {path!r}, but there is no such file") from None
    except Exception as error:
        raise InputError(f"expected a whole .safetensors file at {path!r}, but: {first_line(error)}") from None


def _arrays_as_tensors(value):
    if isinstance(value, Mapping):
        return {key: _arrays_as_tensors(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value


def _weights(content, ema, path, notes):
    """The mapping of weights, and the entry that it stands in."""
    averaged = {plain: mean for plain, mean in AVERAGES.items() if isinstance(content.get(mean), Mapping)}
    if isinstance(content.get("ema_state_dict"), Mapping):
        # MMEngine's EMAHook swaps the two on saving: state_dict is the average, ema_state_dict the trained weights.
        entry = "state_dict" if ema else "ema_state_dict"
    elif averaged:
        plain, mean = next(iter(averaged.items()))
        entry = mean if ema else plain
    elif ema:
        raise InputError(f"expected averaged weights in {path!r} for --ema, got none; leave out --ema")
    else:
        entry = next((key for key in ("state_dict_best", "state_dict", "model") if _is_mapping(content, key)), None)
        if entry is None:
            return content, None
        weights = content[entry]
        return (weights["model"] if _is_mapping(weights, "model") else weights), entry
    if not _is_mapping(content, entry):
        raise InputError(f"expected weights under {entry!r} in {path!r}, got none; is the file whole?")
    if not ema:
        notes.append(f"{path!r} also holds averaged weights; --ema takes them")
    return content[entry], entry


def _is_mapping(content, key):
    return isinstance(content.get(key), Mapping)


def _stripped(tensors):
    for prefix in PREFIXES * 2:  # an average of a DDP model has two
        if tensors and all(name.startswith(prefix) for name in tensors if name not in COUNTERS):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _metadata(content):
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else {}
    dataset = {
        "classes": dataset.get("classes") or meta.get("CLASSES"),  # 0.x writes capitals
        "palette": dataset.get("palette") or meta.get("PALETTE"),
    }
    dataset = {key: plain for key, value in dataset.items() if (plain := _plain(value))}
    kept = {"dataset_meta": dataset} if dataset else {}
    # Ours: Detectron2's files have no meta.
    disalign = _plain(meta.get("disalign") or content.get("disalign"))
    return kept | ({"disalign": disalign} if isinstance(disalign, dict) else {})


def _plain(value):
    """Values that ``weights_only`` loads, tuples as lists; None for anything else."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, (str, int, float, bool)) else None
