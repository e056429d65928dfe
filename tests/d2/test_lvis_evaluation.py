import json
import logging
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

detectron2 = pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import print_csv_format
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from disalign import InputError
from disalign_d2.evaluate import main
from disalign_d2.lvis_evaluation import DisAlignLVISEvaluator
from disalign_d2.lvis_metrics import evaluate_lvis, evaluation_reports, fixed_ap, table

IDS = [2, 3, 5, 8, 13, 21, 22, 34, 55, 89, 144, 233]
LETTERS = dict(zip(IDS, "rfcfrcffcrcr", strict=True))
UNSEEN = 233  # rare, and no image shows it
IOU_TYPES = ("bbox", "segm")
FIGURES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR", "ARs", "ARm", "ARl"]


def outline(box, corners=14):
    """A polygon inside the box: its mask's area is not the box's."""
    x, y, width, height = box
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    points = np.stack([x + width / 2 * (1 + np.cos(angles)), y + height / 2 * (1 + np.sin(angles))], 1)
    return points.ravel().round(2).tolist()


def rle(box, size):
    encoded = mask_api.frPyObjects([outline(box)], *size)[0]
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def uncompressed(box, size):
    pixels = decoded(rle(box, size)).ravel(order="F")
    counts, value = [], 0
    while pixels.size:
        run = int(np.argmax(pixels != value)) if (pixels != value).any() else pixels.size
        counts.append(run)
        pixels, value = pixels[run:], 1 - value
    return {"size": list(size), "counts": counts}


def decoded(mask):
    return mask_api.decode([mask])[:, :, 0]


def random_set(num_images=110, seed=0):
    """An LVIS-format set with whatever makes an evaluation go wrong, and its detections (see the asserts)."""
    random = np.random.default_rng(seed)
    images, annotations, detections = [], [], []
    seen_ids = [category for category in IDS if category != UNSEEN]
    for number, image_id in enumerate(random.permutation(num_images).tolist()):
        size = [int(side) for side in random.integers(150, 320, 2)]
        listed = random.permutation(seen_ids)[:6].tolist()
        shown = [] if number % 10 == 0 else listed[:3]  # no ground truth: every detection is wrong
        verified = [] if number % 20 == 0 else [*listed[3:], UNSEEN]  # or none is judged
        image = {
            "id": 7 * image_id + 1000,
            "height": size[0],
            "width": size[1],
            "neg_category_ids": verified,
            "not_exhaustive_category_ids": [*shown[:1], *verified[:1]],
        }
        images.append(image)
        boxes = []
        for index in range(9 if shown else 0):
            sides = random.uniform(*[(8, 30), (30, 90), (100, 150)][index % 3], 2)
            box = [*(random.uniform(0, 1, 2) * (np.array(size[::-1]) - sides)), *sides]
            box = [round(float(value), 2) for value in box]
            boxes.append((box, shown[random.integers(len(shown))]))
            form = [[outline(box)], rle(box, size), uncompressed(box, size)][random.integers(3)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": boxes[-1][1],
                    "bbox": box,
                    "area": float(mask_api.area(rle(box, size))),
                    "segmentation": form,
                    "iscrowd": int(random.uniform() < 0.1),  # LVIS does not look at it
                    "ignore": int(random.uniform() < 0.1),
                }
            )
        for index in range(420 if number == 3 else 45):
            box, category = boxes[random.integers(len(boxes))] if boxes else ([10.0, 12.0, 50.0, 40.0], IDS[index % 12])
            if index % 4 == 3:  # what the image shows, does not show, or is not annotated for
                category = IDS[random.integers(len(IDS))]
            moved = np.array(box) + random.normal(0, 0.07, 4) * np.array([*box[2:], *box[2:]])
            box = np.maximum(moved, [0, 0, 3, 3]).round(3).tolist()
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": int(category),
                    "score": round(float(random.uniform()), 2 if index % 2 else 4),
                    "bbox": box,
                    "segmentation": rle(box, size),
                }
            )
    categories = [{"id": category, "name": f"name {category}", "frequency": LETTERS[category]} for category in IDS]
    random.shuffle(categories)
    return {"images": images, "annotations": annotations, "categories": categories}, detections


