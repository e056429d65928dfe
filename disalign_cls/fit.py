"""Stage two by one pass and a solver: python -m disalign_cls.fit CONFIG --stage-one FILE

One pass of stage one over the training images, every image once, then a solver without a learning rate learns the 2K +
d + 1 numbers (disalign.fit). CONFIG is a stage two's; its rho and calibration apply, its schedule does not. Writes a
checkpoint to test, export and fold with CONFIG as any other, and prints stage one's figures beside its own.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import METRICS

from disalign import Features, InputError, fit, load_stage_one
from disalign.cli import (
    config_errors,
    fit_arguments,
    fit_places,
    results_of,
    warnings_to_stderr,
)
from disalign.fitting import require_options
from disalign.io import write_json
from disalign.stage_two import calibrations
from disalign_mmengine.checkpoints import class_names, load_checkpoint
from disalign_mmengine.cli import command_in_folder
from disalign_mmengine.saving import save_fit

from .cli import build_model
from .collect import collect_features


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """The command's options."""
    fit_arguments(arguments, "float32")
    arguments.add_argument("--views", type=int, default=0, help="random views of each image; default: the image once")
    arguments.add_argument("--cross-fit", type=int, default=0, help="number of folds; retrains stage one's classifier")


def run(args: argparse.Namespace, config: Config, folder: Path) -> None:
    """Run the pass and the fits, and evaluate each into a folder."""
    path = args.stage_one or config.get("stage_one")
    model: Any = build_model(config)
    if not calibrations(model):
        raise InputError(f"expected the config of a stage two, got {config.filename!r}, whose model has no calibration")
    places = fit_places(folder, args.rho or [model.loss.rho], path, args.force)
    calibration = dict(config.model.get("calibration") or {})
    chosen = {"cross_fit": args.cross_fit, "anchor": args.anchor, "penalty": args.penalty}
    require_options(**chosen, **calibration)
    stage_one = load_checkpoint(path)
    print(f"{os.path.basename(path)}: {load_stage_one(model, stage_one, name=path)}")
    model.to(get_device()).eval()

    begun = time.perf_counter()
    names = class_names(stage_one)
    dtype = getattr(torch, args.dtype)
    kept_in = Path(args.features) if args.features else None
    train, dataset = collect_features(model, config, "train", args.views, kept_in and kept_in / "train", dtype, names)
    passed = time.perf_counter() - begun
    with warnings_to_stderr():
        found = fit(train, model.classifier, [*places], zero_count=model.loss.zero_count, **chosen, **calibration)
    fitted = time.perf_counter() - begun - passed
    test, evaluated = collect_features(
        model, config, "test", out=kept_in and kept_in / "test", dtype=dtype, classes=names
    )
    for rho, classifier in found.items():
        model.classifier.load_state_dict(classifier.state_dict())
        model.loss.rho = rho
        model.set_class_counts(train.class_counts)
        save_fit(places[rho], model, dataset.metainfo, model.metadata(), classifier.fit_report)
        print(f"\nrho {rho:g}")
        write_json(results_of(places[rho]), evaluate(model, test, evaluated, config))
    print(f"\n{classifier.fit_report.on_training_set()}")
    print(f"pass over {len(train)} rows {passed:.1f} s, fit {fitted:.1f} s; written to {folder}")
    if len(found) == 1:
        print(f"test it again: python -m disalign_cls.test {args.config} {next(iter(places.values()))}")


def evaluate(model: Any, features: Features, dataset: Any, config: Config) -> dict:
    """Both stages' figures on features of a data set, by the config's evaluator, which prints their table."""
    with config_errors(config.filename):
        metric = METRICS.build(config.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    if metric.class_counts is None:
        metric.class_counts = model.class_counts
    weight = model.classifier.weight
    with torch.inference_mode():
        for x, y in zip(features.x.split(4096), features.y.split(4096), strict=True):
            metric.process(None, model.predictions(x.to(weight), y))
    metric.evaluate(len(features))
    return metric.report


main = command_in_folder(__doc__, run, add_arguments)

if __name__ == "__main__":
    sys.exit(main())
