"""What the commands share: the Runner of a classifier."""

from mmengine.config import Config
from mmengine.runner import Runner

from disalign import load_file
from disalign_mmengine import cli


def build_runner(config: Config, args) -> Runner:
    """A Runner for the parsed arguments.

    Raises:
        InputError: see :func:`disalign_mmengine.cli.prepare`; or a checkpoint that holds more than plain values.
    """
    cli.prepare(config, args)
    if config.get("load_from"):
        load_file(config.load_from)  # mmengine itself would unpickle whatever the file holds
        without_pretrained(config)
    return cli.build_runner(config)


def without_pretrained(config: Config) -> None:
    """A checkpoint follows: nothing to download first."""
    if config.model.backbone.get("pretrained"):
        config.model.backbone.pretrained = False
