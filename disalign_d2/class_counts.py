"""r of eq. 11 for a detector: training instances or images per class."""

import functools
import os
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from disalign import load_class_counts
from disalign.errors import InputError, some

from .datasets import load_records

UNITS = ("instances", "images")


def count_annotations(dataset_dicts: Iterable[dict], num_classes: int, unit: str = "instances") -> Tensor:
    """(K,) int64: training annotations of each class (crowds do not train), or the ``"images"`` that show it."""
    found: list[int] = []
    for record in dataset_dicts:
        present = [one["category_id"] for one in record.get("annotations", ()) if not one.get("iscrowd", 0)]
        found += set(present) if unit == "images" else present
    labels = torch.tensor(found, dtype=torch.int64)
    wrong = labels[(labels < 0) | (labels >= num_classes)].unique()
    if len(wrong):
        raise InputError(f"expected annotations of classes 0..{num_classes - 1}, got {some(wrong.tolist())}; fix them")
    return torch.bincount(labels, minlength=num_classes)


def class_counts_from_config(cfg: CfgNode) -> Tensor:
    """The counts that ``MODEL.DISALIGN.CLASS_COUNTS`` and ``COUNT_UNIT`` select.

    ``CLASS_COUNTS`` is a bundled name, a JSON file (see :func:`disalign.load_class_counts`), or empty: then the
    annotations of all of ``DATASETS.TRAIN`` are counted.

    Returns:
        (``MODEL.ROI_HEADS.NUM_CLASSES``,) int64, all at least 1.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    source, unit = cfg.MODEL.DISALIGN.CLASS_COUNTS, cfg.MODEL.DISALIGN.COUNT_UNIT
    if unit not in UNITS:
        raise InputError(f"expected MODEL.DISALIGN.COUNT_UNIT among {some(UNITS)}, got {unit!r}")
    if source:
        counts = load_class_counts(os.path.expanduser(source), unit="images" if unit == "images" else None)
        names = range(num_classes)
    else:
        counts, names = _count_datasets(tuple(cfg.DATASETS.TRAIN), num_classes, unit)
        source = f"the annotations of {some(cfg.DATASETS.TRAIN)}"
    if len(counts) != num_classes:
        raise InputError(
            f"expected {num_classes} class counts, as MODEL.ROI_HEADS.NUM_CLASSES says, got {len(counts)} from "
            f"{source}; set NUM_CLASSES or MODEL.DISALIGN.CLASS_COUNTS"
        )
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"expected at least one of the {unit} per class, got none of {len(empty)} classes in {source}: "
            f"{some(names[index] for index in empty)}; drop these categories, or give other counts "
            "in MODEL.DISALIGN.CLASS_COUNTS"
        )
    return counts.clone()


# A cascade asks once per stage, and LVIS's file takes a minute; a registered dataset always returns the same.
@functools.cache
def _count_datasets(datasets, num_classes, unit):
    if not datasets:
        raise InputError("expected a dataset in DATASETS.TRAIN to count the classes of, got none")
    records = [record for name in datasets for record in load_records(name)]
    names = MetadataCatalog.get(datasets[0]).get("thing_classes") or range(num_classes)
    return count_annotations(records, len(names), unit), names


def training_image_counts(cfg: CfgNode) -> Tensor | None:
    """(K,) int64 training images per class, or ``None`` if the training annotations are missing."""
    try:
        return _count_datasets(tuple(cfg.DATASETS.TRAIN), cfg.MODEL.ROI_HEADS.NUM_CLASSES, "images")[0].clone()
    except InputError:
        return None
