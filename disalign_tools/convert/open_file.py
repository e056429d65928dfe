"""Opens a checkpoint of any training loop: its tensors under plain names, and its classes and counts."""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disalign import InputError, load_file
from disalign.errors import first_line, some
from disalign.hand_over import plain_names, require_dense, weights_of

#: Entries with the moving average of the weights (torchvision's references, timm, d2go, BasicSR).
AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_state", "ema", "params_ema")
#: The update counter of a moving average.
COUNTERS = ("n_averaged", "steps")
#: Entries that are read elsewhere, or not needed.
KEPT = ("meta", "disalign", "__author__")
#: Stored by training loops beside the weights: MMEngine's log buffers.
RECORDS = ("mmengine.logging.history_buffer.HistoryBuffer",)
#: The parts of a classifier-balancing checkpoint.
HALVES = ("feat_model", "classifier")


def open_checkpoint(path: str, ema: bool | None, trust: bool) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Read a file: torch's (``.pth`` and any other name), a ``.pkl`` of numpy arrays, or ``.safetensors``.

    ``ema`` chooses between trained and averaged weights; if it is None, a file with both is refused. A file that can't
    be read otherwise is unpickled in full if ``trust`` is set.

    Returns:
        The tensors, on the CPU, without prefixes such as DDP's; what a result may keep beside them: "dataset_meta"
        (classes, palette) and "disalign" (counts); and the names of everything else in the file.
    """
    if path.endswith(".safetensors"):
        return _opened(_read_safetensors(path), ema, path)
    try:
        return _opened(load_file(path, RECORDS), ema, path)
    except InputError:
        if not trust or not os.path.isfile(path):
            raise
    print(f"note: {path!r} is unpickled in full, as --trust-checkpoint asks: its code runs, if it has any")
    return _opened(_read_in_full(path), ema, path)


def _opened(content, ema, path):
    if not isinstance(content, Mapping):
        raise InputError(f"expected a checkpoint in {path!r}, got a {type(content).__name__}; save the state dict")
    weights, entries = _weights(content, ema, path)
    left_out = [str(key) for key in content if content is not weights and key not in (*entries, *KEPT)]
    values = {}
    for name, value in weights.items():
        if isinstance(value, Mapping) and name in HALVES:
            half = plain_names({str(key): item for key, item in value.items()})
            values |= {f"{name}.{key}": item for key, item in half.items()}
        elif content is not weights or name not in KEPT:
            values[str(name)] = value
    others = [name for name, value in values.items() if not isinstance(value, Tensor | str | float | int | None)]
    if others:
        raise InputError(
            f"expected only tensors among the weights in {path!r}, but {len(others)} are not: {some(others)}; if they "
            "are numpy arrays or modules add --trust-checkpoint if you trust its source, else save the state dict flat"
        )
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name not in COUNTERS}
    if not tensors:
        raise InputError(f"expected tensors in {path!r}, got {some(content) or 'none'}; is it a model's checkpoint?")
    require_dense(tensors, f" in {path!r}")
    meta, lost = _metadata(content)
    return _plain_names(tensors), meta, left_out + [name for name in values if name not in tensors] + lost


def _weights(content, ema, path):
    """The mapping of weights, and the entries that contain it."""
    weights, entries = weights_of(content, (*AVERAGED, *HALVES))
    averaged = next((key for key in AVERAGED if isinstance(content.get(key), Mapping)), None)
    if ema and not averaged:
        raise InputError(f"expected averaged weights in {path!r} for --ema, got none; leave out --ema")
    if averaged == "ema_state_dict" and entries == ("state_dict",) and "message_hub" in content:
        # MMEngine's EMAHook swaps the two on saving: state_dict is the average, ema_state_dict the trained weights.
        averaged, entries, weights = "state_dict", ("ema_state_dict",), content["ema_state_dict"]
    if averaged and (ema is None or not (ema or entries)):
        other = f" or --no-ema for the trained ones ({some(entries)})" if entries else ""
        raise InputError(
            f"expected trained weights alone in {path!r}, got averaged ones; add --ema for the averaged ones "
            f"({averaged}){other}"
        )
    if ema:
        return weights_of({"model": content[averaged]})[0], (averaged,)  # it may be wrapped once more
    return weights, entries


def _plain_names(tensors):
    """Without DDP's, torch.compile's and Lightning's prefixes."""
    tensors = plain_names(tensors)
    if not all(name.startswith("model.") for name in tensors):
        return tensors
    return _plain_names({name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def _read_in_full(path):
    """Unpickled by torch or, if torch did not write the file, by pickle; both run the file's code."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except Exception:
            if zipfile.is_zipfile(path):
                raise
            with open(path, "rb") as file:
                content = pickle.load(file, encoding="latin1")
        return _as_tensors(content)
    except Exception as error:  # the file's own code runs: it may raise anything
        raise InputError(
            f"expected a checkpoint in {path!r}, but unpickling it in full fails ({first_line(error)}); is it whole, "
            "and is what it was saved with installed?"
        ) from None


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file as load_safetensors

        return load_safetensors(path)
    except Exception as error:  # safetensors or the file is missing, or the file is incomplete
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


def _metadata(content):
    """The classes and counts that the result keeps, and the names of what it can't keep."""
    meta = content.get("meta") if isinstance(content.get("meta"), Mapping) else {}
    said = {key: meta[key.upper()] for key in ("classes", "palette") if key.upper() in meta}  # 0.x writes capitals
    if isinstance(meta.get("dataset_meta"), Mapping):
        said |= meta["dataset_meta"]
    counts = meta.get("disalign", content.get("disalign"))  # Detectron2's files have no meta
    dataset = {key: plain for key in ("classes", "palette") if (plain := _plain(said.get(key)))}
    kept = {"dataset_meta": dataset, "disalign": _plain(counts)}
    kept = {key: value for key, value in kept.items() if value and isinstance(value, dict)}
    lost = [f"dataset_meta.{key}" for key in said if key not in dataset]
    return kept, lost + (["disalign"] if counts is not None and "disalign" not in kept else [])


def _plain(value):
    """The value as plain JSON types, which ``weights_only`` loads; None if that is impossible."""
    try:
        return json.loads(json.dumps(value, default=lambda item: item.tolist()))
    except (AttributeError, TypeError, ValueError):
        return None
