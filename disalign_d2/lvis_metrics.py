"""LVIS's average precision, computed by faster-coco-eval; no framework needed."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from reprlib import repr as short

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api
from tqdm import tqdm

from disalign import InputError, frequent_common_rare, group_means
from disalign.counts import ClassCounts
from disalign.errors import some
from disalign.io.annotations import is_box, is_known, is_number, require_format, require_keys
from disalign.report import report, shown, text_table

#: Training images per category, in the order of their ids, or a function that counts them if they are needed.
ImageCounts = ClassCounts | Callable[[], ClassCounts | None] | None
#: LVIS's groups by number of training images: rare (at most 10), common (at most 100), frequent.
GROUPS = ("r", "c", "f")
#: Suffixes of the area ranges, in faster-coco-eval's order: all, small (to 32^2 pixels), medium (to 96^2), large.
AREAS = ("", "s", "m", "l")
#: IoU type -> the key of the shape that it compares.
SHAPE = {"bbox": "bbox", "segm": "segmentation"}
#: Index of IoU 0.5 and 0.75 in 0.5, 0.55, ... 0.95.
IOU_50, IOU_75 = 0, 5


def evaluate_lvis(
    ground_truth: dict,
    detections: list[dict],
    iou_type: str = "bbox",
    max_dets: int = 300,
    image_counts: ImageCounts = None,
    per: str = "image_id",
) -> dict:
    """The figures of lvis-api, by the rules of Gupta et al. 2019, "LVIS".

    A category is judged only on the images that show it or are verified not to (``neg_category_ids``); where an image
    is not annotated exhaustively for it (``not_exhaustive_category_ids``), an unmatched detection is no error.

    Args:
        ground_truth: the content of an annotation file in LVIS format; or in COCO format: an image without
            ``neg_category_ids`` counts as annotated exhaustively for all categories, and its crowds as in COCO.
        detections: each with ``image_id``, ``category_id``, ``score`` and ``bbox`` (x, y, width, height; pixels) or
            ``segmentation`` (compressed RLE). Of equal scores the first ranks higher.
        iou_type: ``"bbox"``, or ``"segm"``: the area of a detection is then its mask's.
        max_dets: the best detections of each image that count; negative: all.
        image_counts: (K,) training images per category, in the order of their ids, for r, c and f where the file does
            not give the ``frequency``; what :func:`disalign.load_class_counts` takes, or a function that returns it.
        per: ``"category_id"``: ``max_dets`` limits the detections of each category, not of each image.

    Returns:
        A :func:`disalign.report.report`: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR, ARs, ARm, ARl; and per class
        (in the order of the ids) ``id``, ``group`` and ``AP``; None where there is no ground truth, or no known group.

    Raises:
        InputError: annotations or detections of another form, or detections of what the annotations do not list.
    """
    _check(ground_truth, detections, iou_type)
    letters = _letters(ground_truth, image_counts)
    # In COCO format an image is annotated for all categories, and may have crowds.
    in_coco_format = {image["id"] for image in ground_truth["images"] if "neg_category_ids" not in image}
    defaults = {"neg_category_ids": letters, "not_exhaustive_category_ids": ()}
    images = {image["id"]: defaults | image for image in ground_truth["images"]}
    objects = [
        annotation
        | {
            "id": place,
            # Objects outside every area range are ignored.
            "area": -1 if annotation.get("ignore") else annotation["area"],
            "iscrowd": annotation.get("iscrowd", 0) if annotation["image_id"] in in_coco_format else 0,
        }
        for place, annotation in enumerate(ground_truth["annotations"], 1)  # 0 marks unmatched ones
    ]
    present = {(annotation["image_id"], annotation["category_id"]) for annotation in objects}
    judged = [
        detection
        for group in _grouped(detections, per).values()
        # Of equal scores the first, as lvis-api does.
        for detection in sorted(group, key=lambda detection: -detection["score"])[: max_dets if max_dets >= 0 else None]
        if detection["category_id"] in images[detection["image_id"]]["neg_category_ids"]
        or (detection["image_id"], detection["category_id"]) in present
    ]
    annotations, detected = _grouped(objects, "category_id"), _grouped(judged, "category_id")

    # One category at a time: no category's figures depend on another's, and faster-coco-eval takes time and memory for
    # every pair of image and category that it is given, of which LVIS judges one in a hundred.
    precision = np.full((len(letters), 10, len(AREAS)), np.nan)
    recall = precision.copy()
    for index, category in enumerate(tqdm(letters, desc=iou_type, unit="category", disable=None, leave=False)):
        if category in annotations:
            precision[index], recall[index] = _of_category(annotations[category], detected[category], images, iou_type)

    ap, letter = precision[:, :, 0].mean(1), np.array(list(letters.values()))
    members = {group: letter == group for group in GROUPS}
    columns = {
        "AP": ap,
        "AP50": precision[:, IOU_50, 0],
        "AP75": precision[:, IOU_75, 0],
        **{f"AP{area}": precision[:, :, place].mean(1) for place, area in enumerate(AREAS) if area},
        **{f"AP{group}": np.where(chosen, ap, np.nan) for group, chosen in members.items()},
        **{f"AR{area}": recall[:, :, place].mean(1) for place, area in enumerate(AREAS)},
    }
    everything = torch.ones(len(letters), dtype=torch.bool)
    means = {name: group_means(values, {name: everything})[name] for name, values in columns.items()}
    names = {category["id"]: category.get("name") for category in ground_truth["categories"]}
    return report(
        {name: None if mean is None else 100 * mean for name, mean in means.items()},
        per_class={"id": list(letters), "group": list(letters.values()), "AP": (100 * ap).tolist()},
        images=len(images),
        groups={
            "split": "LVIS's, by training images: r at most 10, c at most 100, f more",
            "classes": {group: int(chosen.sum()) for group, chosen in members.items()},
            "evaluated": {group: int((chosen & ~np.isnan(ap)).sum()) for group, chosen in members.items()},
        },
        classes=[names[category] for category in letters],
    )


def fixed_ap(
    ground_truth: dict,
    detections: list[dict],
    iou_type: str = "bbox",
    per_category: int = 10_000,
    image_counts: ImageCounts = None,
) -> dict:
    """The fixed AP of Dave et al. 2021, "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details".

    As :func:`evaluate_lvis`, but for each category the ``per_category`` best detections of the whole set count, with
    no limit per image. The detector must not have cut them to 300 per image.

    Returns:
        ``figures`` AP-fixed, AP50-fixed, ... APf-fixed and ``per_class`` AP-fixed, to be added to the other report's.
    """
    fixed = evaluate_lvis(ground_truth, detections, iou_type, per_category, image_counts, per="category_id")
    figures = {f"{name}-fixed": value for name, value in fixed["figures"].items() if name.startswith("AP")}
    return {"figures": figures, "per_class": {"AP-fixed": fixed["per_class"]["AP"]}}


def evaluation_reports(
    ground_truth: dict,
    detections: list[dict],
    iou_types: Iterable[str],
    max_dets: int = 300,
    fixed: bool = False,
    image_counts: ImageCounts = None,
) -> dict[str, dict]:
    """IoU type -> the report of :func:`evaluate_lvis`, with :func:`fixed_ap` if ``fixed``."""
    reports = {}
    for iou_type in iou_types:
        reports[iou_type] = evaluate_lvis(ground_truth, detections, iou_type, max_dets, image_counts)
        if fixed:
            for part, values in fixed_ap(ground_truth, detections, iou_type, image_counts=image_counts).items():
                reports[iou_type][part] |= values
    return reports


def table(reports: dict[str, dict]) -> str:
    """The figures as text: a row for each figure, a column for each IoU type, n/a where there is no ground truth."""
    columns = [content["figures"] for content in reports.values()]
    rows = [[name, *(shown(column[name], ".2f") for column in columns)] for name in columns[0]]
    return text_table([["percent", *reports], *rows])


def _grouped(items: list[dict], key: str) -> dict[int, list[dict]]:
    groups = defaultdict(list)
    for item in items:
        groups[item[key]].append(item)
    return groups


def _of_category(annotations, detections, images, iou_type) -> tuple[np.ndarray, np.ndarray]:
    """Mean precision over the recalls, and recall, both (10 IoUs, 4 areas); NaN in an area without ground truth."""
    listed = {
        "images": [images[key] for key in {item["image_id"] for item in annotations + detections}],
        # faster-coco-eval requires a letter; the groups are formed from the APs of all categories.
        "categories": [{"id": annotations[0]["category_id"], "frequency": "f"}],
    }
    evaluation = COCOeval_faster(
        COCO(listed | {"annotations": annotations}),
        COCO(listed | {"annotations": _detections(detections, iou_type)}),
        iou_type,
        lvis_style=True,
        print_function=lambda *_: None,
        rle_iou_max_workers=1,  # a pool of threads for each category costs more than it gains
    )
    evaluation.params.maxDets = [max(len(detections), 1)]  # they are limited already
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][:, :, 0, :, 0], evaluation.eval["recall"][:, 0, :, 0]
    # -1 marks a lack of ground truth, at all recalls.
    return np.where(precision > -1, precision, np.nan).mean(1), np.where(recall > -1, recall, np.nan)


def _letters(ground_truth, image_counts) -> dict[int, str | None]:
    """Category id -> r, c, f, or None if unknown; in the order of the ids."""
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    letters = {category["id"]: category.get("frequency") for category in categories}
    if all(letters.values()):
        return letters
    image_counts = image_counts() if callable(image_counts) else image_counts
    if image_counts is None:
        return letters
    groups = frequent_common_rare(image_counts)
    if len(groups["f"]) != len(letters):
        raise InputError(f"expected image counts of the annotations' {len(letters)} categories, got {len(groups['f'])}")
    return {category: next(group for group in GROUPS if groups[group][index]) for index, category in enumerate(letters)}


def _detections(detections, iou_type) -> list[dict]:
    """One category's detections for faster-coco-eval, with the areas of the boxes or of the masks."""
    shapes = [detection[SHAPE[iou_type]] for detection in detections]
    try:
        areas = mask_api.area(shapes).tolist() if iou_type == "segm" and shapes else [box[2] * box[3] for box in shapes]
    except ValueError as error:
        raise InputError(f"expected compressed RLE as segmentation of each detection, but of one: {error}") from None
    return [
        detection | {"id": place, "area": area}
        for place, (detection, area) in enumerate(zip(detections, areas, strict=True), 1)
    ]


