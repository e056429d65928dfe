"""Check a config's data before training: python -m disalign_mmseg.check CONFIG

Builds the training, validation and test set and reads every annotation, minutes for ADE20K; lists what is missing or
wrong. --counts keeps the training pixels per class, for class_counts="FILE" in the loss.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmseg.utils import register_all_modules

from disalign import InputError, head_body_tail
from disalign.cli import command, config_errors
from disalign.errors import some
from disalign.io import require_place, write_json
from disalign_mmengine.cli import load_config, parser

from .data_check import SAMPLE, build_dataset, dataset_problems
from .pixel_counts import count_pixels

SHOWN = 10


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help=f"read {SAMPLE} annotations per set, not all")
    arguments.add_argument("--counts", metavar="FILE", help="write the training pixels per class as JSON")
    arguments.add_argument("--force", action="store_true", help="replace an existing --counts")
    arguments.add_argument("--workers", type=int, help="processes that read; default: one per CPU, 8 at most")
    arguments.add_argument("--all", action="store_true", help=f"list every problem, not only the first {SHOWN}")
    args = arguments.parse_args(argv)
    if args.workers is not None and args.workers < 0:
        raise InputError(f"expected 0 or more as --workers, got {args.workers}")
    if args.counts and (os.path.isdir(args.counts) or not args.counts.endswith(".json")):
        raise InputError(f"expected the name of a .json file as --counts, got {args.counts!r}; name another")
    if args.counts:
        require_place(args.counts, option="--counts", force=args.force)
    register_all_modules(init_default_scope=True)
    config = load_config(args.config, args.cfg_options)
    num_classes, ignore_index = labels_of(config)
    names = [f"{split}_dataloader" for split in ("train", "val", "test")]
    complete = [check(config, name, num_classes, ignore_index, args) for name in names]
    if not all(complete):
        raise InputError(f"expected whole data, but {complete.count(False)} of its sets can't be used, see above")
    if args.counts:
        record = count_pixels(build_dataset(config.train_dataloader.dataset), num_classes, ignore_index, args.workers)
        write_json(args.counts, record)
        empty = [
            record["class_names"][label] if record["class_names"] else label
            for label, pixels in enumerate(record["train_counts"])
            if not pixels
        ]
        evaluator = config.get("val_evaluator")
        groups = evaluator.get("groups") if isinstance(evaluator, dict) else None
        thresholds = groups if isinstance(groups, dict) else {}
        groups = head_body_tail(record["train_counts"], total=record["total_pixels"], **thresholds).items()
        print(
            f"{args.counts}: {record['total_pixels']} pixels in {record['files']} annotations; "
            f"{', '.join(f'{group} {int(members.sum())}' for group, members in groups)} classes"
            + (f"; no pixel of {some(empty)}" if empty else "")
        )


def labels_of(config: Config) -> tuple[int, int]:
    """The number of classes and the ignored label of a config's decode head, a cascade's last.

    Raises:
        InputError: the config has none.
    """
    with config_errors(config.filename):
        head = config.get("model", {}).get("decode_head")
        if not head:
            raise KeyError("it has no model.decode_head; is it MMSegmentation's?")
        head = head[-1] if isinstance(head, list | tuple) else head
        return head.num_classes, head.get("ignore_index", 255)


def check(config: Config, name: str, num_classes: int, ignore_index: int, args: argparse.Namespace) -> bool:
    """Print one line on a dataloader's dataset, or on what is wrong with it; return whether it is whole."""
    try:
        if config.get(name) is None:
            if name != "train_dataloader":
                print(f"{name}: none")
                return True
            raise InputError(f"expected {name} in the config, got none")
        dataset = build_dataset(config[name].dataset)
        labels = SAMPLE if args.quick else None
        problems = dataset_problems(dataset, num_classes, ignore_index, labels, args.workers)
    except InputError as error:
        problems = [str(error)]
    for problem in problems[: None if args.all else SHOWN]:
        print(f"{name}: {problem}")
    if problems[SHOWN:] and not args.all:
        print(f"{name}: and {len(problems) - SHOWN} more, see --all")
    if not problems:
        print(f"{name}: {len(dataset)} images of {num_classes} classes")
    return not problems


if __name__ == "__main__":
    sys.exit(main())
