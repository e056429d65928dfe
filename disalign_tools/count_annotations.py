"""Training examples per class from files that list them: lists of images, LVIS and COCO JSON."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from disalign.errors import InputError, some
from disalign.io.annotations import category_names, has_boxes, read_annotations, read_image_labels, read_list
from disalign.io.images import MOST_CLASSES


def count_lists(lists: Sequence[str], num_classes: int | None = None) -> dict:
    """Count ``path label`` list files, the format of ImageNet-LT, Places-LT and iNaturalist-2018.

    K is ``num_classes``, or the largest label + 1. The images themselves are not checked: ``python -m
    disalign_cls.check`` does that.
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
        "checksum": _checksum(lists),
        "class_names": [],
        "train_counts": [counts[label] for label in range(num_classes or max(counts) + 1)],
    }


def count_json(files: Sequence[str], num_classes: int | None = None) -> dict:
    """Count the annotations that train, as ``disalign_d2`` does: the classes are the categories in their ids' order.

    Left out are crowds, ignored ones, and those whose polygons all have fewer than three points. All files must have
    the same categories, ``num_classes`` if given. Files without any box are lists of images and their classes.
    """
    if not any(map(has_boxes, files)):
        return _count_image_labels(files, num_classes)
    instances: Counter[int] = Counter()
    shown: Counter[int] = Counter()
    categories: dict[int, str] = {}
    images = crowds = flat = 0
    for path in files:
        content = read_annotations(path)
        found = dict(zip((one["id"] for one in content.categories), category_names(content.categories), strict=True))
        categories = categories or found
        if found != categories:
            raise InputError(f"expected the categories of {files[0]!r} in {path!r} too, but ids or names differ")
        if num_classes not in (None, len(categories)):
            raise InputError(f"expected {num_classes} categories, as --num-classes says, got {len(found)} in {path!r}")
        pairs = [(one["image_id"], one["category_id"]) for one in content.annotations if not one["iscrowd"]]
        instances.update(category for _, category in pairs)
        shown.update(category for _, category in set(pairs))
        images += len(content.images)
        flat += content.flat
        crowds += len(content.annotations) - len(pairs)
    return {
        "unit": "instances",
        "files": len(files),
        "images": images,
        "left_out": crowds + flat,
        "left_out_as": {"crowds or ignored": crowds, "polygons of less than three points": flat},
        "checksum": _checksum(files),
        "class_names": list(categories.values()),
        "train_counts": [instances[id_] for id_ in categories],
        "image_counts": [shown[id_] for id_ in categories],
    }


def _count_image_labels(files, num_classes) -> dict:
    """iNaturalist's JSON, as ``disalign_cls``'s ``JsonDataset`` reads it."""
    counts: Counter[int] = Counter()
    classes: list[str] = []
    for path in files:
        _, labels, found = read_image_labels(path)
        classes = classes or found
        if found != classes:
            raise InputError(f"expected the categories of {files[0]!r} in {path!r} too, but names differ")
        if num_classes not in (None, len(classes)):
            raise InputError(f"expected {num_classes} categories, as --num-classes says, got {len(found)} in {path!r}")
        counts.update(labels)
    return {
        "unit": "images",
        "files": len(files),
        "images": counts.total(),
        "checksum": _checksum(files),
        "class_names": classes,
        "train_counts": [counts[label] for label in range(len(classes))],
    }


def _checksum(paths):
    """SHA-256 of the files' content, one after the other: ``cat FILE ... | sha256sum``."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
