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
        files: LVIS or COCO JSON, all with the same categories; several add up.
        num_classes: K, to be checked.

    Returns:
        ``unit``, ``files``, ``images``, ``left_out`` (annotations), ``checksum``
        (:func:`.count_files.checksum_of_bytes`), ``class_names``, ``train_counts`` (instances) and ``image_counts``
        (images that show the class at least once) of the K classes.

    Raises:
        InputError: see :func:`disalign.annotations.read_annotations`; or other categories than in the first file or
            than K.
    """
    instances, shown = Counter(), Counter()
    categories, images, left_out = None, 0, 0
    for path in files:
        content = read_annotations(path)
        found = [(category["id"], name) for category, name in _named(content)]
        categories = found if categories is None else categories
        if found != categories:
            raise InputError(f"expected the categories of {files[0]!r} in {path!r} too, but ids or names differ")
        if num_classes not in (None, len(categories)):
            raise InputError(
                f"expected {num_classes} categories in {path!r}, as --num-classes says, got {len(categories)}"
            )
        pairs = [(one["image_id"], one["category_id"]) for one in content["annotations"] if _trains(one)]
        instances.update(category for _, category in pairs)
        shown.update(category for _, category in set(pairs))
        images += len(content["images"])
        left_out += len(content["annotations"]) - len(pairs)
    return {
        "unit": "instances",
        "files": len(files),
        "images": images,
        "left_out": left_out,
        "checksum": checksum_of_bytes(files),
        "class_names": [name for _, name in categories],
        "train_counts": [instances[id_] for id_, _ in categories],
        "image_counts": [shown[id_] for id_, _ in categories],
    }


def _named(content):
    return zip(content["categories"], category_names(content["categories"]), strict=True)


def _trains(annotation):
    mask = annotation.get("segmentation")
    polygons = mask if isinstance(mask, list) else []
    flat = polygons and not any(isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0 for one in polygons)
    return not (annotation.get("iscrowd") or annotation.get("ignore") or flat)
