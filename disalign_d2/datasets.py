"""Own datasets in LVIS or COCO format, and a mapper with one-sentence errors for images that can't be read."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask

from disalign.errors import InputError, first_line, in_user_code, some
from disalign.io.annotations import category_names, read_annotations
from disalign.io.files import refuse_special

logger = logging.getLogger(__name__)

CHECK_PATH = "check the path (Detectron2 has its own datasets in the folder that DETECTRON2_DATASETS names)"


def register_from_config(cfg: CfgNode) -> None:
    """Register every ``[name, annotation file, image folder]`` of ``cfg.DATASETS.OWN``."""
    for entry in cfg.DATASETS.OWN:
        match entry:
            case [str(name), str(json_file), str(image_root)] if all(entry):
                register_instances(name, json_file, image_root)
            case _:
                raise InputError(
                    f"expected entries [name, annotation file, image folder] in DATASETS.OWN, got {entry!r}"
                )


def register_instances(name: str, json_file: str | os.PathLike[str], image_root: str | os.PathLike[str]) -> None:
    """Register an annotation file with Detectron2 under a name; :func:`load_instances` reads it only when it is used.

    A name can be registered again with the same paths; ``~`` in them is the home folder.
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
    images that have only a ``coco_url``. Annotations may lack masks. An ``ignore`` flag counts as ``iscrowd``.

    Args:
        json_file: see :func:`disalign.io.annotations.read_annotations`.
        image_root: the folder of ``file_name`` or, without a ``file_name``, of ``split/file``, the end of ``coco_url``.
        name: the registered dataset whose metadata gets ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``:
            the classes 0..K-1 are the categories in the order of their ids.

    Returns:
        One dict per image, in the order of the images' ids, with ``annotations`` (boxes XYWH in pixels) and LVIS's
        ``not_exhaustive_category_ids`` and ``neg_category_ids`` (ids of the file, not classes; empty in COCO format).
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
    """The dataset dicts of any registered dataset, Detectron2's own ones too."""
    if name not in DatasetCatalog:
        known = [known for known in DatasetCatalog if MetadataCatalog.get(known).get("evaluator_type") == "lvis"]
        raise InputError(
            f"expected a registered dataset, got {name!r}; known are {some(reversed(known), 20)}; or set DATASETS.OWN"
        )
    try:
        return DatasetCatalog.get(name)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        if isinstance(error, InputError) or in_user_code(error):
            raise
        json_file = MetadataCatalog.get(name).get("json_file")
        raise InputError(
            f"expected annotations of {name!r} in {json_file!r}, but: {first_line(error)}; {CHECK_PATH}"
        ) from error


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
        except Exception as error:  # a broken file can raise anything in a reader
            if in_user_code(error):
                error.add_note(f"while loading {dataset_dict['file_name']!r}")
                raise
            size = f"{dataset_dict.get('width')} x {dataset_dict.get('height')} pixels"
            raise InputError(
                f"expected a whole image of {size} at {dataset_dict['file_name']!r}, but: {first_line(error)}; fetch "
                "the file again, or correct its entry in the annotations"
            ) from None


def _path_of(image, json_file, image_root):
    """LVIS v0.5 has file names of 2014, but the folders of its images are those of the ``coco_url``."""
    paths = [image["file_name"]] if image.get("file_name") else []
    if image.get("coco_url"):
        paths.append(os.path.join(*image["coco_url"].split("/")[-2:]))
    if not paths:
        raise InputError(f"expected a file_name or coco_url of image {image['id']} in {json_file!r}, got neither")
    paths = [os.path.join(image_root, path) for path in paths]
    return next((path for path in paths if len(paths) > 1 and os.path.isfile(path)), paths[0])
