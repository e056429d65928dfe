"""Training examples per class from folders of files: images by class, and label images."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from disalign.cli import usable_cpus
from disalign.errors import InputError, first_line, some
from disalign.io.images import count_labels, image_tree, mask_files, read_mask, require_labels

try:
    from PIL import Image, UnidentifiedImageError
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"counting needs Pillow and tqdm, but there is no {error.name}; install them with pip install pillow tqdm",
        name=error.name,
    ) from error

#: The label into which reduce_zero_label turns 0.
REDUCED = 255


def count_folders(
    folders: Sequence[str],
    num_classes: int | None = None,
    workers: int | None = None,
    verify: bool = False,
    skip_corrupt: bool = False,
) -> dict:
    """Count images in folders of one folder per class; the labels are those of ``disalign_cls``'s ``FolderDataset``.

    Each image must exist and have at least one byte; only ``verify`` checks whether it is complete. The checksum is
    that of the images' sizes in bytes.
    """
    names: list[str] = []
    files: list[tuple[str, str]] = []
    labels: list[int] = []
    for folder in folders:
        found, images = image_tree(folder)
        names = names or found
        if found != names:
            raise InputError(
                f"expected the class folders of {folders[0]!r} in {folder!r} too, but {some(set(names) ^ set(found))} "
                "differ; add empty ones"
            )
        files += [(folder, path) for path, _ in images]
        labels += [label for _, label in images]
    if num_classes not in (None, len(names)):
        raise InputError(
            f"expected {num_classes} class folders in {folders[0]!r}, as --num-classes says, got {len(names)}; add "
            "empty ones for classes without images"
        )
    if not files:
        raise InputError(f"expected images in the class folders of {some(map(repr, folders))}, got none")
    counts: Counter[int] = Counter()

    def read(path):
        if verify:
            with Image.open(path) as image:
                image.load()
        return os.stat(path).st_size, None

    def add(place, _):
        counts[labels[place]] += 1

    read_ones = _read_files(files, read, add, workers, skip_corrupt, "images")
    train_counts = [counts[label] for label in range(len(names))]
    return {"unit": "images", **read_ones, "class_names": names, "train_counts": train_counts}


def count_masks(
    folders: Sequence[str],
    num_classes: int | None = None,
    ignore_index: int = REDUCED,
    reduce_zero_label: bool = False,
    suffix: str = ".png",
    workers: int | None = None,
    skip_corrupt: bool = False,
) -> dict:
    """Count label images with one label per pixel, as ``disalign_mmseg`` does; a palette's index is the label.

    K is ``num_classes``, or the largest label + 1. ``ignore_index`` is left out, even if a class has the same number.
    ``reduce_zero_label`` turns 0 into 255, which is left out, and subtracts 1 from the others, as in MMSegmentation.
    The checksum is that of the files' SHA-256.
    """
    if reduce_zero_label and ignore_index != REDUCED:
        raise InputError(
            f"expected the ignored label {REDUCED} with reduce_zero_label, which turns 0 into it, got {ignore_index}"
        )
    files = [(folder, path) for folder in folders for path in mask_files(folder, suffix)]
    note = " (with 1 taken off, as --reduce-zero-label asks)" if reduce_zero_label else ""
    pixels: Counter[int] = Counter()
    images: Counter[int] = Counter()
    sizes: list[int] = []

    def read(path):
        content = Path(path).read_bytes()
        labels = read_mask(path, content)
        if reduce_zero_label:
            labels = np.where((labels == 0) | (labels == REDUCED), REDUCED, labels.astype(np.int64) - 1)
        require_labels(labels, num_classes, ignore_index, path, note)
        return hashlib.sha256(content).hexdigest(), (count_labels(labels, ignore_index), labels.size)

    def add(_, found):
        counts, size = found
        present = counts.nonzero()[0]
        pixels.update(dict(zip(present.tolist(), counts[present].tolist(), strict=True)))
        images.update(present.tolist())
        sizes.append(size)

    read_ones = _read_files(files, read, add, workers, skip_corrupt, "masks")
    if not pixels:
        where = some(map(repr, folders))
        raise InputError(f"expected labelled pixels in {where}, but all are {ignore_index}, which is ignored")
    labels = range(max(pixels) + 1 if num_classes is None else num_classes)
    return {
        "unit": "pixels",
        **read_ones,
        "total_pixels": sum(sizes),
        "ignore_index": ignore_index,
        "reduce_zero_label": reduce_zero_label,
        "class_names": [],
        "train_counts": [pixels[label] for label in labels],
        "image_counts": [images[label] for label in labels],
    }


def _read_files(
    files: Sequence[tuple[str, str]], read: Callable, add: Callable, workers: int | None, skip_corrupt: bool, kind: str
) -> dict:
    """Read each file in threads (Pillow decodes without Python's lock), with a progress bar on a terminal.

    Args:
        files: for each, the given folder and the path.
        read: path -> the file's entry in the checksum (its SHA-256 or size), and the value for ``add``. An
            :class:`InputError` stops the command; any other error makes the file a broken one.
        add: called with a file's index in ``files`` and the value read, in order.

    Returns:
        The record's ``files``, ``images``, ``skipped`` and ``checksum``: SHA-256 of a text with a line ``what  name``
        for each file read, as sha256sum prints it, sorted by name, folder after folder.
    """

    def outcome(path):
        try:
            return read(path) if os.stat(path).st_size else "empty"
        except InputError:
            raise
        except UnidentifiedImageError:
            return "not an image"
        except Exception as error:  # a broken file can raise anything in a reader
            return getattr(error, "strerror", None) or first_line(error)

    pool = ThreadPoolExecutor(min(8, usable_cpus()) if workers is None else workers or 1)
    lines: dict[str, list[tuple[str, object]]] = {folder: [] for folder, _ in files}
    skipped: list[dict] = []
    try:
        outcomes = pool.map(outcome, [path for _, path in files])
        with tqdm(outcomes, desc=kind, total=len(files), unit="file", disable=None, leave=False) as bar:
            for place, ((folder, path), found) in enumerate(zip(files, bar, strict=True)):
                name = os.path.relpath(path, folder).replace(os.sep, "/")
                if isinstance(found, str):
                    skipped.append({"file": name, "reason": found})
                else:
                    lines[folder].append((name, found[0]))
                    add(place, found[1])
    finally:
        pool.shutdown(cancel_futures=True)
    read_ones = len(files) - len(skipped)
    if not read_ones or (skipped and not skip_corrupt):
        hint = "" if skip_corrupt else ", or leave them out with --skip-corrupt"
        raise InputError(
            f"expected whole files in {some(map(repr, lines))}, but {len(skipped)} of {len(files)} can't be read: "
            f"{named(skipped)}; fetch them again{hint}"
        )
    text = "".join(f"{what}  {name}\n" for one in lines.values() for name, what in sorted(one))
    checksum = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return {"files": read_ones, "images": read_ones, "skipped": skipped, "checksum": checksum}


def named(skipped: Sequence[dict]) -> str:
    """The first files that can't be read, and why, for a sentence."""
    return some((f"{one['file']} ({one['reason']})" for one in skipped), 3)
