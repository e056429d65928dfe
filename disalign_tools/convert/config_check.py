"""Does a converted checkpoint fit a config? Builds the config's model with its package, imported only here."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter

from torch import Tensor, nn

from disalign import InputError, load_stage_one
from disalign.cli import config_errors, find_config
from disalign.errors import first_line
from disalign.hand_over import COUNTERS, require_tensors
from disalign.stage_two import calibrations, is_calibrated

from .targets import BACKBONE_CONFIG


def check_fit(to: str, config: str, tensors: dict[str, Tensor]) -> str:
    """Load the tensors into the model of a config (for timm a model's name), strictly, and describe what fits."""
    with _built(to, config):
        model = _build(to, config, tensors)
    target = model.state_dict()
    if to == "d2" and all(name.startswith("backbone.") for name in tensors):
        backbone = {name: tensor for name, tensor in target.items() if name.startswith("backbone.bottom_up.")}
        require_tensors(tensors, backbone, "tensors of the config's backbone", (COUNTERS,))
        fits = f"fits {config}: all {len(backbone)} tensors of its backbone; the rest starts as Detectron2 starts it"
        cfg = _d2_config(config)
        said = {key: attrgetter(key)(cfg) for key in BACKBONE_CONFIG}
        wrong = [f"{key} {said[key]}, not {right}" for key, right in BACKBONE_CONFIG.items() if said[key] != right]
        return f"{fits}; but the config differs from how it was trained: {', '.join(wrong)}" if wrong else fits
    if calibrations(model) and not is_calibrated(tensors):
        return f"fits {config}: {load_stage_one(model, tensors)}"
    require_tensors(tensors, target, "tensors of the config's model", (COUNTERS,))
    return f"fits {config}: all {len(target)} tensors of its model"


@contextmanager
def _built(to: str, config: str) -> Iterator[None]:
    """Context with the package that builds it; any exception while building counts as the config's error."""
    package = "timm" if to == "timm" else f"disalign_{to}"
    try:
        import_module(package)
    except ImportError as error:
        reason = first_line(error)
        raise InputError(f"expected {package} for --config, but: {reason}; install it, or leave out --config") from None
    with config_errors(config, (Exception,)):
        yield


def _build(to: str, config: str, tensors: dict[str, Tensor]) -> nn.Module:
    if to == "timm":
        import timm

        return timm.create_model(config, num_classes=len(tensors.get(f"{timm_classifier(config)}.weight", ())))
    if to == "d2":
        from disalign_d2 import build_model

        return build_model(_d2_config(config))
    from mmengine.registry import MODELS, DefaultScope

    from disalign_mmengine.cli import load_config

    model = load_config(config, {}).model
    for part in (model, model.backbone):  # nothing to download
        part.pop("pretrained", None)
    with DefaultScope.overwrite_default_scope("mmseg" if to == "mmseg" else "mmengine"):
        return MODELS.build(model)


def _d2_config(path):
    from detectron2.config import get_cfg

    from disalign_d2 import add_disalign_config

    if path.endswith(".py"):
        raise InputError(f"expected a config in YAML for --to d2, got {path!r}; leave out --config")
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.merge_from_file(find_config(path), allow_unsafe=False)  # otherwise YAML may call any function
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def timm_classifier(name: str) -> str:
    """The name of the classifier of a timm model."""
    with _built("timm", name):
        import timm

        if not timm.is_model(name.split(".")[0]):
            raise InputError(f"expected the name of a timm model as --config for --to timm, got {name!r}")
        classifier = timm.get_pretrained_cfg_value(name, "classifier")
    if not isinstance(classifier, str):
        raise InputError(
            f"expected a timm model of one classifier as --config, but {name!r} has {classifier}; their scores "
            "are averaged, use a model with one"
        )
    return classifier
