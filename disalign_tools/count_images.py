"""Training images per class, from list files or from folders."""

import functools
import os
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from disalign.errors import InputError, some
from disalign.io.annotations import class_folders, image_files, read_list

from .count_files import (
    Unreadable,
    below,
    checksum_of_bytes,
    checksum_of_lines,
    number_of_classes,
    read_each,
    require_readable,
)


def count_lists(lists: Sequence[str], num_classes: int | None = None) -> dict:
    """Count ``path label`` list files, as ImageNet-LT, Places-LT and iNaturalist-2018 have them; several add up.

    The images themselves are not looked for: ``python -m disalign_cls.check`` does.

    Args:
        lists: the files.
        num_classes: K, for classes behind the largest label; default: the largest label + 1.

    Returns:
        ``unit``, ``files``, ``images``, ``checksum`` (:func:`.count_files.checksum_of_bytes`), ``class_names`` (none)
        and ``train_counts`` of the K classes.

    Raises:
        InputError: a missing, empty or malformed file, or a label outside [0, K).
    """
    counts = Counter()
    for path in lists:
        names, labels = read_list(path)
        limit = number_of_classes(max(labels), num_classes, repr(path))
        wrong = [place for place, label in enumerate(labels) if not 0 <= label < limit]
        if wrong:
            upper = "or more" if num_classes is None else f"to {num_classes - 1}"
            raise InputError(
                f"expected labels 0 {upper} in {path!r}, but {len(wrong)} are not: "
                f"{some((f'{labels[place]} of {names[place]}' for place in wrong), 3)}; correct the list, or the "
                "number of classes"
            )
        counts.update(labels)
    total = num_classes or max(counts) + 1
    return {
        "unit": "images",
        "files": len(lists),
        "images": counts.total(),
        "checksum": checksum_of_bytes(lists),
        "class_names": [],
        "train_counts": [counts[label] for label in range(total)],
    }


def count_folders(
    folders: Sequence[str],
    num_classes: int | None = None,
    workers: int = 0,
    verify: bool = False,
    skip_corrupt: bool = False,
) -> dict:
    """Count images in folders of one folder per class; the labels are those of ``disalign_cls``'s ``FolderDataset``.

    Each image must be there and hold at least a byte; whether it is whole only ``verify`` finds out.

    Args:
        folders: each with the same folders in it, one per class, perhaps without any image; several add up.
        num_classes: K, to be checked.
        workers: threads that read.
        verify: decode each image to its end.
        skip_corrupt: leave out images that can't be read.

    Returns:
        ``unit``, ``files`` (counted ones), ``images``, ``skipped``, ``checksum`` (see below), ``class_names`` in
        alphabetical order, and ``train_counts`` of the K classes. The checksum is that of the counted images' sizes in
        bytes and names, sorted by name (:func:`.count_files.checksum_of_lines`), folder after folder.

    Raises:
        InputError: no such folder, no class folders or images in it, other class folders than in the first one or than
            K, or images that can't be read.
    """
    names = _class_folders(folders)
    if num_classes not in (None, len(names)):
        raise InputError(
            f"expected {num_classes} class folders in {folders[0]!r}, as --num-classes says, got {len(names)}; add "
            "empty ones for classes without images"
        )
    found = [
        (folder, path, label)
        for folder in folders
        for label, name in enumerate(names)
        for path in image_files(os.path.join(folder, name))
    ]
    where = some(map(repr, folders))
    if not found:
        raise InputError(f"expected images in the class folders of {where}, got none")
    counts, unreadable, sizes = Counter(), [], {folder: [] for folder in folders}
    size_of = functools.partial(_size, verify=verify)
    with read_each(size_of, [path for _, path, _ in found], workers, "images") as outcomes:
        for (folder, path, label), outcome in zip(found, outcomes, strict=True):
            name = below(folder, path)
            if isinstance(outcome, str):
                unreadable.append(Unreadable(name, outcome))
            else:
                counts[label] += 1
                sizes[folder].append((name, outcome))
    require_readable(unreadable, len(found), where, skip_corrupt)
    return {
        "unit": "images",
        "files": counts.total(),
        "images": counts.total(),
        "skipped": [one._asdict() for one in unreadable],
        "checksum": checksum_of_lines((size, name) for folder in folders for name, size in sorted(sizes[folder])),
        "class_names": names,
        "train_counts": [counts[label] for label in range(len(names))],
    }


def _class_folders(folders):
    first = None
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"expected a folder with one folder per class at {folder!r}, but there is none")
        names = class_folders(folder)
        if not names:
            raise InputError(f"expected one folder per class in {folder!r}, got none")
        first = names if first is None else first
        if names != first:
            raise InputError(
                f"expected the class folders of {folders[0]!r} in {folder!r} too, but {some(set(names) ^ set(first))} "
                "differ; add empty ones"
            )
    return first


def _size(path, verify):
    size = os.stat(path).st_size
    if not size:
        return "empty"
    if verify:
        with Image.open(path) as image:
            image.load()
    return size
