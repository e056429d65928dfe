"""Check a config's data before training: python -m disalign_cls.check CONFIG

Builds the training, validation and test set, and lists what is missing.
"""

import sys
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from disalign import InputError, many_medium_few
from disalign.cli import command, config_errors
from disalign.stage_two import require_same_classes
from disalign_mmengine.cli import load_config, parser

from .datasets import MissingFilesError


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--all", action="store_true", help="list every missing file, not only the first ones")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    complete, classes = [], None
    for name in ("train", "val", "test"):
        dataset = check(config, f"{name}_dataloader", args.all, classes)
        complete.append(dataset is not None)
        classes = classes or (dataset and dataset.metainfo["classes"])
    if not all(complete):
        raise InputError(f"expected complete data, but {complete.count(False)} of its sets can't be read, see above")


def check(config: Config, name: str, list_all: bool, classes: Sequence[str] | None = None) -> Any:
    """Print one line about a dataloader's dataset or its problem; return the dataset if it is complete, else None."""
    try:
        with config_errors(config.filename):
            if config.get(name) is None:
                raise InputError(f"expected {name} in the config, got none")
            dataset = DATASETS.build(config[name].dataset)
            require_same_classes(classes, dataset.metainfo["classes"], f"the {dataset.metainfo['split']} set")
            known, found = config.get("model", {}).get("num_classes", 0), dataset.num_classes
            # An evaluated list may lack the last classes.
            if found > known or (found < known and name.startswith("train")):
                raise InputError(
                    f"expected a dataset of as many classes as the model, whose num_classes is {known}, got {found}; "
                    "correct one of them"
                )
    except InputError as error:
        print(f"{name}: {error}")
        if list_all and isinstance(error, MissingFilesError):
            print("\n".join(f"  missing: {path}" for path in error.paths))
        return None
    counts = dataset.class_counts
    thresholds = {key: value for key, value in config.get("val_evaluator", {}).items() if key in ("many", "few")}
    sizes = [f"{group} {int(members.sum())}" for group, members in many_medium_few(counts, **thresholds).items()]
    # The groups are defined by the training counts; an evaluated set has none of its own.
    groups = f"; {', '.join(sizes)} classes" if name.startswith("train") else ""
    print(
        f"{name}: {len(dataset)} images of {dataset.num_classes} classes, {int(counts.min())} to {int(counts.max())} "
        f"per class{groups}"
    )
    return dataset


if __name__ == "__main__":
    sys.exit(main())
