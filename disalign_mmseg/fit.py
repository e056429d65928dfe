"""Stage two in seconds: python -m disalign_mmseg.fit CONFIG --stage-one FILE

One pass of stage one over the training images, under the evaluation's transforms, keeps what its classifier sees of a
few pixels of each; then a solver without a learning rate learns the 2K + d + 1 numbers (disalign.fit). CONFIG is a
stage two's; its rho, class counts and calibration count, its schedule does not. Writes a checkpoint that CONFIG tests
and exports as any other, and evaluates it beside stage one.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import nn

from disalign import InputError, fit, load_stage_one
from disalign.cli import (
    config_errors,
    fit_arguments,
    fit_places,
    results_of,
    warnings_to_stderr,
)
from disalign.fitting import require_options
from disalign.stage_two import calibrations, require_same_classes
from disalign_mmengine.checkpoints import class_names, load_checkpoint
from disalign_mmengine.cli import command_in_folder, load_config, test
from disalign_mmengine.hooks import stage_one_of
from disalign_mmengine.saving import save_fit

from .collect import collect_features, require_sample, training_set
from .data_check import check_dataset
from .losses import GRWCrossEntropyLoss
from .pixel_counts import class_counts_of


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """The command's options."""
    fit_arguments(arguments, "float16")
    arguments.add_argument("--pixels", type=int, default=64, help="of each image; default: 64")
    arguments.add_argument("--images", type=int, help="so many, rare classes more often; default: all")
    arguments.add_argument("--seed", type=int, default=0, help="of the pixels and images drawn; default: 0")
    arguments.add_argument("--test", action="store_true", help="evaluate each of several rho, in a folder of its own")


def run(args: argparse.Namespace, config: Config, folder: Path) -> None:
    """The pass, the fits, and the tests of their checkpoints in a folder."""
    register_all_modules(init_default_scope=True)
    path = args.stage_one or stage_one_of(config) or ""
    model = build_model(config)
    head, loss = model.calibrated_head, model.calibrated_head.loss_decode
    places = fit_places(folder, args.rho or [loss.rho], path, args.force)
    calibration = _options(head.calibration)
    chosen = {"anchor": args.anchor, "penalty": args.penalty}
    require_options(**chosen, **calibration)
    require_sample(args.pixels, args.images)
    stage_one = load_checkpoint(path)
    dataset = training_set(config)
    require_same_classes(dataset.metainfo.get("classes"), class_names(stage_one), repr(path))
    print(f"{os.path.basename(path)}: {load_stage_one(model, stage_one, name=path)}")
    model.to(get_device()).eval()
    check_dataset(dataset, head.num_classes, head.ignore_index)
    record = {}
    if loss.class_counts is None:
        record = class_counts_of(dataset, head.num_classes, head.ignore_index, folder)
        loss.set_class_counts(record["train_counts"])

    begun = time.perf_counter()
    features = collect_features(
        model,
        dataset,
        args.pixels,
        args.images,
        args.features,
        getattr(torch, args.dtype),
        class_counts=loss.class_counts,
        totals=record.get("train_counts"),
        seed=args.seed,
        workers=config.train_dataloader.get("num_workers", 0),
    )
    passed = time.perf_counter() - begun
    with warnings_to_stderr():
        found = fit(features, _linear(head.conv_seg), [*places], zero_count=loss.zero_count, **chosen, **calibration)
    fitted = time.perf_counter() - begun - passed
    own = head.calibration.state_dict()
    for rho, classifier in found.items():
        learnt = classifier.calibration.state_dict()
        head.calibration.load_state_dict({name: learnt[name].reshape(tensor.shape) for name, tensor in own.items()})
        loss.rho = rho
        facts = loss.metadata() | {"total_pixels": record.get("total_pixels")}
        save_fit(places[rho], model, dataset.metainfo, facts, classifier.fit_report)
    print(f"pass over {len(features)} pixels {passed:.1f} s, fit {fitted:.1f} s; written to {folder}")

    for rho, place in places.items():
        where = folder / place.stem
        if len(places) == 1 or args.test:
            print(f"\nrho {rho:g}")
            config = load_config(args.config, args.cfg_options)
            config.setdefault("runner_type", "DisAlignSegRunner")
            config.load_from, config.stage_one = str(place), None
            # MMEngine's logs go by this name, and the time in seconds.
            config.experiment_name = f"{config.get('experiment_name', Path(config.filename).stem)}_{place.stem}"
            test(config, argparse.Namespace(work_dir=str(where), launcher="none"))
            if (where / "results_test.json").exists():  # of the config's own metric there is none
                shutil.copyfile(where / "results_test.json", results_of(place))  # a line of the log names the first
        else:
            print(f"test it: python -m disalign_mmseg.test {args.config} {place} --work-dir {where}")


def build_model(config: Config) -> Any:
    """The config's model of stage two, without any weights.

    Raises:
        InputError: a model that can't be built, without a calibration, or with another loss than GRWCrossEntropyLoss.
    """
    with config_errors(config.filename):
        if config.get("data_preprocessor"):  # as MMEngine's Runner does
            config.model.setdefault("data_preprocessor", config.data_preprocessor)
        model = MODELS.build(config.model)
    if not calibrations(model):
        raise InputError(f"expected the config of a stage two, got {config.filename!r}, whose model has no calibration")
    loss = model.calibrated_head.loss_decode
    if not isinstance(loss, GRWCrossEntropyLoss):
        raise InputError(
            f"expected GRWCrossEntropyLoss as the head's loss_decode, got {type(loss).__name__}; the fit needs its rho "
            "and class counts"
        )
    return model


def _options(calibration: nn.Module) -> dict[str, Any]:
    """The options of a head's calibration, as :func:`disalign.fit` takes them."""
    learnt = dict(calibration.named_parameters())
    return {
        "confidence": "learnt" if "confidence.weight" in learnt else "one",
        "learn_magnitude": "magnitude" in learnt,
        "learn_margin": "margin" in learnt,
    }


def _linear(conv: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution, which :func:`collect_features` has proven it to be, as a classifier of features (N, d)."""
    bias = conv.bias is not None
    classifier = nn.Linear(conv.in_channels, conv.out_channels, bias, conv.weight.device)
    own = classifier.state_dict()
    classifier.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in conv.state_dict().items()})
    return classifier


main = command_in_folder(__doc__, run, add_arguments)

if __name__ == "__main__":
    sys.exit(main())