@pytest.fixture(scope="module")
def generated():
    return random_set()


def test_the_generated_set_holds_what_it_should(generated):
    ground_truth, detections = generated
    shown = {(item["image_id"], item["category_id"]) for item in ground_truth["annotations"]}
    images = {image["id"]: image for image in ground_truth["images"]}
    kinds = dict.fromkeys(("shown", "verified", "unknown", "not exhaustive"), 0)
    for item in detections:
        image, category = images[item["image_id"]], item["category_id"]
        kinds["not exhaustive"] += category in image["not_exhaustive_category_ids"]
        judged = "shown" if (image["id"], category) in shown else "verified"
        kinds["unknown" if judged == "verified" and category not in image["neg_category_ids"] else judged] += 1
    assert min(kinds.values()) > 200
    assert len(images) >= 100
    assert len(images) - len({image for image, _ in shown}) >= 10
    areas = np.array([item["area"] for item in ground_truth["annotations"]])
    assert min((areas < 32**2).sum(), ((areas > 32**2) & (areas < 96**2)).sum(), (areas > 96**2).sum()) > 100
    scores = [(item["image_id"], item["category_id"], item["score"]) for item in detections]
    assert len(scores) - len(set(scores)) > 50  # ties, inside an image and class
    assert max(np.unique([item["image_id"] for item in detections], return_counts=True)[1]) > 300


