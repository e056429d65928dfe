"""Is DisAlign better than the two-line fix? python -m disalign_cls.compare CONFIG --stage-one FILE [FILE ...]

One pass of each stage one over the training images and one over the evaluation's; then every method (disalign.compare)
learns from the former and is evaluated on the latter. CONFIG is a stage two's. Several stage ones give mean +- standard
deviation. Nothing is tuned on the evaluation images: settings are fixed, or the best on the
config's validation split (--choose-on val). Prints a table and writes comparison.json, for `disalign report`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import METRICS

from disalign import InputError, compare, load_stage_one, many_medium_few
from disalign.cli import (
    compare_arguments,
    compare_place,
    config_errors,
    features_of,
    warnings_to_stderr,
    write_comparison,
)
from disalign.comparison import chosen_methods, merged
from disalign.modules import plain_classifier
from disalign.stage_two import calibrations
from disalign_mmengine.checkpoints import class_names, load_checkpoint
from disalign_mmengine.cli import command_in_folder, load_config

from .cli import build_model
from .collect import collect_features


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """The command's options."""
    compare_arguments(arguments, "float32", sweep=(0.0, 0.5, 1.0, 1.5, 2.0))
    arguments.add_argument("--choose-on", choices=("val",), help="choose settings on this split, by balanced accuracy")
    arguments.add_argument("--bound", metavar="CONFIG", help="of a class-balanced training set: adds the paper's bound")


def run(args: argparse.Namespace, config: Config, folder: Path) -> None:
    """Run the passes and the methods, and print the table."""
    model: Any = build_model(config)
    if not calibrations(model):
        raise InputError(f"expected the config of a stage two, got {config.filename!r}, whose model has no calibration")
    paths = args.stage_one or [config.get("stage_one")]
    args.rho = model.loss.rho if args.rho is None else args.rho
    place = compare_place(folder, [args.rho, *args.sweep], paths, args.force)
    chosen_methods(args.methods, "classification", hasattr(model.classifier, "scale"))
    if args.choose_on and config[f"{args.choose_on}_dataloader"] == config.test_dataloader:
        raise InputError(f"expected a {args.choose_on} split other than the test split in {config.filename!r}")
    bound = None if args.bound is None else load_config(args.bound, {})
    contents = []
    for number, path in enumerate(paths):
        kept_in = features_of(args.features, number, len(paths) > 1)
        contents.append(compare_one(args, config, model, path, kept_in, bound))
    write_comparison(place, merged(contents))


def compare_one(
    args: argparse.Namespace, config: Config, model: Any, path: str, kept_in: Path | None, bound: Config | None
) -> dict:
    """A comparison from one stage one."""
    stage_one = load_checkpoint(path)
    print(f"{path}: {load_stage_one(model, stage_one, name=path)}")
    model.to(get_device()).eval()
    names, begun = class_names(stage_one), time.perf_counter()

    def features(split: str, of: Config = config, name: str | None = None) -> tuple[Any, Any]:
        where = kept_in and kept_in / (name or split)
        return collect_features(model, of, split, out=where, dtype=getattr(torch, args.dtype), classes=names)

    train, dataset = features("train")
    test, evaluated = features("test")
    validation = features(args.choose_on)[0] if args.choose_on else None
    balanced = None if bound is None else features("train", bound, "balanced")[0]
    passed = time.perf_counter() - begun
    with config_errors(config.filename):
        metric: Any = METRICS.build(config.test_evaluator)
    with warnings_to_stderr():
        return compare(
            train,
            test,
            plain_classifier(model.classifier),
            args.methods,
            rho=args.rho,
            groups=many_medium_few(train.class_counts, metric.many, metric.few),
            validation=validation,
            balanced=balanced,
            sweep=args.sweep,
            zero_count=model.loss.zero_count,
            seed=args.seed,
            stage_one=path,
            dataset=dataset.metainfo["dataset"],
            split=evaluated.metainfo["split"],
            classes=list(dataset.metainfo["classes"]),
            groups_text={"many": f"> {metric.many:g} training images", "few": f"< {metric.few:g}"},
            pass_seconds=passed,
            command=args.command,
        )


main = command_in_folder(__doc__, run, add_arguments, below="compare")

if __name__ == "__main__":
    sys.exit(main())
