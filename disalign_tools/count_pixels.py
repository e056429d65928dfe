"""Training pixels and images per class, from folders of label images."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from disalign.errors import InputError, some
from disalign.io.images import count_labels, mask_files, read_mask, require_labels

from .count_files import read_files

#: What reduce_zero_label makes of the label 0.
REDUCED = 255


def count_masks(
    folders: Sequence[str],
    num_classes: int | None = None,
    ignore_index: int = REDUCED,
    reduce_zero_label: bool = False,
    suffix: str = ".png",
    workers: int = 0,
    skip_corrupt: bool = False,
) -> dict:
    """Count label images with one label per pixel, as ``disalign_mmseg`` does; a palette's index is the label.

    The checksum is that of the files' SHA-256, see :func:`.count_files.read_files`.

    Args:
        folders: the files of :func:`disalign.io.images.mask_files` count.
        num_classes: K; default: the largest label + 1.
        ignore_index: the label that is left out; it wins over a class of the same number.
        reduce_zero_label: 0 becomes 255, which is left out, and each other label one less, as in MMSegmentation.
        suffix: MMSegmentation's ``seg_map_suffix``.
        workers: threads that read.
        skip_corrupt: leave out files that can't be read.

    Raises:
        InputError: no such folder, no such files in it, files that can't be read, anything but one label per pixel,
            labels outside [0, K) that are not ignored, or nothing but ignored pixels.
    """
    if reduce_zero_label and ignore_index != REDUCED:
        raise InputError(
            f"expected the ignored label {REDUCED} with reduce_zero_label, which makes it of 0, got {ignore_index}"
        )
    files = [(folder, path) for folder in folders for path in mask_files(folder, suffix)]
    note = " (with 1 taken off, as --reduce-zero-label asks)" if reduce_zero_label else ""
    pixels: Counter[int] = Counter()
    images: Counter[int] = Counter()
    total_pixels = 0

    def read(path):
        content = Path(path).read_bytes()
        labels = read_mask(path, content)
        if reduce_zero_label:
            labels = np.where((labels == 0) | (labels == REDUCED), REDUCED, labels.astype(np.int64) - 1)
        require_labels(labels, num_classes, ignore_index, path, note)
        return hashlib.sha256(content).hexdigest(), (count_labels(labels, ignore_index), labels.size)

    def add(_, found):
        nonlocal total_pixels
        counts, size = found
        present = counts.nonzero()[0]
        pixels.update(dict(zip(present.tolist(), counts[present].tolist(), strict=True)))
        images.update(present.tolist())
        total_pixels += size

    read_ones = read_files(files, read, add, workers, skip_corrupt, "masks")
    if not pixels:
        where = some(map(repr, folders))
        raise InputError(f"expected labelled pixels in {where}, but all are {ignore_index}, which is ignored")
    labels = range(max(pixels) + 1 if num_classes is None else num_classes)
    return {
        "unit": "pixels",
        **read_ones,
        "total_pixels": total_pixels,
        "ignore_index": ignore_index,
        "reduce_zero_label": reduce_zero_label,
        "class_names": [],
        "train_counts": [pixels[label] for label in labels],
        "image_counts": [images[label] for label in labels],
    }
