"""Training images per class, from list files or from folders."""

import os
from collections import Counter
from collections.abc import Sequence

from disalign.errors import InputError, some
from disalign.io.annotations import read_list
from disalign.io.images import MOST_CLASSES, image_tree

from .count_files import checksum_of_bytes, read_files


def count_lists(lists: Sequence[str], num_classes: int | None = None) -> dict:
    """Count ``path label`` list files, as ImageNet-LT, Places-LT and iNaturalist-2018 have them.

    The images themselves are not looked for: ``python -m disalign_cls.check`` does.

    Args:
        lists: the files.
        num_classes: K, for classes behind the largest label; default: the largest label + 1.

    Raises:
        InputError: a missing, empty or malformed file, or a label outside [0, K).
    """
    counts: Counter[int] = Counter()
    limit = num_classes or MOST_CLASSES
    for path in lists:
        names, labels = read_list(path)
        wrong = [f"{label} of {name}" for name, label in zip(names, labels, strict=True) if not 0 <= label < limit]
        if wrong:
            raise InputError(
                f"expected labels 0..{limit - 1} in {path!r}, but {len(wrong)} are not: {some(wrong, 3)}; correct the "
                "list, or the number of classes"
            )
        counts.update(labels)
    return {
        "unit": "images",
        "files": len(lists),
        "images": counts.total(),
        "checksum": checksum_of_bytes(lists),
        "class_names": [],
        "train_counts": [counts[label] for label in range(num_classes or max(counts) + 1)],
    }


def count_folders(
    folders: Sequence[str],
    num_classes: int | None = None,
    workers: int = 0,
    verify: bool = False,
    skip_corrupt: bool = False,
) -> dict:
    """Count images in folders of one folder per class; the labels are those of ``disalign_cls``'s ``FolderDataset``.

    Each image must be there and hold at least a byte; whether it is whole only ``verify`` finds out. The checksum is
    that of the images' sizes in bytes, see :func:`.count_files.read_files`.

    Args:
        folders: each with the same folders in it, one per class, perhaps without any image.
        num_classes: K, to be checked.
        workers: threads that read.
        verify: decode each image to its end.
        skip_corrupt: leave out images that can't be read.

    Raises:
        InputError: no such folder, no class folders or images in it, other class folders than in the first one or than
            K, or images that can't be read.
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
    counts = [0] * len(names)

    def read(path):
        if verify:
            _decode(path)
        return os.stat(path).st_size, 1

    def add(place, one):
        counts[labels[place]] += one

    read_ones = read_files(files, read, add, workers, skip_corrupt, "images")
    return {"unit": "images", **read_ones, "class_names": names, "train_counts": counts}


def _decode(path: str) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
