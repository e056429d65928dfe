"""Reading what says which class an image shows: list files, folders of images, LVIS and COCO JSON."""

import os
import re
from collections import Counter
from collections.abc import Hashable
from math import isfinite

from ..errors import InputError, some
from .files import read_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_list(ann_file: str) -> tuple[list[str], list[int]]:
    """The paths and labels of a ``path label`` list file, one image a line.

    Raises:
        InputError: a missing, empty or malformed file, with the first offending lines.
    """
    try:
        with open(ann_file, encoding="utf-8") as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a list file of 'path label' lines at {ann_file!r}, but: {error}") from None
    # The label is the last word: paths may hold spaces.
    split = [(number, line, line.rsplit(maxsplit=1)) for number, line in lines]
    malformed = [
        f"line {number}: {line[:60]!r}"
        for number, line, words in split
        if len(words) != 2 or not re.fullmatch(r"-?\d+", words[1])
    ]
    if malformed:
        raise InputError(
            f"expected 'path label' on every line of {ann_file!r}, but {len(malformed)} differ: {some(malformed, 3)}"
        )
    if not split:
        raise InputError(f"expected 'path label' lines in {ann_file!r}, but it is empty")
    return [words[0] for _, _, words in split], [int(words[1]) for _, _, words in split]


def class_folders(folder) -> list[str]:
    """The names of the folders in a folder, in alphabetical order; hidden ones (``.ipynb_checkpoints``) are none."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder) -> list[str]:
    """The images in a folder and in all below it, in alphabetical order folder by folder; hidden ones are none."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        found.append((place, sorted(shown)))
    return [os.path.join(place, name) for place, names in sorted(found) for name in names]


def read_annotations(json_file) -> dict:
    """The content of an annotation file in LVIS or COCO format.

    Returns:
        ``"categories"``, in the order of their ids, ``"images"`` and ``"annotations"``: each with the keys that the
        format asks for.

    Raises:
        InputError: a missing or broken file, an entry without a needed key, ids that repeat, an annotation of an
            unknown category or image, or a box that is not four finite numbers.
    """
    json_file = os.fspath(json_file)
    content = read_json(json_file, "annotations")
    for part, keys in _KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise InputError(
                f"expected lists 'images', 'annotations' and 'categories' in {json_file!r}, got no {part!r}; is it in "
                "LVIS or COCO format?"
            )
        for number, entry in enumerate(entries):
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking or not isinstance(entry["id"], int):
                raise InputError(
                    f"expected {some(keys)} (ids whole numbers) in each of the {part} in {json_file!r}, got none or "
                    f"another {some(lacking or ['id'])} in entry {number}"
                )
        repeated = [id_ for id_, times in Counter(entry["id"] for entry in entries).items() if times > 1]
        if repeated:
            raise InputError(f"expected each id once among the {part} in {json_file!r}, got {some(repeated)} again")
    if not content["categories"] or not content["images"]:
        raise InputError(f"expected images and categories in {json_file!r}, got none")
    _check(content, json_file)
    return {**content, "categories": sorted(content["categories"], key=lambda category: category["id"])}


def _check(content, json_file):
    for key, what in (("category_id", "categories"), ("image_id", "images")):
        known = {entry["id"] for entry in content[what]}
        wrong = [
            annotation
            for annotation in content["annotations"]
            if not isinstance(annotation[key], Hashable) or annotation[key] not in known
        ]
        if wrong:
            named = some(f"{annotation[key]!r} of annotation {annotation['id']}" for annotation in wrong)
            raise InputError(
                f"expected only annotations of the {what} in {json_file!r}, but {len(wrong)} have another {key}: "
                f"{named}; drop them or add to the {what}"
            )
    for annotation in content["annotations"]:
        if not _is_box(annotation["bbox"]):
            raise InputError(
                f"expected boxes [x, y, width, height] in {json_file!r}, got {annotation['bbox']!r} in annotation "
                f"{annotation['id']}"
            )


def _is_box(box):
    return isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) and isfinite(x) for x in box)


def category_names(categories) -> list[str]:
    """What Detectron2 calls LVIS's and COCO's categories: the first synonym, where there is one, or else the name."""
    synonyms = (category.get("synonyms") for category in categories)
    return [
        names[0] if names and isinstance(names, list) else category["name"]
        for names, category in zip(synonyms, categories, strict=True)
    ]