def lvis_api(ground_truth, detections, iou_type, folder, max_dets=300):
    """lvis-api's figures and APs per category, 0..1, -1 where there is none; as Detectron2 calls it."""
    lvis = pytest.importorskip("lvis")
    path = folder / "annotations.json"
    path.write_text(json.dumps(ground_truth))
    other = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    detections = [{key: value for key, value in item.items() if key != other} for item in detections]
    annotations = lvis.LVIS(str(path))
    evaluation = lvis.LVISEval(annotations, lvis.LVISResults(annotations, detections, max_dets), iou_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 is older than the numpy that dropped it
        evaluation.run()
    figures = {name.removesuffix("@300"): float(value) for name, value in evaluation.get_results().items()}
    precision = evaluation.eval["precision"][:, :, :, 0].mean((0, 1)).tolist()
    return figures, dict(zip(evaluation.params.cat_ids, precision, strict=True))


def by_category(report):
    """Category id -> AP."""
    return dict(zip(report["per_class"]["id"], report["per_class"]["AP"], strict=True))


def in_units(figures):
    """0..1, -1 where there is none, as lvis-api has it."""
    return {name: -1 if value is None else value / 100 for name, value in figures.items()}


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_equals_lvis_api(generated, iou_type, tmp_path):
    ground_truth, detections = generated
    before = json.dumps(generated)
    ours = evaluate_lvis(ground_truth, detections, iou_type)
    assert json.dumps(generated) == before
    theirs, per_category = lvis_api(ground_truth, detections, iou_type, tmp_path)
    assert list(ours["figures"]) == FIGURES
    assert in_units(ours["figures"]) == pytest.approx(theirs, abs=1e-6)
    assert in_units(by_category(ours)) == pytest.approx(per_category, abs=1e-6)
    assert by_category(ours)[UNSEEN] is None
    assert all(0.01 < theirs[name] < 0.99 for name in FIGURES)
    assert len({round(value, 6) for value in theirs.values()}) == len(FIGURES)


@pytest.mark.parametrize("max_dets", [20, -1])
def test_limit_per_image(generated, max_dets, tmp_path):
    ours = evaluate_lvis(*generated, "bbox", max_dets=max_dets)
    theirs, _ = lvis_api(*generated, "bbox", tmp_path, max_dets)
    assert in_units(ours["figures"]) == pytest.approx(theirs, abs=1e-6)
    assert ours["figures"]["AP"] != pytest.approx(evaluate_lvis(*generated, "bbox")["figures"]["AP"], abs=1e-4)


def iou(a, b):
    """Of two boxes (x, y, width, height)."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def brute_force_ap(ground_truth, detections, category, limit):
    """AP of one category's best ``limit`` detections: one threshold, one detection and one object at a time."""
    images = {image["id"]: image for image in ground_truth["images"]}
    objects = [item for item in ground_truth["annotations"] if item["category_id"] == category]
    number = sum(not item["ignore"] for item in objects)
    if not number:
        return None
    ranked = sorted((item for item in detections if item["category_id"] == category), key=lambda d: -d["score"])[:limit]
    ranked.sort(key=lambda d: (-d["score"], d["image_id"]))
    aps = []
    for threshold in [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]:
        free = {id(item) for item in objects}
        hits, curve, right, wrong = 0, [], 0, 0
        for detection in ranked:
            image = images[detection["image_id"]]
            here = [item for item in objects if item["image_id"] == image["id"]]
            if not here and category not in image["neg_category_ids"]:
                continue
            near = [(not o["ignore"], iou(detection["bbox"], o["bbox"]), id(o)) for o in here if id(o) in free]
            best = max((candidate for candidate in near if candidate[1] >= threshold), default=None)
            if best:
                free.remove(best[2])
                right += best[0]
            else:
                wrong += category not in image["not_exhaustive_category_ids"]
            if right + wrong:
                curve.append((right / number, right / (right + wrong)))
        for recall in np.linspace(0, 1, 101):
            hits += max((precision for reached, precision in curve if reached >= recall), default=0)
        aps.append(hits / 101)
    return sum(aps) / len(aps)


def test_fixed_ap_by_brute_force(generated):
    ground_truth, detections = generated
    fixed = fixed_ap(ground_truth, detections, "bbox", per_category=150)
    expected = {category: brute_force_ap(ground_truth, detections, category, 150) for category in IDS}
    of_categories = dict(zip(IDS, fixed["per_class"]["AP-fixed"], strict=True))
    assert in_units(of_categories) == pytest.approx({k: -1 if v is None else v for k, v in expected.items()})
    assert max(expected[category] for category in IDS[:-1]) > min(expected[category] for category in IDS[:-1]) + 0.02
    for group in "rcf":
        members = [expected[category] for category in IDS if LETTERS[category] == group and category != UNSEEN]
        assert fixed["figures"][f"AP{group}-fixed"] / 100 == pytest.approx(sum(members) / len(members))
    everyone = [value for value in expected.values() if value is not None]
    assert fixed["figures"]["AP-fixed"] / 100 == pytest.approx(sum(everyone) / len(everyone))


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_fixed_ap_is_lvis_api_without_a_limit_per_image(generated, iou_type, tmp_path):
    ground_truth, detections = generated
    fixed = fixed_ap(ground_truth, detections, iou_type, per_category=200)
    kept = []
    for category in IDS:
        members = sorted(
            (d for d in detections if d["category_id"] == category), key=lambda d: d["score"], reverse=True
        )
        kept += members[:200]
        assert len(members) > 200 or category == UNSEEN
    theirs, _ = lvis_api(ground_truth, kept, iou_type, tmp_path, max_dets=-1)
    assert in_units(fixed["figures"]) == pytest.approx(
        {f"{name}-fixed": value for name, value in theirs.items() if name[:2] == "AP"}, abs=1e-6
    )


def test_fixed_ap_counts_what_one_image_has_beyond_300():
    """Two objects; the detection of the second is the 301st of its image, and of another category than the rest."""
    ground_truth = tiny_set()
    detections = [detection(1, 2, [50, 50, 20, 20], 0.9) for _ in range(300)]
    detections += [detection(1, 4, [10, 10, 20, 20], 0.1), detection(2, 4, [10, 10, 20, 20], 0.05)]
    assert by_category(evaluate_lvis(ground_truth, detections))[4] == pytest.approx(100 * 51 / 101)
    assert fixed_ap(ground_truth, detections)["per_class"]["AP-fixed"] == [None, pytest.approx(100), None]
    # Exactly 10,000 of a category: one more, the worst, is cut.
    many = [detection(1, 4, [50, 50, 20, 20], 0.9) for _ in range(9_999)]
    last = detection(1, 4, [10, 10, 20, 20], 0.5)
    assert fixed_ap(ground_truth, [*many, last])["figures"]["AP-fixed"] > 0
    assert fixed_ap(ground_truth, [*many, many[0], last])["figures"]["AP-fixed"] == 0


def detection(image_id, category_id, box, score, size=(100, 120)):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(value) for value in box],
        "score": score,
        "segmentation": rle(box, size),
    }


