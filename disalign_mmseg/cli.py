"""What the commands share."""

from mmengine.config import Config
from mmengine.runner import Runner

from disalign_mmengine import cli
from disalign_mmengine.checkpoints import load_checkpoint


def build_runner(config: Config, args) -> Runner:
    """A Runner for the parsed arguments, its checkpoint read once beforehand.

    Raises:
        InputError: see :func:`disalign_mmengine.cli.prepare`; or a checkpoint that can't be read.
    """
    cli.prepare(config, args)
    if config.get("load_from") and "://" not in config.load_from:
        load_checkpoint(config.load_from)  # said before the Runner opens its log folder
    return cli.build_runner(config)
