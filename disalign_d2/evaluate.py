"""Evaluate saved detections again: python -m disalign_d2.evaluate DETECTIONS.json ANNOTATIONS.json

DETECTIONS.json is a list of detections, such as the lvis_instances_results.json that an evaluation leaves in its output
folder; ANNOTATIONS.json is in LVIS or COCO format. Prints a table; no model and no GPU is needed.
"""

import argparse
import os
import sys

from disalign import InputError
from disalign.checkpoints import write_json
from disalign.cli import command
from disalign.files import read_json

from .lvis_metrics import SHAPE, evaluation_report, table


@command
def main(argv=None):
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("detections", help="JSON: image_id, category_id, score, bbox and segmentation of each")
    arguments.add_argument("annotations", help="JSON in LVIS or COCO format")
    arguments.add_argument("--iou-type", nargs="+", choices=SHAPE, help="default: what the detections have")
    arguments.add_argument("--max-dets", type=int, default=300, help="detections per image (%(default)s)")
    arguments.add_argument("--fixed-ap", action="store_true", help="also AP of 10,000 detections per category")
    arguments.add_argument(
        "--image-counts", help="for r, c and f in COCO format: JSON with the training images of each category"
    )
    arguments.add_argument("--out", help="also write all figures, and those of each category, to this JSON")
    args = arguments.parse_args(argv)
    if args.out and os.path.abspath(args.out) in map(os.path.abspath, (args.detections, args.annotations)):
        raise InputError(f"expected a file of its own as --out, got {args.out!r}, which is read; name another")
    detections = read_json(args.detections, "detections")
    annotations = read_json(args.annotations, "annotations")
    if not isinstance(detections, list):
        raise InputError(f"expected a list of detections in {args.detections!r}, got {type(detections).__name__}")
    iou_types = args.iou_type or shapes_of(detections)
    report = evaluation_report(
        annotations, detections, iou_types, args.max_dets, args.fixed_ap, image_counts=args.image_counts
    )
    if args.out:
        write_json(args.out, report)
    print(table(report["figures"]))


def shapes_of(detections: list) -> list[str]:
    """The IoU types that the detections can be evaluated for."""
    first = detections[0] if detections and isinstance(detections[0], dict) else {}
    return [iou_type for iou_type, key in SHAPE.items() if key in first] or ["bbox"]


if __name__ == "__main__":
    sys.exit(main())
