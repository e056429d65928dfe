"""Find missing or wrong data of a config before training rather than after hours of it."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from disalign.errors import InputError, some
from disalign.io import missing_files, read_json
from disalign.stage_two import require_same_classes

from .class_counts import class_counts_from_config, count_annotations
from .datasets import CHECK_PATH, CheckedMapper, load_records
from .lvis_metrics import check_ground_truth

logger = logging.getLogger(__name__)


def require_data(cfg: CfgNode, training: bool) -> None:
    """Refuse to start on incomplete data, with the first problem of :func:`check_data`; opens no image."""
    problems = check_data(cfg, training=training)
    if problems:
        more = f" (and {len(problems) - 1} more, see --data-check)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)


def check_data(cfg: CfgNode, decode: bool = False, training: bool = True) -> list[str]:
    """Problems that would stop or spoil training or evaluation, one sentence each; mere hints are logged.

    Args:
        cfg: its ``DATASETS.TRAIN`` and ``TEST`` are checked.
        decode: also decode every image completely, which takes minutes for LVIS.
        training: check ``TRAIN`` too, not only ``TEST``.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    problems: list[str] = []

    def checked(check, *args, where=""):
        try:
            return check(*args)
        except InputError as error:
            problems.append(f"{where}{error}")

    needed = "TRAIN" if training else "TEST"
    if not cfg.DATASETS[needed]:
        problems.append(f"expected a dataset in DATASETS.{needed}, got none")
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
                f"expected MODEL.ROI_HEADS.NUM_CLASSES {len(classes)}, the classes of {name!r}, got {num_classes}"
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
    if train and not problems:
        total = torch.stack(counts).sum(0)
        problems += _unseen_classes(total, crowds, train)
        # These are the counts if none are given; a class without any is refused.
        given = checked(class_counts_from_config, cfg) if cfg.MODEL.DISALIGN.CALIBRATE else None
        if given is not None and cfg.MODEL.DISALIGN.COUNT_UNIT == "instances" and not torch.equal(given, total):
            logger.warning(
                "MODEL.DISALIGN.CLASS_COUNTS %r differs from the counts of %s; '' would count them",
                cfg.MODEL.DISALIGN.CLASS_COUNTS,
                some(train),
            )
    return problems


def _classes(name) -> list[str]:
    return MetadataCatalog.get(name).get("thing_classes") or []


def _require_images(name, records) -> None:
    gone = missing_files([record["file_name"] for record in records if "://" not in record["file_name"]])
    if gone:
        raise InputError(
            f"expected {len(records)} images of {name!r}, but {len(gone)} are missing: {some(gone, 3)}; {CHECK_PATH}"
        )


def _untrainable_masks(name, records, cfg) -> Iterator[str]:
    if not cfg.MODEL.MASK_ON:
        return
    images = [
        [one.get("segmentation") for one in record.get("annotations", ()) if not one.get("iscrowd", 0)]
        for record in records
    ]
    lacking = [sum(mask is None for mask in masks) for masks in images]
    # Stage two needs no masks, but Detectron2 reads all masks of an image or none.
    mixed = any(0 < none < len(masks) for none, masks in zip(lacking, images, strict=True))
    if mixed or (any(lacking) and not cfg.MODEL.DISALIGN.CALIBRATE):
        yield (
            f"expected a mask for every annotation of {name!r}, as MODEL.MASK_ON says, but {sum(lacking)} have none; "
            "add them, or train a model without masks"
        )
    rle = sum(isinstance(mask, dict) for masks in images for mask in masks)
    if rle and cfg.INPUT.MASK_FORMAT == "polygon":
        yield f"expected polygons in {name!r}, as INPUT.MASK_FORMAT says, but {rle} masks are RLE; set it to 'bitmask'"


def _require_ground_truth(name, cfg) -> None:
    """Refuse now what the evaluator would refuse after hours of training."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "lvis":
        return
    ground_truth = read_json(PathManager.get_local_path(metadata.json_file), "annotations")
    if ground_truth.get("annotations"):  # a test set without annotations is not evaluated
        for iou_type in ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",):
            check_ground_truth(ground_truth, iou_type)


def _log_odd_boxes(name, records) -> None:
    """Log boxes that Detectron2 leaves out, and those that are not x, y, width and height in pixels."""
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


def _unseen_classes(counts, crowds, train) -> Iterator[str]:
    names = _classes(train[0]) or range(len(counts))
    unseen = [names[index] for index in (counts == 0).nonzero().flatten().tolist()]
    reason = (
        f"; {crowds} of {int(counts.sum()) + crowds} annotations are crowds, which do not train: if they are objects "
        "(CVAT marks RLE masks so), set their iscrowd to 0"
    )
    if len(unseen) == len(counts):
        yield f"expected training instances in {some(train)}, got none{reason if crowds else '; check the annotations'}"
    elif unseen:
        message = "%d of %d classes have no training instance: %s%s"
        logger.warning(message, len(unseen), len(counts), some(unseen), reason if crowds else "")


def _broken_images(name, records, image_format) -> list[str]:
    mapper = CheckedMapper(is_train=False, augmentations=[], image_format=image_format)

    def problem(record):
        try:
            mapper(record)
        except InputError as error:
            # Missing ones are reported already.
            return None if isinstance(error.__context__, FileNotFoundError) else str(error)

    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(problem, records), total=len(records), desc=name, unit="image")
        return [sentence for sentence in found if sentence]
