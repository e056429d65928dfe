"""What is missing or wrong in a config's data, said before training rather than after hours of it."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from disalign.errors import InputError, some
from disalign.io import missing_files, read_json
from disalign.stage_two import require_same_classes

from .class_counts import class_counts_from_config, count_annotations
from .datasets import load_records, place_of, unreadable
from .lvis_metrics import check_ground_truth

logger = logging.getLogger(__name__)


def require_data(cfg: CfgNode, training: bool) -> None:
    """Refuse to start on incomplete data; reads the annotations and lists the folders, but opens no image.

    Raises:
        InputError: the first problem of :func:`check_data`, and how many there are.
    """
    problems = check_data(cfg, training=training)
    if problems:
        more = f" (and {len(problems) - 1} more, see --data-check)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)


def check_data(cfg: CfgNode, decode: bool = False, training: bool = True) -> list[str]:
    """Check the registered datasets of ``DATASETS.TRAIN`` and ``TEST``; what is only worth knowing is logged.

    Args:
        cfg: the config.
        decode: read every image to its end too, which takes minutes for LVIS.
        training: else only ``TEST``.

    Returns:
        What would stop or spoil training or evaluation, a sentence each; empty if all is well.
    """
    num_classes, disalign = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.DISALIGN
    problems: list[str] = []

    def checked(check, *args, where=""):
        try:
            return check(*args)
        except InputError as error:
            problems.append(f"{where}{error}")

    needed = "TRAIN" if training else "TEST"
    if not cfg.DATASETS[needed]:
        problems.append(f"expected a dataset in DATASETS.{needed}, got none")
    given = None  # else the training data is counted, and checked below
    if training and disalign.CALIBRATE and disalign.CLASS_COUNTS:
        given = checked(class_counts_from_config, cfg)
    train = tuple(dict.fromkeys(cfg.DATASETS.TRAIN)) if training else ()
    counts, reference = [], None
    crowds = 0
    for name in dict.fromkeys((*train, *cfg.DATASETS.TEST)):
        records = checked(load_records, name)
        if records is None:
            continue
        reference, classes, where = reference or name, _classes(name), f"in {name!r}: "
        checked(_require_images, name, records)
        if name == reference and len(classes) not in (0, num_classes):
            problems.append(
                f"expected MODEL.ROI_HEADS.NUM_CLASSES {len(classes)}, the number of classes of {name!r}, got "
                f"{num_classes}"
            )
        checked(require_same_classes, _classes(reference), classes, repr(name), repr(reference))
        own = checked(count_annotations, records, len(classes) or num_classes, where=where)
        if own is None:
            continue
        logger.info("%s: %d images and %d annotations of %d classes", name, len(records), int(own.sum()), len(own))
        if name in train:
            counts.append(own)
            problems += _untrainable_masks(name, records, cfg)
            crowds += sum(one.get("iscrowd", 0) for record in records for one in record.get("annotations", ()))
            _log_odd_boxes(name, records)
        if name in cfg.DATASETS.TEST:
            checked(_require_ground_truth, name, cfg, where=where)
        if decode:
            problems += _broken_images(name, records, cfg.INPUT.FORMAT)
    if train and [len(own) for own in counts] == [num_classes] * len(train):
        total = torch.stack(counts).sum(0)
        problems += _unseen_classes(total, crowds, train, disalign)
        if given is not None and disalign.COUNT_UNIT == "instances" and not torch.equal(given, total):
            logger.warning(
                "MODEL.DISALIGN.CLASS_COUNTS %r is not what %s holds (%d instances, not %d); '' would count them",
                disalign.CLASS_COUNTS,
                some(train),
                int(total.sum()),
                int(given.sum()),
            )
    return problems


def _classes(name) -> list[str]:
    return MetadataCatalog.get(name).get("thing_classes") or []


def _require_images(name, records) -> None:
    absent = missing_files([record["file_name"] for record in records if "://" not in record["file_name"]])
    if absent:
        folders = Counter(map(os.path.dirname, absent))
        hint = place_of(absent[0]) or "; check the image folder"
        if "val" in name and any(os.path.basename(folder) == "train2017" for folder in folders):
            hint += "; LVIS v1 val reads images of COCO's train2017 too, so that folder must be there for evaluation"
        raise InputError(
            f"expected {len(records)} images of {name!r}, but {len(absent)} are missing "
            f"({some((f'{number} in {folder!r}' for folder, number in folders.items()), 3)}): {some(absent, 3)}{hint}"
        )


def _untrainable_masks(name, records, cfg) -> Iterator[str]:
    if not cfg.MODEL.MASK_ON:
        return
    images = [
        [one.get("segmentation") for one in record.get("annotations", ()) if not one.get("iscrowd", 0)]
        for record in records
    ]
    lacking = [sum(mask is None for mask in masks) for masks in images]
    # Stage two needs no masks, but Detectron2 reads all or none of an image.
    mixed = any(0 < none < len(masks) for none, masks in zip(lacking, images, strict=True))
    if mixed or (any(lacking) and not cfg.MODEL.DISALIGN.CALIBRATE):
        yield (
            f"expected a mask for every annotation of {name!r}, as MODEL.MASK_ON says, but {sum(lacking)} have none; "
            "add them, or train a model of boxes alone"
        )
    rle = sum(isinstance(mask, dict) for masks in images for mask in masks)
    if rle and cfg.INPUT.MASK_FORMAT == "polygon":
        yield f"expected polygons in {name!r}, as INPUT.MASK_FORMAT says, but {rle} masks are RLE; set it to 'bitmask'"


def _require_ground_truth(name, cfg) -> None:
    """Refuse what the evaluator would refuse after hours of training."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "lvis":
        return
    ground_truth = read_json(PathManager.get_local_path(metadata.json_file), "annotations")
    if ground_truth.get("annotations"):  # a test set without annotations is not evaluated
        for iou_type in ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",):
            check_ground_truth(ground_truth, iou_type)


