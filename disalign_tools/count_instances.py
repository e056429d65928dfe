"""Training instances and images per class, from LVIS or COCO JSON."""

from collections import Counter
from collections.abc import Sequence

from disalign.errors import InputError
from disalign.io.annotations import category_names, read_annotations

from .count_files import checksum_of_bytes


def count_json(files: Sequence[str], num_classes: int | None = None) -> dict:
    """Count the annotations that train, as ``disalign_d2`` does: the classes are the categories in their ids' order.

    Left out are crowds, ignored ones, and those of polygons only, none of which has three points.

    Args:
        files: LVIS or COCO JSON, all with the same categories.
        num_classes: K, to be checked.

    Raises:
        InputError: see :func:`disalign.io.annotations.read_annotations`; or other categories than in the first file or
            than K.
    """
    instances: Counter[int] = Counter()
    shown: Counter[int] = Counter()
    categories: dict[int, str] = {}
    images = left_out = 0
    for path in files:
        content = read_annotations(path)
        found = dict(zip((one["id"] for one in content.categories), category_names(content.categories), strict=True))
        categories = categories or found
        if found != categories:
            raise InputError(f"expected the categories of {files[0]!r} in {path!r} too, but ids or names differ")
        if num_classes not in (None, len(categories)):
            raise InputError(
                f"expected {num_classes} categories in {path!r}, as --num-classes says, got {len(categories)}"
            )
        pairs = [(one["image_id"], one["category_id"]) for one in content.annotations if not one["iscrowd"]]
        instances.update(category for _, category in pairs)
        shown.update(category for _, category in set(pairs))
        images += len(content.images)
        left_out += content.flat + len(content.annotations) - len(pairs)
    return {
        "unit": "instances",
        "files": len(files),
        "images": images,
        "left_out": left_out,
        "checksum": checksum_of_bytes(files),
        "class_names": list(categories.values()),
        "train_counts": [instances[id_] for id_ in categories],
        "image_counts": [shown[id_] for id_ in categories],
    }
