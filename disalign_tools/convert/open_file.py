"""Opens a checkpoint of any training loop: its tensors under plain names, and what it says of classes and counts."""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disalign import InputError, load_file
from disalign.errors import first_line, some
from disalign.hand_over import require_dense, weights_of

#: Entries with the moving average of the weights (torchvision's references, timm, d2go, BasicSR).
AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_state", "ema", "params_ema")
#: Put before every name by DDP and moving averages, by torch.compile, by Lightning's modules.
PREFIXES = ("module.", "_orig_mod.", "model.")
#: What a moving average counts its updates in.
COUNTERS = ("n_averaged", "steps")
#: Entries that are read elsewhere, or say nothing.
KEPT = ("meta", "disalign", "__author__")
#: What training loops keep beside the weights: MMEngine's log buffers.
RECORDS = ("mmengine.logging.history_buffer.HistoryBuffer",)
#: The parts of a classifier-balancing checkpoint.
HALVES = ("feat_model", "classifier")


@dataclass
class Checkpoint:
    """An opened file."""

    tensors: dict[str, Tensor]  # name -> tensor, on the CPU, without DDP's and others' prefixes
    meta: dict[str, Any]  # what the result keeps: "dataset_meta" (classes, palette) and "disalign" (counts)
    left_out: list[str]  # other entries of the file
    notes: list[str] = field(default_factory=list)  # sentences for the user


def open_checkpoint(path: str | os.PathLike[str], ema: bool | None = None, trust: bool = False) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file: torch's (``.pth`` and any other name), a ``.pkl`` of numpy arrays, or ``.safetensors``.
        ema: take the averaged weights of a file that has both, or (False) the trained ones; None: refuse such a file.
        trust: unpickle it in full if it can't be used otherwise.
    """
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        return _opened(_read_safetensors(path), ema, path)
    try:
        return _opened(_read_safely(path), ema, path)
    except InputError:
        if not trust or not os.path.isfile(path):
            raise
    checkpoint = _opened(_read_in_full(path), ema, path)
    checkpoint.notes.append(f"{path!r} was unpickled in full, as --trust-checkpoint asks: its code ran, if it had any")
    return checkpoint


def _opened(content, ema, path):
    if not isinstance(content, Mapping):
        raise InputError(f"expected a checkpoint in {path!r}, got a {type(content).__name__}; save the state dict")
    weights, entries = _weights(content, ema, path)
    left_out = [str(key) for key in content if content is not weights and key not in (*entries, *KEPT)]
    tensors = {}
    for name, value in weights.items():
        if isinstance(value, Mapping) and name in HALVES:
            half = _stripped(_tensors(value, path, left_out))
            tensors |= {f"{name}.{key}": tensor for key, tensor in half.items()}
        elif content is not weights or name not in KEPT:
            tensors |= _tensors({name: value}, path, left_out)
    if not tensors:
        raise InputError(f"expected tensors in {path!r}, got {some(content) or 'none'}; is it a model's checkpoint?")
    require_dense(tensors, f" in {path!r}")
    meta, lost = _metadata(content)
    return Checkpoint(_stripped(tensors), meta, left_out + lost)


def _tensors(weights, path, left_out):
    """Those of a mapping of weights; plain values beside them (a version, a counter) are left out, others refused."""
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor | str | float | int | None)]
    if others:
        raise InputError(
            f"expected only tensors among the weights in {path!r}, but {len(others)} are none: {some(others)}; if they "
            "are numpy arrays or modules add --trust-checkpoint if you trust its source, else save the state dict flat"
        )
    left_out += [str(name) for name in weights if str(name) not in tensors]
    return tensors


def _read_safely(path):
    try:
        return load_file(path, RECORDS)
    except InputError as error:
        if not isinstance(error.__context__, pickle.UnpicklingError) and not zipfile.is_zipfile(path):
            raise  # missing or truncated; a whole archive, as TorchScript's, may be read with trust
        raise InputError(
            f"{str(error).split(';')[0]}; add --trust-checkpoint if you trust its source, or save its state dict"
        ) from None


def _read_in_full(path):
    """Unpickled by torch or, what torch did not write, by pickle; both run the file's code."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except Exception:
            if zipfile.is_zipfile(path):
                raise
            with open(path, "rb") as file:
                content = pickle.load(file, encoding="latin1")
        return _as_tensors(content)
    except Exception as error:  # the file's own code runs: anything may come
        raise InputError(
            f"expected a checkpoint in {path!r}, but unpickling it in full fails ({first_line(error)}); is it whole, "
            "and is what it was saved with installed?"
        ) from None


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


def _as_tensors(value):
    """With numpy's arrays as tensors, and modules as their state dicts."""
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return value


def _weights(content, ema, path):
    """The mapping of weights, and the entries that it stands in."""
    entries = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    averaged = next((key for key in AVERAGED if key in entries), None)
    try:
        weights, trained = weights_of(content, (*AVERAGED, *HALVES))
    except InputError as error:
        raise InputError(f"{error} ({path!r})") from None
    if {"state_dict", "ema_state_dict"} <= entries.keys() and "message_hub" in content:
        # MMEngine's EMAHook swaps the two on saving: state_dict is the average, ema_state_dict the trained weights.
        weights, trained, averaged = entries["ema_state_dict"], ("ema_state_dict",), "state_dict"
    if ema and not averaged:
        raise InputError(f"expected averaged weights in {path!r} for --ema, got none; leave out --ema")
    if averaged and not trained and not ema:
        raise InputError(f"expected trained weights in {path!r}, got averaged ones alone ({averaged}); add --ema")
    if averaged and trained and ema is None:
        raise InputError(
            f"expected one set of weights in {path!r}, got two; add --ema for the averaged ones ({averaged}) or "
            f"--no-ema for the trained ones ({trained[0]})"
        )
    return (weights_of(entries[averaged])[0], (averaged,)) if ema else (weights, trained)


def _stripped(tensors):
    for prefix in PREFIXES * 2:  # an average of a DDP model has two
        if tensors and all(name.startswith(prefix) for name in tensors if name not in COUNTERS):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _metadata(content):
    """What the result keeps, and the names of what it can't keep of the classes and the counts."""
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    said = {key: meta[key.upper()] for key in ("classes", "palette") if key.upper() in meta}  # 0.x writes capitals
    if isinstance(meta.get("dataset_meta"), Mapping):
        said |= meta["dataset_meta"]
    counts = meta.get("disalign", content.get("disalign"))  # Detectron2's files have no meta
    dataset = {key: plain for key in ("classes", "palette") if (plain := _plain(said.get(key)))}
    kept = {"dataset_meta": dataset, "disalign": _plain(counts)}
    kept = {key: value for key, value in kept.items() if value and isinstance(value, dict)}
    lost = [f"dataset_meta.{key}" for key, value in said.items() if key not in dataset and value is not None]
    return kept, lost + (["disalign"] if counts is not None and "disalign" not in kept else [])


def _plain(value):
    """The value as JSON holds it, which ``weights_only`` loads; None if JSON can't."""
    try:
        return json.loads(json.dumps(value, default=lambda item: item.tolist()))
    except (AttributeError, TypeError, ValueError):
        return None