def _log_odd_boxes(name, records) -> None:
    """Boxes that Detectron2 leaves out, and those that are something else than pixels of x, y, width and height."""
    boxes = [
        (one["bbox"], record)
        for record in records
        for one in record.get("annotations", ())
        if one["bbox_mode"] == BoxMode.XYWH_ABS
    ]
    if flat := sum(min(box[2:]) <= 0 for box, _ in boxes):
        logger.warning("%s: %d boxes have no area; Detectron2 leaves them out of training", name, flat)
    if boxes and max(max(box) for box, _ in boxes) <= 1:
        logger.warning("%s: all boxes lie within one pixel; are they fractions of the image? Give pixels", name)
    outside = [
        f"{box} in {record['width']} x {record['height']} pixels of {record['file_name']!r}"
        for box, record in boxes
        if min(box[:2]) < -1 or box[0] + box[2] > record["width"] + 1 or box[1] + box[3] > record["height"] + 1
    ]
    if outside:
        logger.warning(
            "%s: %d of %d boxes reach beyond their image: %s; a box is [x, y, width, height], not two corners",
            *(name, len(outside), len(boxes), some(outside, 2)),
        )


def _unseen_classes(counts, crowds, train, disalign) -> Iterator[str]:
    unseen = (counts == 0).nonzero().flatten().tolist()
    if unseen:
        names = _classes(train[0]) or range(len(counts))
        sentence = (
            f"expected training instances of every class in {some(train)}, but {len(unseen)} of {len(counts)} have "
            f"none: {some(names[index] for index in unseen)}"
        )
        if crowds:
            everything = int(counts.sum()) + crowds
            sentence += (
                f"; {crowds} of {everything} annotations are crowds, which do not train: if they are objects (CVAT "
                "marks RLE masks so), set their iscrowd to 0"
            )
        # Stage two weighs by the counts; elsewhere such a class is merely never learnt.
        if len(unseen) == len(counts) or (disalign.CALIBRATE and not disalign.CLASS_COUNTS):
            yield f"{sentence}; drop these categories, or give MODEL.DISALIGN.CLASS_COUNTS"
        else:
            logger.warning(sentence)


def _broken_images(name, records, image_format) -> list[str]:
    def problem(record):
        try:
            # A copy: check_image_size may add keys.
            check_image_size(dict(record), read_image(record["file_name"], image_format))
        except FileNotFoundError:
            return None  # said already
        except Exception as error:  # a broken file can break a reader anywhere
            return str(unreadable(record, error))

    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(problem, records), total=len(records), desc=name, unit="image")
        return [sentence for sentence in found if sentence]