def check_ground_truth(ground_truth: dict, iou_type: str) -> None:
    """Refuse annotations that would break the evaluation or be silently misread."""
    if iou_type not in SHAPE:
        raise InputError(f"expected {' or '.join(SHAPE)} as IoU type, got {iou_type!r}")
    key = SHAPE[iou_type]
    needed = {"images": ("id", "height", "width"), "categories": ("id",)}
    require_format(ground_truth, needed | {"annotations": ("image_id", "category_id", "area", key)})
    for annotation in ground_truth["annotations"]:
        if not annotation[key] or not is_number(annotation["area"]):
            raise InputError(
                f"expected a {key} and a finite area of each annotation, got {short(annotation[key])} and "
                f"{short(annotation['area'])} of annotation {annotation.get('id')}"
            )
    unknown = {category.get("frequency") for category in ground_truth["categories"]} - {*GROUPS, None}
    if unknown:
        raise InputError(f"expected r, c or f as frequency of the categories, got {some(unknown)}")


def _check(ground_truth, detections, iou_type) -> None:
    if not isinstance(detections, list):
        what = type(detections).__name__
        raise InputError(f"expected a list of detections, got {what}; give the detections first, then the annotations")
    check_ground_truth(ground_truth, iou_type)
    key = SHAPE[iou_type]
    require_keys(detections, ("image_id", "category_id", "score", key), "detection")
    sizes = {image["id"]: [image["height"], image["width"]] for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    for item in detections:
        if not is_known(item["image_id"], sizes) or not is_known(item["category_id"], categories):
            raise InputError(
                f"expected only images and categories that the annotations list, got the detection {short(item)}; "
                "are both of the same dataset?"
            )
        if not is_number(item["score"]):
            raise InputError(f"expected a finite score of each detection, got {short(item)}")
        shape, size = item[key], sizes[item["image_id"]]
        if iou_type == "bbox" and not is_box(shape):
            raise InputError(f"expected x, y, width and height as bbox of a detection, got {short(shape)}")
        is_rle = isinstance(shape, dict) and isinstance(shape.get("counts"), (str, bytes))
        if iou_type == "segm" and not (is_rle and shape.get("size") == size):
            raise InputError(
                f"expected compressed RLE of the image's size {size} as segmentation of a detection, got {short(shape)}"
            )
