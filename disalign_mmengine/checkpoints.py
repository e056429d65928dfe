"""Reading MMEngine's checkpoints without ever running code from them."""

import os

import torch
from mmengine.dist import barrier, is_main_process

from disalign import InputError, load_file
from disalign.errors import first_line
from disalign.io.unpickling import records_left_out


def load_checkpoint(source) -> dict:
    """Read a checkpoint of mmengine's, on the CPU, log buffers left out (``weights_only`` stays on).

    Args:
        source: a file, or an http(s) address, whose file torch keeps in its hub folder.

    Raises:
        InputError: see :func:`disalign.load_file`; or a download that fails.
    """
    source = os.fspath(source)
    with records_left_out():
        if not source.startswith(("http://", "https://")):
            return load_file(source)
        try:
            if not is_main_process():
                barrier()  # the main process downloads, the others find the file
            checkpoint = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
            if is_main_process():
                barrier()
            return checkpoint
        except Exception as error:  # network, disk or content
            raise InputError(
                f"expected a checkpoint at {source!r}, but it can't be had ({first_line(error)}); download it and give "
                "the file"
            ) from error


def metadata(checkpoint) -> dict:
    """Its ``meta``, ``{}`` if it has none."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    return meta if isinstance(meta, dict) else {}


def class_names(checkpoint) -> list[str] | None:
    """The classes that it was trained with, as mmengine's or 0.x's checkpoints name them."""
    meta = metadata(checkpoint)
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")
    return list(names) if names else None
