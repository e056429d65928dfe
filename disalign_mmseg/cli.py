"""Code for the commands that learn from features: the model, its data and the pass."""

import argparse
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmseg.registry import MODELS
from torch import Tensor, nn

from disalign import Features, InputError, load_stage_one
from disalign.cli import config_errors
from disalign.stage_two import calibrations, require_same_classes
from disalign_mmengine.checkpoints import class_names, load_checkpoint

from .collect import collect_features
from .data_check import check_dataset
from .losses import GRWCrossEntropyLoss
from .pixel_counts import class_counts_of

Module = TypeVar("Module", bound=nn.Module)


def sample_arguments(arguments: argparse.ArgumentParser) -> None:
    """The options for the sample of :func:`collected`."""
    arguments.add_argument("--pixels", type=int, default=64, help="of each image; default: 64")
    arguments.add_argument("--images", type=int, help="number to draw, rare classes more often; default: all")


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


def stage_one_for(dataset: Any, path: str) -> dict:
    """The checkpoint of a stage one, whose classes must be the training set's."""
    checkpoint = load_checkpoint(path)
    require_same_classes(dataset.metainfo.get("classes"), class_names(checkpoint), repr(path))
    return checkpoint


def start_from(model: nn.Module, stage_one: dict, path: str) -> None:
    """Load stage one's tensors, and make the model ready to evaluate."""
    print(f"{os.path.basename(path)}: {load_stage_one(model, stage_one, name=path)}")
    model.to(get_device()).eval()


def counted(model: Any, dataset: Any, folder: Path) -> dict:
    """Check a training set, and count its pixels if the loss has no class counts; return the record or ``{}``."""
    head, loss = model.calibrated_head, model.calibrated_head.loss_decode
    check_dataset(dataset, head.num_classes, head.ignore_index)
    if loss.class_counts is not None:
        return {}
    record = class_counts_of(dataset, head.num_classes, head.ignore_index, folder)
    loss.set_class_counts(record["train_counts"])
    return record


def collected(
    args: argparse.Namespace, config: Config, model: Any, dataset: Any, record: dict, out: str | Path | None
) -> Features:
    """Run a command's pass; ``record`` is from :func:`counted`."""
    return collect_features(
        model,
        dataset,
        args.pixels,
        args.images,
        out,
        getattr(torch, args.dtype),
        class_counts=model.calibrated_head.loss_decode.class_counts,
        totals=record.get("train_counts"),
        seed=args.seed,
        workers=config.train_dataloader.get("num_workers", 0),
    )


def linear_of(conv: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution, as :func:`collect_features` has checked, as a classifier of features (N, d)."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, conv.weight.device)
    return reshaped(linear, conv.state_dict())


def reshaped(module: Module, tensors: dict[str, Tensor]) -> Module:
    """The same module with a linear layer's tensors in place of those of a 1x1 convolution, or vice versa."""
    own = module.state_dict().items()
    module.load_state_dict({name: tensors[name].reshape(tensor.shape) for name, tensor in own})
    return module