def tiny_set(**image_options):
    """Two images of 120 x 100 with one small object each, of category 4; 2 and 9 are nowhere."""
    listed = {"neg_category_ids": [2, 9], "not_exhaustive_category_ids": []} | image_options
    return {
        "images": [{"id": key, "height": 100, "width": 120} | listed for key in (1, 2)],
        "annotations": [
            {
                "id": key,
                "image_id": key,
                "category_id": 4,
                "bbox": [10, 10, 20, 20],
                "area": float(mask_api.area(rle([10, 10, 20, 20], (100, 120)))),
                "segmentation": [outline([10, 10, 20, 20])],
            }
            for key in (1, 2)
        ],
        "categories": [
            {"id": 2, "name": "two", "frequency": "r"},
            {"id": 4, "name": "four", "frequency": "c"},
            {"id": 9, "name": "nine", "frequency": "f"},
        ],
    }


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_no_detections_are_zero_and_no_ground_truth_is_none(iou_type):
    evaluation = evaluate_lvis(tiny_set(), [], iou_type)
    missing = {"APm", "APl", "APr", "APf", "ARm", "ARl"}
    assert evaluation["figures"] == {name: None if name in missing else 0 for name in FIGURES}
    assert by_category(evaluation) == {2: None, 4: 0, 9: None}
    fixed = fixed_ap(tiny_set(), [], iou_type)["figures"]
    assert (fixed["AP-fixed"], fixed["APr-fixed"]) == (0, None)


def test_no_annotations_at_all():
    empty = tiny_set() | {"annotations": []}
    assert set(evaluate_lvis(empty, [detection(1, 2, [10, 10, 20, 20], 0.5)])["figures"].values()) == {None}


def test_only_ignored_objects_are_no_ground_truth():
    ground_truth = tiny_set()
    for annotation in ground_truth["annotations"]:
        annotation["ignore"] = 1
    assert evaluate_lvis(ground_truth, [detection(1, 4, [10, 10, 20, 20], 0.5)])["figures"]["AP"] is None


def test_annotation_ids_do_not_matter():
    """lvis-api takes a match with the annotation 0 for none."""
    ground_truth = tiny_set()
    for annotation in ground_truth["annotations"]:
        annotation["id"] = 0
    found = [detection(key, 4, [10, 10, 20, 20], 0.5) for key in (1, 2)]
    assert evaluate_lvis(ground_truth, found)["figures"]["AP"] == pytest.approx(100)


def coco_set(generated):
    """The same set in COCO format: no lists, no letters."""
    ground_truth, detections = generated
    images = [{key: image[key] for key in ("id", "height", "width")} for image in ground_truth["images"]]
    annotations = [
        {key: value for key, value in item.items() if key != "ignore"} for item in ground_truth["annotations"]
    ]
    categories = [{key: item[key] for key in ("id", "name")} for item in ground_truth["categories"]]
    by_image = {image["id"]: 0 for image in images}
    few = []  # pycocotools limits per category, lvis-api per image
    for item in detections:
        by_image[item["image_id"]] += 1
        if by_image[item["image_id"]] <= 300:
            few.append(item)
    return {"images": images, "annotations": annotations, "categories": categories}, few


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_coco_format_equals_pycocotools(generated, iou_type):
    ground_truth, detections = coco_set(generated)
    assert sum(item["iscrowd"] for item in ground_truth["annotations"]) > 20
    ours = evaluate_lvis(ground_truth, detections, iou_type)
    coco = COCO()
    coco.dataset = json.loads(json.dumps(ground_truth))
    coco.createIndex()
    other = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    found = coco.loadRes([{key: value for key, value in item.items() if key != other} for item in detections])
    theirs = COCOeval(coco, found, iou_type)
    theirs.params.maxDets = [300]
    theirs.evaluate()
    theirs.accumulate()
    precision, recall = theirs.eval["precision"][..., 0], theirs.eval["recall"][..., 0]
    for place, suffix in enumerate(("", "s", "m", "l")):
        for name, values in (("AP", precision[:, :, :, place]), ("AR", recall[:, :, place])):
            assert ours["figures"][name + suffix] / 100 == pytest.approx(values[values > -1].mean(), abs=1e-6)
    assert [ours["figures"][f"AP{group}"] for group in "rcf"] == [None] * 3


