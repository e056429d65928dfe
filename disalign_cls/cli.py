"""What the commands share: the Runner of a classifier, and the classifier alone."""

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from disalign import load_file
from disalign.hand_over import require_tensors, state_dict_of
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


def build_model(config: Config):
    """The config's model, without any weights.

    Raises:
        InputError: a config that can't be built.
    """
    with cli.config_errors(config.filename):
        without_pretrained(config)
        return MODELS.build(config.model)


def load_model(config: Config, path: str):
    """The config's model with a checkpoint's tensors, all of them and no others, in eval mode; and the checkpoint.

    Raises:
        InputError: a config that can't be built, or no checkpoint of its model.
    """
    checkpoint = load_file(path)
    model = build_model(config)
    tensors = state_dict_of(checkpoint)
    require_tensors(tensors, model.state_dict(), "tensors of the config's model", where=f" in {path!r}")
    model.load_state_dict(tensors)
    return model.eval(), checkpoint
