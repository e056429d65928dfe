"""Own datasets in LVIS or COCO format, and images that are read with a sentence when they can't be."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as coco_mask

from disalign.errors import InputError, first_line, in_user_code, some
from disalign.io.annotations import category_names, read_annotations
from disalign.io.files import refuse_special

logger = logging.getLogger(__name__)


def register_from_config(cfg: CfgNode) -> None:
    """Register every ``[name, annotation file, image folder]`` of ``cfg.DATASETS.OWN``.

    Raises:
        InputError: another entry, or see :func:`register_instances`.
    """
    for entry in cfg.DATASETS.OWN:
        is_triple = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_triple or not all(isinstance(part, str) and part for part in entry):
            raise InputError(
                f"expected entries [name, annotation file, image folder] in DATASETS.OWN, got {entry!r}; write "
                "[[name, file, folder], ...]"
            )
        register_instances(*entry)


def register_instances(name: str, json_file: str | os.PathLike[str], image_root: str | os.PathLike[str]) -> None:
    """Make an annotation file known to Detectron2 under a name; it is read only when the dataset is used.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: LVIS or COCO format, see :func:`load_instances`.
        image_root: the images' folder; in both paths ``~`` is the home.

    Raises:
        InputError: the name is taken by other paths; the same ones again are fine.
    """
    paths = {"json_file": os.path.expanduser(json_file), "image_root": os.path.expanduser(image_root)}
    if name in DatasetCatalog:
        taken = {key: MetadataCatalog.get(name).get(key) for key in paths}
        if taken != paths:
            raise InputError(
                f"expected a new dataset name, got {name!r}, which is {taken['json_file']!r} with images in "
                f"{taken['image_root']!r}; choose another name"
            )
        return
    DatasetCatalog.register(name, lambda: load_instances(**paths, name=name))
    MetadataCatalog.get(name).set(evaluator_type="lvis", **paths)


def load_instances(json_file: str, image_root: str, name: str | None = None) -> list[dict]:
    """Read an annotation file in LVIS or COCO format as Detectron2's dataset dicts.

    Unlike Detectron2's ``load_lvis_json`` it takes any category ids and any dataset name, and unlike ``load_coco_json``
    images that have only a ``coco_url``. Annotations may be boxes alone. An ``ignore`` flag counts as ``iscrowd``.

    Args:
        json_file: polygons or RLE masks.
        image_root: the folder of ``file_name``, or, where there is none, of ``split/file``, the end of ``coco_url``.
        name: the registered dataset whose metadata gets ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``:
            the classes 0..K-1 are the categories in the order of their ids.

    Returns:
        One dict per image, in the order of the images' ids, with ``annotations`` (boxes XYWH in pixels) and LVIS's
        ``not_exhaustive_category_ids`` and ``neg_category_ids`` (ids of the file, not classes; empty in COCO format).

    Raises:
        InputError: see :func:`disalign.io.annotations.read_annotations`; or an image without a file name.
    """
    content = read_annotations(json_file)
    class_of = {category["id"]: index for index, category in enumerate(content.categories)}
    records = {
        image["id"]: {
            "file_name": _path_of(image, json_file, image_root),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
            "neg_category_ids": image.get("neg_category_ids", []),
            "annotations": [],
        }
        for image in sorted(content.images, key=lambda image: image["id"])
    }
    for annotation in content.annotations:
        instance = {
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": class_of[annotation["category_id"]],
            "iscrowd": annotation["iscrowd"],
        }
        if mask := annotation.get("segmentation"):
            uncompressed = isinstance(mask, dict) and isinstance(mask["counts"], list)
            instance["segmentation"] = coco_mask.frPyObjects(mask, *mask["size"]) if uncompressed else mask
        records[annotation["image_id"]]["annotations"].append(instance)
    if content.flat:
        logger.warning("Leaving out %d annotations of %s: no polygon has three points", content.flat, json_file)
    if name is not None:
        classes = category_names(content.categories)
        MetadataCatalog.get(name).set(thing_classes=classes, thing_dataset_id_to_contiguous_id=class_of)
    return list(records.values())


def load_records(name: str) -> list[dict]:
    """The dataset dicts of any registered dataset, Detectron2's own ones too.

    Raises:
        InputError: an unknown name, or annotations that are missing or can't be read.
    """
    if name not in DatasetCatalog:
        known = [known for known in DatasetCatalog if MetadataCatalog.get(known).get("evaluator_type") == "lvis"]
        raise InputError(
            f"expected a registered dataset, got {name!r}; known are {some(reversed(known), 20)}; or set DATASETS.OWN"
        )
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is not None and not PathManager.isfile(json_file):
        raise InputError(
            f"expected the annotations of {name!r} at {json_file!r}, but there is no such file{place_of(json_file)}"
        )
    try:
        return DatasetCatalog.get(name)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        if isinstance(error, InputError) or in_user_code(error):
            raise
        raise InputError(
            f"expected annotations that Detectron2 can read for {name!r} in {json_file!r}, but: {first_line(error)}"
        ) from error


def place_of(path: str) -> str:
    """The end of a sentence on a missing file: where Detectron2 looks for its own datasets, if it is one of them."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    if not path.startswith(os.path.join(root, "")):
        return ""
    return f"; Detectron2 looks for its datasets in the folder that DETECTRON2_DATASETS names, now {root!r}"


class CheckedMapper(DatasetMapper):
    """Detectron2's mapper; an image that can't be read or is of another size is an :class:`InputError` naming it.

    Errors of a user's own augmentations keep their traceback.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            refuse_special(dataset_dict["file_name"], "an image")
            return super().__call__(dataset_dict)
        except InputError:
            raise
        except Exception as error:  # a broken file can break a reader anywhere
            if in_user_code(error):
                error.add_note(f"while loading {dataset_dict['file_name']!r}")
                raise
            raise unreadable(dataset_dict, error) from None


def unreadable(record: dict, error: Exception) -> InputError:
    """The sentence on an image that can't be used."""
    return InputError(
        f"expected a whole image of {record.get('width')} x {record.get('height')} pixels at {record['file_name']!r}, "
        f"but: {first_line(error)}; fetch the file again, or correct its entry in the annotations"
    )


def _path_of(image, json_file, image_root):
    """LVIS v0.5 has a ``file_name`` of 2014, while its images lie where the ``coco_url`` says."""
    paths = [image["file_name"]] if image.get("file_name") else []
    if image.get("coco_url"):
        paths.append(os.path.join(*image["coco_url"].split("/")[-2:]))
    if not paths:
        raise InputError(f"expected a file_name or coco_url of image {image['id']} in {json_file!r}, got neither")
    paths = [os.path.join(image_root, path) for path in paths]
    return next((path for path in paths if len(paths) > 1 and os.path.isfile(path)), paths[0])