def test_coco_format_takes_its_groups_from_image_counts(generated):
    ground_truth, detections = coco_set(generated)
    counts = [{"r": 10, "c": 100, "f": 101}[LETTERS[category]] for category in IDS]
    evaluation = evaluate_lvis(ground_truth, detections, image_counts=counts)
    for group in "rcf":
        members = [by_category(evaluation)[key] for key in IDS if LETTERS[key] == group and key != UNSEEN]
        assert evaluation["figures"][f"AP{group}"] == pytest.approx(sum(members) / len(members))
    with pytest.raises(InputError, match="image counts of the annotations' 12 categories, got 11"):
        evaluate_lvis(ground_truth, detections, image_counts=counts[1:])
    # The file's own letters come first.
    own = evaluate_lvis(*generated)
    assert evaluate_lvis(*generated, image_counts=[1] * len(IDS))["figures"] == own["figures"]


def test_reports_and_table():
    found = [detection(1, 4, [10, 10, 20, 20], 0.5)]
    reports = evaluation_reports(tiny_set(), found, ["bbox", "segm"], fixed=True)
    assert list(reports) == ["bbox", "segm"]
    for report in reports.values():
        half = pytest.approx(100 * 51 / 101)
        assert {key: value for key, value in report.items() if key != "figures"} == {
            "images": 2,
            "groups": {
                "split": "LVIS's, by training images: r at most 10, c at most 100, f more",
                "classes": {"r": 1, "c": 1, "f": 1},
                "evaluated": {"r": 0, "c": 1, "f": 0},
            },
            "classes": ["two", "four", "nine"],
            "unit": "percent",
            "per_class": {
                "id": [2, 4, 9],
                "group": ["r", "c", "f"],
                "AP": [None, half, None],
                "AP-fixed": [None, half, None],
            },
        }
        assert list(report["figures"]) == FIGURES + [f"{name}-fixed" for name in FIGURES if name[:2] == "AP"]
    rows = {line.split()[0]: line.split()[1:] for line in table(reports).splitlines()}
    assert rows["percent"] == ["bbox", "segm"]
    assert rows["AP"] == rows["APc-fixed"] == ["50.50", "50.50"]
    assert rows["AR"] == ["50.00", "50.00"]
    assert rows["APr"] == rows["APl-fixed"] == ["n/a", "n/a"]
    json.dumps(reports, allow_nan=False)


def test_a_report_without_letters_and_names_has_null_for_them():
    ground_truth = tiny_set()
    ground_truth["categories"] = [{"id": category["id"]} for category in ground_truth["categories"]]
    report = evaluation_reports(ground_truth, [], ["bbox"])["bbox"]
    assert report["classes"] == report["per_class"]["group"] == [None, None, None]
    assert report["per_class"]["AP"] == [None, 0, None]
    assert report["groups"]["classes"] == report["groups"]["evaluated"] == {"r": 0, "c": 0, "f": 0}


