"""Reading MMEngine's checkpoints without ever running code from them."""

import os
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from torch import nn

from disalign import InputError, load_file
from disalign.errors import first_line
from disalign.hand_over import require_tensors, state_dict_of
from disalign.io.unpickling import records_left_out

#: What MMEngine keeps in meta and message_hub beside plain values; it only smooths the first log lines after a resume.
LOG_BUFFERS = ("mmengine.logging.history_buffer.HistoryBuffer",)

#: Types of a checkpoint's records, if present.
RECORDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("meta", "meta.dataset_meta", "meta.disalign", "message_hub", "optimizer"), dict),
    **dict.fromkeys(("meta.CLASSES", "meta.dataset_meta.classes", "meta.disalign.class_counts"), (list, tuple)),
    **dict.fromkeys(("meta.epoch", "meta.iter", "meta.seed"), int),
}


def load_checkpoint(source: str | os.PathLike) -> dict:
    """Read an MMEngine checkpoint on the CPU, without its log buffers (``weights_only`` stays on).

    ``source`` is a file, or an http(s) address, whose file torch caches in its hub folder.
    """
    source = os.fspath(source)
    if not source.startswith(("http://", "https://")):
        checkpoint = load_file(source, LOG_BUFFERS)
        _require_types(checkpoint, source)
        return checkpoint
    try:
        if not is_main_process():
            barrier()  # the main process downloads, the others find the file
        with records_left_out(LOG_BUFFERS):
            checkpoint = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        if is_main_process():
            barrier()
        _require_types(checkpoint, source)
        return checkpoint
    except InputError:
        raise
    except Exception as error:  # network, disk or content
        raise InputError(
            f"expected a checkpoint at {source!r}, but it can't be downloaded or read ({first_line(error)}); download "
            "it and give the file"
        ) from error


def load_whole(model: nn.Module, checkpoint: dict, name: str) -> None:
    """Load a checkpoint (``name``: its file's), which must hold exactly the model's tensors, or nothing of it."""
    tensors = state_dict_of(checkpoint)
    try:
        require_tensors(tensors, model.state_dict(), "tensors of the config's model", where=f" in {name!r}")
    except InputError as error:
        hint = "stage one's checkpoint belongs in stage_one=FILE or its own config, a run to resume in its own work_dir"
        raise InputError(f"{error} ({hint})") from None
    model.load_state_dict(tensors)


def _require_types(checkpoint: Any, source: str) -> None:
    """Refuse records of other types than MMEngine writes, before anything relies on them."""
    for place, kind in RECORDS.items():
        value = checkpoint
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, kind):
            raise InputError(
                f"expected a checkpoint as MMEngine writes it in {source!r}, got {type(value).__name__} as its "
                f"{place}; give another, or save its state_dict alone"
            )


def metadata(checkpoint: dict) -> dict:
    """Its ``meta``, ``{}`` if it has none."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    return meta if isinstance(meta, dict) else {}


def class_names(checkpoint: dict) -> list[str] | None:
    """The names of its training classes, from a checkpoint of MMEngine or of mmcv 0.x."""
    meta = metadata(checkpoint)
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    return list(names) if names else None
