"""What is installed, and the commands that install and repair it."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec

from .libraries import Library

PIP = f"{shlex.quote(sys.executable)} -m pip"
REINSTALL = f"{PIP} install --force-reinstall --no-deps"
HEADLESS = f"{REINSTALL} opencv-python-headless"
# The detectron2 on package registries cannot be built.
DETECTRON2 = "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
# OpenMMLab's own distributions, and the maintained ones with the same import names.
OPENMMLAB = {
    "mmengine": "onedl-mmengine",
    "mmcv": "onedl-mmcv",
    "mmcv-lite": "onedl-mmcv",
    "mmsegmentation": "onedl-mmsegmentation",
}


def version_of(distribution: str) -> str:
    """The version of a distribution; empty where it is not installed."""
    try:
        return metadata.version(distribution) or ""
    except Exception:  # half an installation has another error in each version of Python
        return ""


def distribution_of(library: Library) -> str:
    """The installed distribution that provides a library; empty if none does."""
    return next(filter(version_of, library.distributions.split()), "")


def origin(module: str) -> str | None:
    """The file that a module's package is imported from; None where there is none."""
    try:
        spec = find_spec(module.partition(".")[0])
    except Exception:
        return None
    return spec.origin if spec else None


def is_there(library: Library) -> bool:
    """Whether there is anything to import, whole or broken."""
    return bool(not library.distributions or distribution_of(library) or origin(library.name))


def requirements(distribution: str = "disalign") -> dict[str, str]:
    """What a distribution and its extras ask for, ``{"timm": ">=1.0.9"}``; setuptools 82 has no pkg_resources."""
    lines = (metadata.requires(distribution) or []) if version_of(distribution) else []
    matches = [re.match(r"([\w.-]+)\(?([^;)]*)", line.replace(" ", "")) for line in lines]
    return {"setuptools": "<82"} | {match[1]: match[2] for match in matches if match}


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version fulfils a comma-separated list of ``>=``, ``<`` and ``==``."""

    def key(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]

    compare = {">=": key(version).__ge__, "<": key(version).__lt__, "==": key(version).__eq__}
    return all(compare[sign](key(number)) for sign, number in re.findall(r"(>=|<|==)([\w.]+)", wanted))


def install(*distributions: str) -> str:
    """The command for distributions in the versions that disalign asks for; OpenMMLab's own are replaced."""
    commands, names = [], [*distributions]
    upstream = [*filter(version_of, OPENMMLAB)]
    if upstream and {*names} & {*OPENMMLAB.values()}:
        replaced = [OPENMMLAB[name] for name in upstream]
        commands.append(f"{PIP} uninstall -y {' '.join(upstream + replaced)}")
        names = [*dict.fromkeys(replaced + names)]
    wanted = requirements()
    if pinned := [name + wanted.get(name, "") for name in names if name != "detectron2"]:
        commands.append(f"{PIP} install {shlex.join(pinned)}")
    if "detectron2" in names:
        commands.append(f"{PIP} install {DETECTRON2}")
    return " && ".join(commands)


def torchvision_for_torch() -> str:
    """The command for a torchvision that fits the installed torch."""
    release, _, build = version_of("torch").partition("+")
    minor = int(release.split(".")[1])
    # To torch 2.13 each torchvision is for one torch; 0.29 is for 2.14 and later.
    pin = f"'torchvision==0.{minor + 15}.*'" if minor < 14 else "torchvision"
    return f"{REINSTALL} {pin}" + (f"  # from the index that has torch +{build}" if build else "")


def repair(library: Library, error: str) -> str | None:
    """The command for a library that raised ``error``; None where we know of none."""
    name, missing = distribution_of(library), re.search(r"No module named '(\w+)", error)
    if re.search(r"torchvision::nms|torchvision\S*\.so|[Cc]ustom C\+\+ ops", error):
        return torchvision_for_torch()
    if re.search(r"lib(GL|gthread|glib)\b", error):
        return HEADLESS
    if library.name == "mmseg" and "mmcv._ext" in error:  # the maintained distributions do without operators
        return install("onedl-mmengine") if any(map(version_of, OPENMMLAB)) else None
    if not name or not re.match(r"\w+:", error):  # a crash, a hang or an exit may be anything
        return None
    pinned = f"{name}=={version_of(name).partition('+')[0]}"
    if missing and missing[1] != library.name:  # with what it asks for, unless that is there and lacks a part
        return None if origin(missing[1]) else f"{PIP} install {pinned}"
    if name == "torch":
        return f"{PIP} install --force-reinstall {pinned}"
    return f"{REINSTALL} {DETECTRON2 if name == 'detectron2' else pinned}"
