"""What the commands share: the Runner of a classifier, and the classifier alone."""

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from disalign import load_file
from disalign.cli import config_errors
from disalign_mmengine import cli
from disalign_mmengine.checkpoints import load_whole


def build_runner(config: Config, args) -> Runner:
    """A Runner for the parsed arguments.

    Raises:
        InputError: see :func:`disalign_mmengine.cli.build_runner`.
    """
    if config.get("stage_one") or config.get("load_from") or config.get("resume"):
        without_pretrained(config)
    return cli.build_runner(config, args)


def without_pretrained(config: Config) -> None:
    """A checkpoint follows: nothing to download first."""
    if config.model.backbone.get("pretrained"):
        config.model.backbone.pretrained = False


def build_model(config: Config) -> nn.Module:
    """The config's model, without any weights.

    Raises:
        InputError: a config that can't be built.
    """
    with config_errors(config.filename):
        without_pretrained(config)
        return MODELS.build(config.model)


def load_model(config: Config, path: str) -> tuple[nn.Module, dict]:
    """The config's model with a checkpoint's tensors, all of them and no others, in eval mode; and the checkpoint.

    Raises:
        InputError: a config that can't be built, or no checkpoint of its model.
    """
    checkpoint = load_file(path)
    model = build_model(config)
    load_whole(model, checkpoint, path)
    return model.eval(), checkpoint
