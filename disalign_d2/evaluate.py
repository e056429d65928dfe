"""Evaluate saved detections again: python -m disalign_d2.evaluate DETECTIONS.json ANNOTATIONS.json

DETECTIONS.json is a list of detections, such as the lvis_instances_results.json that an evaluation writes to its output
folder; ANNOTATIONS.json is in LVIS or COCO format. Prints a table; needs neither a model nor a GPU.
"""

import argparse
import sys
from collections.abc import Sequence

from disalign import InputError
from disalign.cli import command
from disalign.io import read_json, require_place, write_json

from .lvis_metrics import SHAPE, evaluation_reports, table


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("detections", help="JSON: image_id, category_id, score, bbox and segmentation of each")
    arguments.add_argument("annotations", help="JSON in LVIS or COCO format")
    arguments.add_argument("--iou-type", nargs="+", choices=SHAPE, help="default: those that the detections have")
    arguments.add_argument("--max-dets", type=int, default=300, help="detections per image (%(default)s)")
    arguments.add_argument("--fixed-ap", action="store_true", help="also AP of 10,000 detections per category")
    arguments.add_argument(
        "--image-counts", help="for r, c and f in COCO format: JSON with the training images of each category"
    )
    arguments.add_argument("--out", help="also write all figures, and those of each class, to this JSON")
    arguments.add_argument("--force", action="store_true", help="replace an existing --out")
    args = arguments.parse_args(argv)
    if args.out:
        require_place(args.out, filter(None, (args.detections, args.annotations, args.image_counts)), force=args.force)
    if not args.max_dets:
        raise InputError("expected 1 or more as --max-dets, or -1 for all, got 0")
    detections = read_json(args.detections, "detections")
    annotations = read_json(args.annotations, "annotations")
    first = detections[0] if isinstance(detections, list) and detections else None
    shapes = [iou_type for iou_type, key in SHAPE.items() if isinstance(first, dict) and key in first]
    iou_types = args.iou_type or shapes or ["bbox"]
    reports = evaluation_reports(annotations, detections, iou_types, args.max_dets, args.fixed_ap, args.image_counts)
    if args.out:
        write_json(args.out, reports)
    print(table(reports))


if __name__ == "__main__":
    sys.exit(main())
