"""Training pixels and images per class, from folders of label images."""

import functools
import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from disalign.errors import InputError, some

from .count_files import Unreadable, below, checksum_of_lines, number_of_classes, read_each, require_readable

#: What reduce_zero_label makes of the label 0.
REDUCED = 255


def count_masks(
    folders: Sequence[str],
    num_classes: int | None = None,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    suffix: str = ".png",
    workers: int = 0,
    skip_corrupt: bool = False,
) -> dict:
    """Count label images with one label per pixel, as ``disalign_mmseg`` does; a palette's index is the label.

    Args:
        folders: all files below that end in ``suffix`` count, but those whose names begin with a dot; several add up.
        num_classes: K; default: the largest label + 1.
        ignore_index: the label that is left out; it wins over a class of the same number.
        reduce_zero_label: 0 becomes 255, which is left out, and each other label one less, as in MMSegmentation.
        suffix: MMSegmentation's ``seg_map_suffix``.
        workers: threads that read.
        skip_corrupt: leave out files that can't be read.

    Returns:
        ``unit``, ``files`` (counted ones), ``images`` (the same), ``total_pixels`` (ignored ones too), ``skipped``,
        ``ignore_index``, ``reduce_zero_label``, ``checksum``, ``class_names`` (none), ``train_counts`` (pixels) and
        ``image_counts`` (files that show the class) of the K classes. The checksum is that of the counted files'
        SHA-256 and names, sorted by name (:func:`.count_files.checksum_of_lines`), folder after folder.

    Raises:
        InputError: no such folder, no such files in it, files that can't be read, anything but one label per pixel,
            labels outside [0, K) that are not ignored, or nothing but ignored pixels.
    """
    if reduce_zero_label and ignore_index != REDUCED:
        raise InputError(
            f"expected the ignored label {REDUCED} with reduce_zero_label, which makes it of 0, got {ignore_index}"
        )
    found = [(folder, path) for folder in folders for path in _label_images(folder, suffix)]
    histogram_of = functools.partial(_histogram, reduce_zero_label=reduce_zero_label)
    pixels, images, lines, unreadable = Counter(), Counter(), [], []
    with read_each(histogram_of, [path for _, path in found], workers, "masks") as outcomes:
        for (folder, path), outcome in zip(found, outcomes, strict=True):
            name = below(folder, path)
            if isinstance(outcome, str):
                unreadable.append(Unreadable(name, outcome))
                continue
            digest, histogram = outcome
            _check_labels(histogram, num_classes, ignore_index, reduce_zero_label, path)
            lines.append((digest, name))
            pixels.update(histogram)
            images.update(histogram.keys())
    where = some(map(repr, folders))
    require_readable(unreadable, len(found), where, skip_corrupt)
    total_pixels = pixels.total()
    del pixels[ignore_index]
    if not pixels:
        raise InputError(f"expected labelled pixels in {where}, but all are {ignore_index}, which is ignored")
    num_classes = number_of_classes(max(pixels), num_classes, where)
    return {
        "unit": "pixels",
        "files": len(lines),
        "images": len(lines),
        "total_pixels": total_pixels,
        "skipped": [one._asdict() for one in unreadable],
        "ignore_index": ignore_index,
        "reduce_zero_label": reduce_zero_label,
        "checksum": checksum_of_lines(lines),
        "class_names": [],
        "train_counts": [pixels[label] for label in range(num_classes)],
        "image_counts": [images[label] if label != ignore_index else 0 for label in range(num_classes)],
    }


def _label_images(folder, suffix):
    if not os.path.isdir(folder):
        raise InputError(f"expected a folder of label images at {folder!r}, but there is none")
    paths = [
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith(suffix) and not name.startswith(".")
    ]
    if not paths:
        raise InputError(
            f"expected label images {'*' + suffix!r} in {folder!r}, got none; name the end of their names with --suffix"
        )
    return sorted(paths, key=lambda path: below(folder, path))


def _histogram(path, reduce_zero_label):
    """A file's SHA-256, and its pixels of each label; or what is wrong."""
    with open(path, "rb") as file:
        content = file.read()
    if not content:
        return "empty"
    with Image.open(io.BytesIO(content)) as image:
        labels = np.asarray(image)
        mode = image.mode
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise InputError(
            f"expected one whole label per pixel in {path!r}, got an image of mode {mode}; save the labels as a "
            "grey-scale or palette image (photographs: give a folder with one folder per class)"
        )
    if labels.dtype.kind != "i" and labels.dtype.itemsize <= 2:
        counts = np.bincount(labels.ravel())
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(labels, return_counts=True)
    histogram = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if reduce_zero_label:
            value = REDUCED if value in (0, REDUCED) else value - 1
        histogram[value] += count
    return hashlib.sha256(content).hexdigest(), histogram


def _check_labels(histogram, num_classes, ignore_index, reduce_zero_label, path):
    wrong = {
        label: count
        for label, count in sorted(histogram.items())
        if label != ignore_index and (label < 0 or (num_classes is not None and label >= num_classes))
    }
    if wrong:
        upper = "or more" if num_classes is None else f"to {num_classes - 1}"
        reduced = " (with 1 taken off, as --reduce-zero-label asks)" if reduce_zero_label else ""
        raise InputError(
            f"expected labels 0 {upper}, or {ignore_index} for ignored pixels, in {path!r}, but "
            f"{sum(wrong.values())} pixels are not: {some(f'{count} are {label}' for label, count in wrong.items())}"
            f"{reduced}; correct the file, or the options"
        )
