"""Where MMSegmentation keeps its configs, and we ours: the one place that knows."""

from pathlib import Path

import mmseg

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
    if not folder.is_dir():
        raise InputError(
            f"expected MMSegmentation's configs in {str(folder)!r}, but there is no such folder; install "
            "MMSegmentation by pip or mim, which bring them"
        )
    path = folder / name
    if not path.is_file():
        raise InputError(f"expected {name!r} among MMSegmentation's configs, but there is no file {str(path)!r}")
    return str(path)


def disalign_config(name: str) -> str:
    """The path of one of ours, for ``_base_`` in a config that lies anywhere.

    Args:
        name: below ``configs/mmseg``: ``"_base_/disalign_4k.py"``.

    Raises:
        InputError: there is none of that name.
    """
    path = shipped_configs() / "mmseg" / name
    if not path.is_file():
        raise InputError(f"expected {name!r} among the shipped configs, but {str(path)!r} is no file")
    return str(path)
