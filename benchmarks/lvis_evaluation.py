"""How much faster the LVIS evaluation is than lvis-api's, on the same generated annotations and detections.

    python benchmarks/lvis_evaluation.py [--images 100] [--categories 1203] [--detections 300] [--repeats 3]

Both compute the same figures, boxes and masks, in turns in one process of one thread; the times are CPU seconds, the
best of the repeats. Of each image's detections two thirds are of categories that it is annotated for. Masks are
ellipses. Prints a line for boxes and one for masks; --out writes JSON. Needs the lvis package.
"""

import argparse
import json
import logging
import sys
import tempfile
import time

import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools import mask as mask_api
from tqdm import tqdm

from disalign.io import write_json
from disalign_d2.lvis_metrics import SHAPE, evaluate_lvis

SIZE = 240


def generate(num_images, num_categories, num_detections, seed=0) -> tuple[dict, list[dict]]:
    """An LVIS-format ground truth, eight objects of four categories an image, and detections around and beside them."""
    random = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, num_categories + 1)
    frequency /= frequency.sum()
    images, annotations, detections = [], [], []
    for image in tqdm(range(1, num_images + 1), desc="generate", file=sys.stderr):
        listed = random.choice(num_categories, min(12, num_categories), replace=False, p=frequency) + 1
        shown, verified = listed[:4].tolist(), listed[4:].tolist()
        images.append(
            {
                "id": image,
                "height": SIZE,
                "width": SIZE,
                "neg_category_ids": verified,
                "not_exhaustive_category_ids": shown[:1],
            }
        )
        boxes = np.concatenate([random.uniform(0, SIZE / 2, (8, 2)), random.uniform(8, SIZE / 2, (8, 2))], 1)
        objects = [(box, shown[index % len(shown)]) for index, box in enumerate(boxes)]
        for box, category in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": category} | shape(box))
        for index in range(num_detections):
            box, category = objects[random.integers(8)]
            if index % 3 == 1:
                category = int(random.choice(listed))
            elif index % 3 == 2:
                category = int(random.integers(num_categories)) + 1
            box = np.maximum(box + random.normal(0, 4, 4), [0, 0, 4, 4])
            score = round(float(random.uniform()), 3)
            detections.append({"image_id": image, "category_id": category, "score": score} | shape(box))
    letters = ["f" if share > 0.01 else "c" if share > 0.002 else "r" for share in frequency]
    categories = [{"id": index + 1, "name": str(index), "frequency": letter} for index, letter in enumerate(letters)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def shape(box) -> dict:
    """The ellipse inside a box: its bbox, area and mask."""
    x, y, width, height = box
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    outline = np.stack([x + width / 2 * (1 + np.cos(angles)), y + height / 2 * (1 + np.sin(angles))], 1)
    rle = mask_api.frPyObjects([outline.ravel().tolist()], SIZE, SIZE)[0]
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    return {"bbox": box.tolist(), "area": float(mask_api.area(rle)), "segmentation": segmentation}


def lvis_api(path, detections, iou_type) -> tuple[dict, float]:
    """lvis-api's figures, in 0..1 and under our names, and its seconds without reading the annotations.

    As Detectron2 calls it: masks come without their boxes, otherwise it would use the boxes' areas.
    """
    unused = {"segm": "bbox", "bbox": "segmentation"}[iou_type]
    detections = [{key: value for key, value in item.items() if key != unused} for item in detections]
    annotations = LVIS(path)
    start = time.process_time()
    evaluation = LVISEval(annotations, LVISResults(annotations, detections), iou_type)
    evaluation.run()
    seconds = time.process_time() - start
    return {name.removesuffix("@300"): value for name, value in evaluation.get_results().items()}, seconds


def measure(num_images, num_categories, num_detections, repeats) -> list[dict]:
    """For boxes and for masks the best times of both, and the largest difference between their figures (0..1)."""
    if not hasattr(np, "float"):
        np.float = float  # lvis 0.5.3 is older than the numpy that dropped it
    logging.getLogger("lvis").setLevel(logging.ERROR)
    ground_truth, detections = generate(num_images, num_categories, num_detections)
    rows = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(ground_truth, file)
        file.flush()
        for iou_type in SHAPE:
            times = []
            for _ in tqdm(range(repeats), desc=iou_type, file=sys.stderr):
                theirs, their_seconds = lvis_api(file.name, detections, iou_type)
                start = time.process_time()
                ours = evaluate_lvis(ground_truth, detections, iou_type)["figures"]
                times.append((their_seconds, time.process_time() - start))
            lvis_api_s, ours_s = (min(column) for column in zip(*times, strict=True))
            rows.append(
                {
                    "iou_type": iou_type,
                    "lvis_api_s": lvis_api_s,
                    "ours_s": ours_s,
                    "ratio": lvis_api_s / ours_s,
                    # lvis-api gives -1 if there is no ground truth.
                    "difference": max(
                        abs((-1 if ours[name] is None else ours[name] / 100) - value) for name, value in theirs.items()
                    ),
                }
            )
    return rows


def main(argv=None):
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=100)
    arguments.add_argument("--categories", type=int, default=1203)
    arguments.add_argument("--detections", type=int, default=300, help="per image")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--out", help="JSON")
    args = arguments.parse_args(argv)
    rows = measure(args.images, args.categories, args.detections, args.repeats)
    print(f"{args.images} images, {args.categories} categories, {args.detections} detections per image")
    for row in rows:
        print(
            f"{row['iou_type']}: lvis-api {row['lvis_api_s']:.2f} s, ours {row['ours_s']:.2f} s, ratio "
            f"{row['ratio']:.1f}; figures differ by at most {row['difference']:.0e}"
        )
    if args.out:
        write_json(args.out, vars(args) | {"rows": rows})


if __name__ == "__main__":
    main()
