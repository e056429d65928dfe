"""Does a converted checkpoint fit a config? Builds the config's model with its package, imported only here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter

from torch import Tensor, nn

from disalign import InputError, load_stage_one
from disalign.cli import config_errors, find_config
from disalign.errors import first_line, some
from disalign.hand_over import COUNTERS, require_tensors
from disalign.stage_two import calibrations, is_calibrated

from .targets import BACKBONE_CONFIG

PACKAGES = {"cls": "disalign_cls", "d2": "disalign_d2", "mmseg": "disalign_mmseg", "timm": "timm"}


def check_fit(to: str, config: str, tensors: dict[str, Tensor]) -> str:
    """Load the tensors into the model of a config (for timm a model's name), strictly, and say in words what fits."""
    with _built(to, config):
        model = BUILDERS[to](config, tensors)
    target, surplus = model.state_dict(), _not_needed() if to == "d2" else ()
    if to == "d2" and all(name.startswith("backbone.") for name in tensors):
        backbone = {name: tensor for name, tensor in target.items() if name.startswith("backbone.bottom_up.")}
        require_tensors(tensors, backbone, "tensors of the config's backbone", surplus)
        fits = f"fits {config}: all {len(backbone)} tensors of its backbone; the rest starts as Detectron2 starts it"
        wrong = _unlike_the_backbone(config)
        return f"{fits}; but the config differs from how it was trained: {', '.join(wrong)}" if wrong else fits
    if calibrations(model) and not is_calibrated(tensors):
        return f"fits {config}: {load_stage_one(model, tensors)}"
    require_tensors(tensors, target, "tensors of the config's model", surplus)
    return f"fits {config}: all {len(target)} tensors of its model"


def timm_classifier(name: str) -> str:
    """The name of the classifier of a timm model."""
    with _built("timm", name):
        return _timm_model(name)[1]


@contextmanager
def _built(to: str, config: str) -> Iterator[None]:
    """With the package to build it; whatever building from a config raises is the config's fault."""
    try:
        import_module(PACKAGES[to])
    except ImportError as error:
        raise InputError(
            f"expected {PACKAGES[to]} to build the model of --config, but it can't be imported "
            f"({first_line(error)}); install what it needs, or leave out --config"
        ) from None
    with config_errors(config, (Exception,)):
        yield


def _cls(config: str, tensors: dict[str, Tensor]) -> nn.Module:
    from disalign_cls.cli import build_model
    from disalign_mmengine.cli import load_config

    return build_model(load_config(config, {}))


def _mmseg(path: str, tensors: dict[str, Tensor]) -> nn.Module:
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from disalign_mmengine.cli import load_config

    register_all_modules(init_default_scope=False)
    model = load_config(path, {}).model
    if model.get("pretrained"):
        model.pretrained = None
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(model)


def _d2(config: str, tensors: dict[str, Tensor]) -> nn.Module:
    from disalign_d2 import build_model

    return build_model(_d2_config(config))


def _not_needed() -> tuple[str, ...]:
    from disalign_d2.freezing import NOT_NEEDED

    return (COUNTERS, *NOT_NEEDED)


def _d2_config(config):
    from detectron2.config import get_cfg

    from disalign_d2 import add_disalign_config

    if config.endswith(".py"):
        raise InputError(
            f"expected a config in YAML as --config for --to d2, got the LazyConfig {config!r}; leave it out"
        )
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.merge_from_file(find_config(config), allow_unsafe=False)  # else YAML may call any function
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _unlike_the_backbone(config):
    cfg = _d2_config(config)
    said = {key: attrgetter(key)(cfg) for key in BACKBONE_CONFIG}
    return [f"{key} {said[key]}, not {right}" for key, right in BACKBONE_CONFIG.items() if said[key] != right]


def _timm(name: str, tensors: dict[str, Tensor]) -> nn.Module:
    model, classifier = _timm_model(name)
    if f"{classifier}.weight" not in tensors:
        raise InputError(
            f"expected a stock classifier named {classifier!r} for timm's {name}, got none; name it with --classifier"
        )
    model.reset_classifier(len(tensors[f"{classifier}.weight"]))
    return model


def _timm_model(name):
    import timm

    if os.path.isfile(name) or not timm.is_model(name.split(".")[0]):
        raise InputError(f"expected the name of a timm model as --config for --to timm, got {name!r}")
    model = timm.create_model(name)
    classifier = model.default_cfg["classifier"]
    if not isinstance(classifier, str):
        raise InputError(
            f"expected a timm model of one classifier as --config, but {name!r} has {some(classifier)}; their scores "
            "are averaged, take a model of one"
        )
    return model, classifier


BUILDERS = {"cls": _cls, "d2": _d2, "mmseg": _mmseg, "timm": _timm}
