"""A classifier from a config and a checkpoint."""

import argparse

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from disalign import load_file
from disalign.cli import config_errors
from disalign_mmengine.checkpoints import load_whole


def without_pretrained(config: Config, args: argparse.Namespace | None = None) -> None:
    """Download no pretrained weights if a checkpoint is loaded afterwards."""
    checkpoint = args is None or any(config.get(key) for key in ("stage_one", "load_from", "resume"))
    if checkpoint and config.model.backbone.get("pretrained"):
        config.model.backbone.pretrained = False


def load_model(config: Config, path: str) -> tuple[nn.Module, dict]:
    """The config's model in eval mode, with exactly the tensors of a checkpoint; and the checkpoint."""
    checkpoint = load_file(path)
    model = build_model(config)
    load_whole(model, checkpoint, path)
    return model.eval(), checkpoint


def build_model(config: Config) -> nn.Module:
    """The config's model, without any weights."""
    with config_errors(config.filename):
        without_pretrained(config)
        return MODELS.build(config.model)
