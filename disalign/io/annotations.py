"""Reading what says which class an image shows: list files, LVIS and COCO JSON."""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from ..errors import InputError, some
from .files import read_json, refuse_special

#: More than any image has: a mask beyond is a mistake.
MOST_PIXELS = 1 << 31

#: What each part of an annotation file must hold to train on it.
KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_list(ann_file: str, root: str = "") -> tuple[list[str], list[int]]:
    """The paths and labels of a ``path label`` list file, one image a line; paths are relative to ``root``."""
    refuse_special(ann_file, "a list of 'path label' lines")
    try:
        with open(ann_file, encoding="utf-8") as file:
            lines = {number: line.strip() for number, line in enumerate(file, 1) if line.strip()}
    except (OSError, ValueError) as error:
        raise InputError(f"expected a list file of 'path label' lines at {ann_file!r}, but: {error}") from None
    pattern = re.compile(r".*\S\s+-?\d{1,18}")
    malformed = [f"line {number}: {line[:60]!r}" for number, line in lines.items() if not pattern.fullmatch(line)]
    if malformed:
        raise InputError(
            f"expected 'path label' on every line of {ann_file!r}, but {len(malformed)} differ: {some(malformed, 3)}"
        )
    if not lines:
        raise InputError(f"expected 'path label' lines in {ann_file!r}, but it is empty")
    # The label is the last word: paths may hold spaces.
    split = [line.rsplit(maxsplit=1) for line in lines.values()]
    several = [
        f"line {number}: {lines[number][:60]!r}"
        for number, (path, _) in zip(lines, split, strict=True)
        if re.search(r"\s[-+]?\d+(\.\d+)?$", path) and not _is_file(path, root, os.path.dirname(ann_file))
    ]
    if several:
        raise InputError(
            f"expected one label on every line of {ann_file!r}, but {len(several)} have several: {some(several, 3)}; "
            "this is a file of another kind: write 'path label' lines"
        )
    return [path for path, _ in split], [int(label) for _, label in split]


def _is_file(path: str, *folders: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, path)) for folder in folders)


def read_image_labels(json_file: str) -> tuple[list[str], list[int], list[str]]:
    """The file names and labels of the images in a JSON of COCO's form without boxes, and the names of the classes.

    iNaturalist ships its lists so. The labels are the categories in the order of their ids; each image has one.
    """
    content, where = read_json(json_file, "annotations"), f" in {json_file!r}"
    keys = {"categories": ("id",), "images": ("id", "file_name"), "annotations": ("image_id", "category_id")}
    require_format(content, keys, where)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    labels = {one["image_id"]: label_of[one["category_id"]] for one in content["annotations"]}
    found = Counter(one["image_id"] for one in content["annotations"])
    odd = [image["file_name"] for image in content["images"] if found[image["id"]] != 1]
    if odd:
        raise InputError(
            f"expected one annotation of each image{where}, but {len(odd)} have none or several: {some(odd, 3)}; leave "
            "them out, or train on a detector's data with disalign_d2"
        )
    names = [str(category.get("name", category["id"])) for category in categories]
    return [image["file_name"] for image in content["images"]], [labels[one["id"]] for one in content["images"]], names


def has_boxes(json_file: str) -> bool:
    """Whether a JSON of COCO's form is a detector's: any annotation has a box, or there is none."""
    content = read_json(json_file, "annotations")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not annotations:
        return True
    return any(isinstance(annotation, dict) and "bbox" in annotation for annotation in annotations)


@dataclass(frozen=True)
class AnnotationFile:
    """The content of a file in LVIS or COCO format.

    ``categories`` are in the order of their ids: the classes 0..K-1. ``annotations`` are those that a detector can use,
    with ``iscrowd`` 0 (it trains) or 1 (a crowd, or to be ignored); a ``segmentation`` of polygons holds only those of
    at least three points. ``flat`` counts the others, none of whose polygons has three points.
    """

    categories: list[dict[str, Any]]
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    flat: int


def read_annotations(json_file: str | os.PathLike[str]) -> AnnotationFile:
    """Read an annotation file in LVIS or COCO format, see :func:`require_format`; a mask is polygons or RLE."""
    content, where = read_json(json_file, "annotations"), f" in {os.fspath(json_file)!r}"
    require_format(content, KEYS, where)
    used = []
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd") or annotation.get("ignore")))
        if annotation.get("segmentation"):
            annotation["segmentation"] = _usable_mask(annotation, where)
            if not annotation["segmentation"]:
                continue
        used.append(annotation)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return AnnotationFile(categories, content["images"], used, len(content["annotations"]) - len(used))