BAD = {
    "not a list": ({"image_id": 1}, "expected a list of detections"),
    "no dict": ([3], "expected bbox, category_id, image_id, score of each detection, got no"),
    "no box": ([{"image_id": 1, "category_id": 4, "score": 0.5}], "bbox"),
    "unknown image": ([detection(77, 4, [1, 1, 5, 5], 0.5)], "annotations list, got the detection .*77"),
    "unknown category": ([detection(1, 3, [1, 1, 5, 5], 0.5)], "annotations list, got the detection"),
    "NaN score": ([detection(1, 4, [1, 1, 5, 5], math.nan)], "finite score"),
    "text score": ([detection(1, 4, [1, 1, 5, 5], "0.5")], "finite score"),
    "three numbers": ([detection(1, 4, [1, 1, 5, 5], 0.5) | {"bbox": [1, 2, 3]}], "x, y, width and height"),
    "text box": ([detection(1, 4, [1, 1, 5, 5], 0.5) | {"bbox": ["1", 2, 3, 4]}], "x, y, width and height"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_detections(name):
    detections, words = BAD[name]
    for function in (evaluate_lvis, fixed_ap):
        with pytest.raises(InputError, match=words):
            function(tiny_set(), detections)


@pytest.mark.parametrize(
    "segmentation",
    [[[1, 1, 5, 1, 5, 5]], rle([1, 1, 5, 5], (120, 100)), {"size": [100, 120], "counts": [5, 5]}, None],
    ids=["polygon", "size", "uncompressed", "none"],
)
def test_bad_masks(segmentation):
    bad = detection(1, 4, [1, 1, 5, 5], 0.5) | {"segmentation": segmentation}
    with pytest.raises(InputError, match=r"compressed RLE of the image's size \[100, 120\]"):
        evaluate_lvis(tiny_set(), [bad], "segm")
    evaluate_lvis(tiny_set(), [bad], "bbox")


def test_broken_mask():
    bad = detection(1, 4, [1, 1, 5, 5], 0.5)
    bad["segmentation"] = {"size": [100, 120], "counts": "%%\x01"}
    with pytest.raises(InputError, match="compressed RLE as segmentation"):
        evaluate_lvis(tiny_set(), [bad], "segm")


def test_bad_annotations():
    for bad in ([], {}, {"images": [], "annotations": []}, tiny_set() | {"categories": None}):
        with pytest.raises(InputError, match=r"got no '(images|categories|annotations)'; is it in LVIS"):
            evaluate_lvis(bad, [])
    for name, key in (("images", "height"), ("annotations", "area"), ("annotations", "bbox"), ("categories", "id")):
        bad = tiny_set()
        del bad[name][0][key]
        with pytest.raises(InputError, match=f"expected .*{key}.* of each"):
            evaluate_lvis(bad, [])
    for name in ("image_id", "category_id"):
        bad = tiny_set()
        bad["annotations"][0][name] = 12345
        with pytest.raises(InputError, match=f"1 have another {name}: 12345 of annotation"):
            evaluate_lvis(bad, [])
    bad = tiny_set()
    bad["categories"][0]["frequency"] = "x"
    with pytest.raises(InputError, match="expected r, c or f as frequency of the categories, got x"):
        evaluate_lvis(bad, [])
    with pytest.raises(InputError, match="bbox or segm as IoU type, got 'keypoints'"):
        evaluate_lvis(tiny_set(), [], "keypoints")


@pytest.fixture
def registered(tmp_path):
    """Registers annotations; returns the dataset's name."""
    names = []

    def register(ground_truth, mapping=None):
        name = f"lvis_evaluation_{tmp_path.name}_{len(names)}"
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(ground_truth))
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(json_file=str(path))
        if mapping:
            MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = mapping
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def as_outputs(ground_truth, detections, labels, with_masks=True):
    """What a model gives and gets for these detections, an image at a time."""
    for image in ground_truth["images"]:
        here = [item for item in detections if item["image_id"] == image["id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([item["bbox"] for item in here], dtype=torch.float64).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float())
        instances.scores = torch.tensor([item["score"] for item in here])
        instances.pred_classes = torch.tensor([labels[item["category_id"]] for item in here], dtype=torch.int64)
        if with_masks:
            masks = [decoded(item["segmentation"]) for item in here]
            instances.pred_masks = torch.tensor(
                np.array(masks).reshape(-1, image["height"], image["width"]), dtype=torch.bool
            )
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def run(evaluator, outputs):
    evaluator.reset()
    for given, got in outputs:
        evaluator.process(given, got)
    return evaluator.evaluate()


@pytest.mark.parametrize("with_masks", [True, False])
def test_evaluator(registered, tmp_path, with_masks, caplog):
    ground_truth, detections = random_set(num_images=12, seed=1)
    mapping = {category: len(IDS) - 1 - label for label, category in enumerate(IDS)}
    name = registered(ground_truth, mapping)
    evaluator = DisAlignLVISEvaluator(name, output_dir=str(tmp_path / "out"), fixed_ap=True)
    results = run(evaluator, as_outputs(ground_truth, detections, mapping, with_masks))
    saved = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert len(saved) == len(detections)  # 420 of one image among them
    assert [item["category_id"] for item in saved] == [item["category_id"] for item in detections]
    tasks = ["bbox", "segm"] if with_masks else ["bbox"]
    assert list(results) == tasks
    for task in tasks:
        expected = evaluate_lvis(ground_truth, saved, task)["figures"] | fixed_ap(ground_truth, saved, task)["figures"]
        assert results[task] == pytest.approx(
            {k: math.nan if v is None else v for k, v in expected.items()}, nan_ok=True
        )
        assert results[task]["AP"] > 5
    reports = json.loads((tmp_path / "out" / "lvis_results.json").read_text())
    assert reports == json.loads(json.dumps(evaluation_reports(ground_truth, saved, tasks, fixed=True)))
    again = evaluator.evaluate()
    for task in tasks:
        assert again[task] == pytest.approx(results[task], nan_ok=True)
    caplog.set_level(logging.INFO)
    print_csv_format(results)
    assert "copypaste" in caplog.text


def test_evaluator_without_instances(registered, tmp_path):
    name = registered(tiny_set(), {2: 0, 4: 1, 9: 2})
    evaluator = DisAlignLVISEvaluator(name, tasks=("bbox", "segm"), output_dir=str(tmp_path / "out"))
    results = run(evaluator, as_outputs(tiny_set(), [], {}))
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == results[task]["APc"] == results[task]["AR"] == 0
        assert math.isnan(results[task]["APr"])
    reports = json.loads((tmp_path / "out" / "lvis_results.json").read_text())
    assert reports["bbox"]["figures"]["APr"] is None
    assert json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text()) == []


def test_evaluator_limits_and_image_counts(registered):
    """LVIS's own ids have no mapping: labels count from 0, ids from 1."""
    ground_truth = tiny_set()
    for category in ground_truth["categories"]:
        del category["frequency"]
    name = registered(ground_truth)
    found = [detection(1, 2, [50, 50, 20, 20], 0.9), detection(1, 4, [10, 10, 20, 20], 0.1)]
    outputs = list(as_outputs(ground_truth, found, {2: 1, 4: 3}, with_masks=False))
    evaluator = DisAlignLVISEvaluator(name, image_counts=[500, 5, 50])
    results = run(evaluator, outputs)["bbox"]
    assert results["APr"] == pytest.approx(100 * 51 / 101)
    assert math.isnan(results["APf"])
    assert math.isnan(results["APc"])
    assert run(DisAlignLVISEvaluator(name, image_counts=lambda: [500, 5, 50]), outputs)["bbox"] == pytest.approx(
        results, nan_ok=True
    )
    assert run(DisAlignLVISEvaluator(name, max_dets_per_image=1), outputs)["bbox"]["AP"] == 0


def test_evaluator_asks_for_image_counts_only_where_the_file_has_no_letters(registered):
    name = registered(tiny_set())
    evaluator = DisAlignLVISEvaluator(name, image_counts=lambda: pytest.fail("not needed"))
    found = [detection(1, 4, [10, 10, 20, 20], 0.1)]
    results = run(evaluator, as_outputs(tiny_set(), found, {4: 3}, with_masks=False))["bbox"]
    assert results["APc"] == pytest.approx(100 * 51 / 101)


def test_evaluator_of_a_test_set_saves_and_evaluates_nothing(registered, tmp_path):
    """Annotations of a test set hold images only."""
    name = registered(tiny_set() | {"annotations": []})
    evaluator = DisAlignLVISEvaluator(name, output_dir=str(tmp_path / "out"))
    outputs = as_outputs(tiny_set(), [detection(1, 4, [10, 10, 20, 20], 0.5)], {4: 3})
    assert run(evaluator, outputs) == {}
    assert len(json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())) == 1
    assert not (tmp_path / "out" / "lvis_results.json").exists()


@pytest.fixture
def saved(tmp_path, generated):
    """Files of detections and annotations."""
    ground_truth, detections = generated
    (tmp_path / "annotations.json").write_text(json.dumps(ground_truth))
    (tmp_path / "detections.json").write_text(json.dumps(detections))
    return str(tmp_path / "detections.json"), str(tmp_path / "annotations.json")


def test_command(saved, generated, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main([*saved, "--fixed-ap", "--out", str(out)]) == 0
    reports = json.loads(out.read_text())
    assert reports == json.loads(json.dumps(evaluation_reports(*generated, IOU_TYPES, fixed=True)))
    assert capsys.readouterr().out == table(reports) + "\n"
    again = [*saved, "--iou-type", "bbox", "--max-dets", "20", "--out", str(out)]
    assert main(again) == 2
    assert "exists; add --force to replace it" in capsys.readouterr().err
    assert main([*again, "--force"]) == 0
    reports = json.loads(out.read_text())
    assert list(reports) == ["bbox"]
    assert reports["bbox"]["figures"] == pytest.approx(evaluate_lvis(*generated, "bbox", max_dets=20)["figures"])


def test_command_takes_image_counts(tmp_path, capsys):
    ground_truth = tiny_set()
    for category in ground_truth["categories"]:
        del category["frequency"]
    (tmp_path / "annotations.json").write_text(json.dumps(ground_truth))
    (tmp_path / "detections.json").write_text("[]")
    (tmp_path / "counts.json").write_text("[500, 5, 50]")
    files = [str(tmp_path / "detections.json"), str(tmp_path / "annotations.json")]
    assert main([*files, "--image-counts", str(tmp_path / "counts.json")]) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (rows["APr"], rows["APc"], rows["APf"]) == ("0.00", "n/a", "n/a")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected detections at .* there is no such file"),
        ("[{", "expected detections as JSON in"),
        ("{}", "expected a list of detections, got dict; give the detections first"),
        ("[1]", "of each detection, got no"),
        (json.dumps([detection(77, 4, [1, 1, 5, 5], 0.5)]), "only images and categories that the annotations list"),
        (json.dumps([detection(1000, 4, [1, 1, 5, 5], 0.5)]), "only images and categories that the annotations list"),
    ],
    ids=["missing", "broken", "no list", "no detections", "image", "category"],
)
def test_command_refuses(saved, tmp_path, capsys, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), saved[1], "--out", str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert not (tmp_path / "out.json").exists()


def test_command_refuses_annotations(saved, tmp_path, capsys):
    for path, words in (
        (str(tmp_path / "none.json"), "no such file"),
        (saved[0], "LVIS or COCO format"),
        (str(tmp_path), "as JSON"),
    ):
        assert main([saved[0], path]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_at_least_twice_as_fast_as_lvis_api():
    pytest.importorskip("lvis")
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "lvis_evaluation.py"))
    for row in benchmark["measure"](num_images=40, num_categories=1203, num_detections=300, repeats=2):
        assert row["difference"] < 1e-6
        assert row["ratio"] >= 2, row


def test_the_files_that_are_read_are_not_overwritten(tmp_path, capsys):
    path = tmp_path / "detections.json"
    path.write_text("[]")
    assert main([str(path), "annotations.json", "--out", str(path)]) == 2
    assert "expected a file of its own as --out" in capsys.readouterr().err
    assert path.read_text() == "[]"
