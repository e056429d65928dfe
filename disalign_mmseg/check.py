"""Check a config's data before training: python -m disalign_mmseg.check CONFIG

Builds the training, validation and test set and reads every annotation, minutes for ADE20K; lists what is missing or
wrong. --counts saves the training pixels per class, for class_counts="FILE" in the loss.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

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
    if args.counts and not args.counts.endswith(".json"):
        raise InputError(f"expected the name of a .json file as --counts, got {args.counts!r}; name another")
    if args.counts:
        require_place(args.counts, option="--counts", force=args.force)
    register_all_modules(init_default_scope=True)
    config = load_config(args.config, args.cfg_options)
    with config_errors(config.filename):
        heads = config.model.decode_head
        head = heads[-1] if isinstance(heads, list | tuple) else heads
        num_classes, ignore_index = head.num_classes, head.get("ignore_index", 255)
    names = [f"{split}_dataloader" for split in ("train", "val", "test")]
    whole = [check(config, name, num_classes, ignore_index, args) for name in names]
    if not all(whole):
        raise InputError(f"expected whole data, but {whole.count(False)} of its sets can't be used, see above")
    if args.counts:
        record = count_pixels(build_dataset(config.train_dataloader.dataset), num_classes, ignore_index, args.workers)
        write_json(args.counts, record)
        print(f"{args.counts}: {summary(record, config.get('val_evaluator'))}")


def check(config: Config, name: str, num_classes: int, ignore_index: int, args: argparse.Namespace) -> bool:
    """Print one line about a dataloader's dataset or its problems; return whether it is complete."""
    if config.get(name) is None:
        print(f"{name}: {'expected one in the config, got none' if name == 'train_dataloader' else 'none'}")
        return name != "train_dataloader"
    try:
        dataset = build_dataset(config[name].dataset)
        problems = dataset_problems(dataset, num_classes, ignore_index, SAMPLE if args.quick else None, args.workers)
    except InputError as error:
        problems = [str(error)]
    shown = problems if args.all else problems[:SHOWN]
    for problem in shown or [f"{len(dataset)} images of {num_classes} classes"]:
        print(f"{name}: {problem}")
    if len(shown) < len(problems):
        print(f"{name}: and {len(problems) - SHOWN} more, see --all")
    return not problems


def summary(record: dict, evaluator: Any) -> str:
    """One line about counted pixels, with the class groups of a config's evaluator."""
    groups = evaluator.get("groups") if isinstance(evaluator, dict) else None
    thresholds = groups if isinstance(groups, dict) else {}
    members = head_body_tail(record["train_counts"], total=record["total_pixels"], **thresholds)
    sizes = ", ".join(f"{group} {int(chosen.sum())}" for group, chosen in members.items())
    names = record["class_names"] or range(len(record["train_counts"]))
    empty = [name for name, pixels in zip(names, record["train_counts"], strict=True) if not pixels]
    nowhere = f"; no pixel of {some(empty)}" if empty else ""
    return f"{record['total_pixels']} pixels in {record['files']} annotations; {sizes} classes{nowhere}"


if __name__ == "__main__":
    sys.exit(main())