def _usable_mask(annotation: dict[str, Any], where: str) -> dict[str, Any] | list[list[float]]:
    mask = annotation["segmentation"]
    if isinstance(mask, dict) and {"counts", "size"} <= mask.keys() and _is_rle(**mask):
        return mask
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        got = f"another in annotation {annotation['id']}"
        raise InputError(f"expected polygons [[x, y, x, y, ...], ...] or an RLE as segmentation{where}, got {got}")
    return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _is_rle(counts: Any, size: Any, **_: Any) -> bool:
    """Whether runs (compressed ones are pycocotools' to read) fill a mask of this height and width."""

    def whole(numbers: Any) -> bool:
        return isinstance(numbers, (list, tuple)) and all(isinstance(one, int) and one >= 0 for one in numbers)

    if not whole(size) or len(size) != 2 or not 0 < size[0] * size[1] <= MOST_PIXELS:
        return False
    return isinstance(counts, (str, bytes)) or (whole(counts) and sum(counts) == size[0] * size[1])


def require_format(content: Any, keys: Mapping[str, Sequence[str]], where: str = "") -> None:
    """Refuse content that is not in LVIS or COCO format.

    At least one category and image, ids that are whole numbers and each there once, annotations of known categories
    and images, and boxes of four finite numbers.

    Args:
        content: of an annotation file.
        keys: ``"categories"``, ``"images"`` and ``"annotations"`` -> what each entry must have; ids and boxes are
            checked only if they are among them.
        where: it is from, for the message: ``" in 'train.json'"``.
    """
    for part, needed in keys.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise InputError(
                f"expected lists 'images', 'annotations' and 'categories'{where}, got no {part!r}; is it in LVIS or "
                "COCO format?"
            )
        require_keys(entries, needed, {"categories": "category"}.get(part, part[:-1]), where)
        ids = [entry["id"] for entry in entries] if "id" in needed else []
        wrong = [repr(id_) for id_ in ids if not isinstance(id_, int)]
        wrong = wrong or [f"{id_} again" for id_, times in Counter(ids).items() if times > 1]
        if wrong:
            raise InputError(f"expected whole numbers as ids of the {part}{where}, each once, got {some(wrong)}")
    if not content["categories"] or not content["images"]:
        raise InputError(f"expected images and categories{where}, got none")
    for key, part in (("category_id", "categories"), ("image_id", "images")):
        known = {entry["id"] for entry in content[part]}
        unknown = [annotation for annotation in content["annotations"] if not is_known(annotation[key], known)]
        if unknown:
            named = some(f"{annotation[key]!r} of annotation {annotation.get('id')}" for annotation in unknown)
            raise InputError(
                f"expected only annotations of the {part}{where}, but {len(unknown)} have another {key}: {named}; drop "
                f"them or add to the {part}"
            )
    for annotation in content["annotations"] if "bbox" in keys["annotations"] else ():
        if not is_box(annotation["bbox"]):
            got = f"{annotation['bbox']!r} in annotation {annotation.get('id')}"
            raise InputError(f"expected boxes [x, y, width, height]{where}, got {got}")


def require_keys(entries: Sequence[Any], needed: Sequence[str], what: str, where: str = "") -> None:
    """Refuse entries (each ``what``, for the message) that are no mapping or lack a needed key."""
    for number, entry in enumerate(entries):
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise InputError(
                f"expected {some(sorted(needed))} of each {what}{where}, got no {some(lacking)} in entry {number}"
            )


def is_known(key: object, table: Collection[int]) -> bool:
    """Whether an id is a whole number among those of a table."""
    return isinstance(key, int) and key in table


def is_box(value: object) -> bool:
    """Whether it is x, y, width and height: four finite numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(is_number, value))


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and abs(value) < inf


def category_names(categories: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of LVIS's and COCO's categories: the first synonym, where there is one, or else the name."""
    synonyms = (category.get("synonyms") for category in categories)
    return [
        names[0] if names and isinstance(names, list) else category["name"]
        for names, category in zip(synonyms, categories, strict=True)
    ]
