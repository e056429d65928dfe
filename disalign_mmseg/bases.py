"""Base configs: MMSegmentation's, ours, and stage two on top of any of them."""

from pathlib import Path
from typing import Any

import mmseg
from mmengine.config import Config, ConfigDict

from disalign import InputError
from disalign.cli import shipped_configs


def mmseg_config(name: str) -> str:
    """The path of one of MMSegmentation's own configs, for ``_base_``.

    (``_base_ = "mmseg::..."`` works on upstream mmengine alone, which looks for a distribution of that name.)

    Args:
        name: below MMSegmentation's ``configs/``: ``"fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py"``.

    Raises:
        InputError: MMSegmentation was installed without its configs, or has none of that name.
    """
    folder = Path(mmseg.__path__[0], ".mim", "configs")
    return _config(folder, name, "MMSegmentation's configs, which pip and mim install")


def disalign_config(name: str) -> str:
    """The path of one of our configs, for ``_base_`` in a config in any folder.

    Args:
        name: below ``configs/mmseg``: ``"_base_/disalign_4k.py"``.

    Raises:
        InputError: no config of that name.
    """
    return _config(shipped_configs() / "mmseg", name, "the shipped configs")


def _config(folder: Path, name: str, whose: str) -> str:
    path = folder / name
    if not path.is_file():
        raise InputError(f"expected {name!r} among {whose}, but there is no file {str(path)!r}")
    return str(path)


def stage_two(base: ConfigDict, settings: str = "_base_/disalign_4k.py", **loss: Any) -> None:
    """Turn a stage-one config into stage two's, in place: one line in a config that inherits it.

    ::

        _base_ = "my_stage_one.py"
        __import__("disalign_mmseg").stage_two(_base_, rho=0.5)

    Runner, segmentor, the (last) decode head, loss, schedule, hooks and metric become those of stage two.

    Args:
        base: the config's ``_base_``, of an encoder and one or several decode heads.
        settings: the config of ours that is merged into it (see :func:`disalign_config`).
        loss: options of :class:`disalign_mmseg.GRWCrossEntropyLoss`, which override those of ``settings``.

    Raises:
        InputError: a base without a segmentor that can be calibrated.
    """
    over = Config.fromfile(disalign_config(settings)).stage_two
    model = base.get("model") or {}
    segmentor, heads = model.get("type"), model.get("decode_head")
    if segmentor not in ("EncoderDecoder", "CascadeEncoderDecoder") or not heads:
        raise InputError(
            f"expected the config of an EncoderDecoder or CascadeEncoderDecoder as _base_, got a model of {segmentor!r}"
        )
    head = heads[-1] if isinstance(heads, list) else heads
    head.merge(over.model.pop("decode_head"))
    head.loss_decode.update(loss)
    head.type = f"DisAlign{head.type}"
    over.model.type = f"DisAlign{segmentor}"
    imports = base.get("custom_imports", {}).get("imports", [])
    imports = [imports] if isinstance(imports, str) else imports
    over.custom_imports.imports = list(dict.fromkeys([*imports, *over.custom_imports.imports]))
    base.merge(over)
