"""Code for the commands that learn from features: arguments, logs, stage one's model, the pass over the images."""

import argparse
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from disalign import Features, InputError
from disalign.cli import config_errors

from .checkpoint import DisAlignCheckpointer
from .collect import collect_features
from .freezing import build_model
from .train_net import setup


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that both commands have beside those of :mod:`disalign.cli`."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config_file", metavar="config", help="a file, or the name of a shipped one below configs/")
    arguments.add_argument("--images", type=int, help="of the training set, drawn by repeat factors; default: all")
    arguments.add_argument(
        "--background", type=int, default=16, help="RoIs of the background to keep of a training image (%(default)s)"
    )
    arguments.add_argument("--batch-size", type=int, default=8, help="training images at a time (%(default)s)")
    arguments.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="settings, over the config's")
    return arguments


def stage_two_config(args: Namespace) -> CfgNode:
    """The config that the arguments name, which must be a stage two's."""
    cfg = setup(args)
    if not cfg.MODEL.DISALIGN.CALIBRATE:
        raise InputError(f"expected the config of a stage two, got {args.config_file!r}, which does not calibrate")
    return cfg


def log_to(folder: Path, cfg: CfgNode, args: Namespace) -> None:
    """Use a separate folder for logs, the config and evaluations: those beside it may be train_net's."""
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    cfg.freeze()
    default_setup(cfg, args)
    for name in ("disalign", "disalign_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)


def load_model(cfg: CfgNode, args: Namespace, path: str, folder: str = "") -> tuple[Any, DisAlignCheckpointer]:
    """A stage two's model with stage one's weights, and a checkpointer that saves it into a folder."""
    with config_errors(args.config_file):
        model: Any = build_model(cfg)
    checkpointer = DisAlignCheckpointer(model, folder, training=True)
    checkpointer.resume_or_load(path, resume=False)
    return model, checkpointer


def training_features(model: Any, cfg: CfgNode, args: Namespace, out: Path | str | None) -> Iterator[Features]:
    """Call :func:`collect_features` as the arguments say."""
    sample = {"background": args.background, "images": args.images, "seed": args.seed, "batch_size": args.batch_size}
    return collect_features(model, cfg, out=out, dtype=getattr(torch, args.dtype), **sample)
