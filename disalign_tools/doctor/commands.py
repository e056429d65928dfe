"""What is installed, and the commands that install and repair it."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import metadata

PIP = f"{shlex.quote(sys.executable)} -m pip"
REINSTALL = f"{PIP} install --force-reinstall --no-deps"
# The detectron2 on package registries can't be built, and setuptools 82 has no pkg_resources.
SOURCES = {
    "detectron2": "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'",
    "setuptools": "'setuptools<82'",
}
#: OpenMMLab's own distributions; the maintained ones have the same import names.
UPSTREAM = ["mmengine", "mmcv", "mmcv-lite", "mmsegmentation"]


def version_of(distribution: str) -> str:
    """The version of a distribution; empty where it is not installed."""
    try:
        return metadata.version(distribution) or ""
    except Exception:  # a partial installation raises different errors in each version of Python
        return ""


def install(distribution: str, *replaced: str) -> str:
    """The command for the newest version of a distribution, in place of others with the same files."""
    if distribution.startswith("onedl-") and not replaced:
        replaced = tuple(filter(version_of, UPSTREAM))
    command = f"{PIP} install --upgrade {SOURCES.get(distribution, distribution)}"
    return f"{PIP} uninstall -y {' '.join(replaced)} && {command}" if replaced else command


def repair(module: str, distribution: str, error: str) -> str | None:
    """The command that repairs a module of an installed distribution that raised ``error``; None if unknown."""
    if module == "lvis" and "np.float" in error:
        file = metadata.distribution("lvis").locate_file("lvis/eval.py")
        return rf"sed -i 's/np\.float)/float)/' {shlex.quote(str(file))}"
    if re.search(r"lib(GL|gthread|glib)\b", error):
        return f"{REINSTALL} opencv-python-headless"
    if re.search(r"torchvision::nms|torchvision\S*\.so|[Cc]ustom C\+\+ ops", error):
        torch, _, build = version_of("torch").partition("+")
        index = f"  # from the index that has torch +{build}" if build else ""
        return f"{PIP} uninstall -y torchvision && {PIP} install torchvision torch=={torch}{index}"
    if not distribution or not re.match(r"\w+:", error):  # a crash, a hang or an exit may be anything
        return None
    same = SOURCES.get(distribution, f"{distribution}=={version_of(distribution).partition('+')[0]}")
    missing = re.search(r"No module named '(\w+)(\.?)", error)
    if missing and missing[1] != module:  # install what it asks for, unless that is there and lacks a part
        return None if missing[2] else f"{PIP} install {same}"
    # torch comes with its CUDA libraries.
    return f"{PIP} install --force-reinstall {same}" if distribution == "torch" else f"{REINSTALL} {same}"
