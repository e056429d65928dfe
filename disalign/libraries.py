"""The libraries of each part, what is installed of them, and the commands that install or mend them.

None of them is imported here: what they must do is code for :mod:`disalign.probes`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
# What is said of a library that was not imported.
NOT_INSTALLED, NOT_TRIED, NOT_CHECKED = "not installed", "not tried", "could not be checked"
NO_EXCEPTION = ("no answer", "it ")  # how a process ends that is too slow, or gone
# How a shell calls the Python that is examined. The folder counts: a virtual environment's python is a link.
_PYTHONS = [(os.path.dirname(each), os.path.realpath(each)) for each in (shutil.which("python") or "", sys.executable)]
PYTHON = "python" if _PYTHONS[0] == _PYTHONS[1] else shlex.quote(sys.executable)
PIP = f"{PYTHON} -m pip"


class Library(NamedTuple):
    """Something to import, and who distributes it.

    Attributes:
        name: what it is called in the report; imported is ``module``, where that is another.
        distributions: any of them has it; the first is the one to install. None: it comes with something else.
        needs: names of libraries without which trying this one says nothing.
        works: code that must run, beside the import of what it then calls ``module``; it may set ``value``.
        lost: what to do without it, or what is lost, where its part works without it.
    """

    name: str
    distributions: tuple = ()
    needs: tuple = ()
    works: str = ""
    lost: str = ""
    module: str = ""


# The detectron2 on package registries cannot be built (see the README).
DETECTRON2 = "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
HEADLESS = f"{PIP} install --force-reinstall --no-deps opencv-python-headless"
# The same import names from two distributions, which overwrite each other's files: the maintained one, and upstream's.
OPENMMLAB = {
    "onedl-mmengine": ("mmengine",),
    "onedl-mmcv": ("mmcv", "mmcv-lite"),
    "onedl-mmsegmentation": ("mmsegmentation",),
    "onedl-mim": ("openmim",),
}
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")

CALIBRATES = """
import torch
model, loss = module.wrap_classifier(torch.nn.Linear(4, 3), class_counts=[3, 2, 1])
loss(model(torch.zeros(2, 4)), torch.tensor([0, 2])).backward()
"""
GPUS = """
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    there = range(module.cuda.device_count() if module.cuda.is_available() else 0)
for i in there:
    (module.ones(2, device=f"cuda:{i}") + 1).sum().item()
value = {
    "build": module.version.cuda or module.version.hip,
    "names": [module.cuda.get_device_name(i) for i in there],
    "said": [str(warning.message) for warning in caught],
}
"""
THREADS = """
import os

value = f"torch threads: {module.get_num_threads()}, cores: {os.cpu_count()}"
"""
TOOLS = "import disalign_tools.convert, disalign_tools.count_classes"
NMS = "import torch; module.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)"
OWN_CHECKPOINTS = """
import os, tempfile
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "epoch_1.pth")
    torch.save({"state_dict": {}, "message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}}, path)
    CheckpointLoader.load_checkpoint(path, "cpu")
value = "MMEngine loads its own"
"""
OPERATORS = "CCHead, PSAHead, PointHead and SANHead need an mmcv built with its operators"

CV2 = Library("cv2", OPENCV)
PILLOW = Library("PIL", ("pillow",), works="import PIL.Image")
TORCHVISION = Library("torchvision", ("torchvision",), ("torch", "PIL"), NMS)
TQDM = Library("tqdm", ("tqdm",))
MMENGINE = Library(
    "mmengine",
    ("onedl-mmengine", "mmengine"),
    ("torch", "numpy", "cv2", "torchvision"),
    # Every run starts with this; it falls over a broken torchvision.
    "import mmengine.runner; mmengine.utils.dl_utils.collect_env()",
)
CHECKPOINTS = Library(
    "checkpoints",
    module="mmengine",
    needs=("mmengine",),
    works=OWN_CHECKPOINTS,
    lost="MMEngine does not load its own, our commands do",
)
PARTS = {
    "core": (
        Library("numpy", ("numpy",)),
        Library("torch", ("torch",)),
        Library("GPU", module="torch", needs=("torch",), works=GPUS),
        Library("CPU", module="torch", needs=("torch",), works=THREADS),
        Library("disalign", needs=("torch", "numpy"), works=CALIBRATES),
    ),
    "cls": (
        CV2,
        PILLOW,
        TORCHVISION,
        Library("timm", ("timm",), ("torch", "torchvision")),
        MMENGINE,
        CHECKPOINTS,
        Library("sklearn", ("scikit-learn",), ("numpy",), "import sklearn.datasets"),
        Library("matplotlib", ("matplotlib",), ("numpy", "PIL"), "import matplotlib.figure"),
        Library("tensorboard", ("tensorboard",), ("torch",), "import torch.utils.tensorboard"),
        TQDM,
        Library("disalign_cls", needs=("timm", "mmengine")),
    ),
    "mmseg": (
        CV2,
        MMENGINE,
        CHECKPOINTS,
        Library("mmcv", ("onedl-mmcv", "mmcv", "mmcv-lite"), ("mmengine",)),
        Library("mmcv._ext", needs=("mmcv",), lost=OPERATORS),
        Library("mmseg", ("onedl-mmsegmentation", "mmsegmentation"), ("mmcv",), "import mmseg.apis"),
        Library("mim", ("onedl-mim", "openmim"), lost="python -m disalign_mmseg.train does what mim train does"),
        TQDM,
        Library("disalign_mmseg", needs=("mmseg",)),
    ),
    "d2": (
        CV2,
        PILLOW,
        TORCHVISION,
        Library("fvcore", ("fvcore",), ("torch",), "import fvcore.common.config"),
        Library("pkg_resources", ("setuptools",)),
        Library("detectron2", ("detectron2",), ("torch", "torchvision", "fvcore"), "import detectron2.modeling"),
        Library("detectron2._C", needs=("detectron2",)),
        Library("detectron2.model_zoo", needs=("detectron2", "pkg_resources")),
        Library("faster_coco_eval", ("faster-coco-eval",), ("numpy",)),
        Library("lvis", ("lvis",), ("numpy", "cv2")),
        Library("disalign_d2", needs=("detectron2", "detectron2._C")),
    ),
    "tools": (PILLOW, TQDM, Library("disalign_tools", needs=("torch", "numpy", "PIL", "tqdm"), works=TOOLS)),
    "export": (
        Library("onnx", ("onnx",), ("numpy",)),
        Library("onnxscript", ("onnxscript",), ("onnx",)),
        Library("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), ("numpy",)),
    ),
}
# Beside the core; a part counts as installed where all of these are.
FRAMEWORKS = {
    "cls": ("mmengine", "timm"),
    "mmseg": ("mmseg",),
    "d2": ("detectron2",),
    "tools": ("PIL", "tqdm"),
    "export": ("onnx",),
}


@lru_cache
def version_of(distribution: str) -> str | None:
    """As its metadata says: None where it is not installed, ``""`` where the metadata does not say."""
    try:
        return metadata.version(distribution) or ""
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # half an installation: each version of Python fails in a way of its own
        return ""


def installed(library: Library) -> str | None:
    """The distribution that a library comes from; None if there is none."""
    return next((name for name in library.distributions if version_of(name) is not None), None)


def is_there(library: Library) -> bool:
    """Whether there is anything to import, whole or broken; it is not imported."""
    if installed(library) or not library.distributions:
        return True
    try:
        spec = find_spec(library.name)
    except Exception:
        return True
    # Without an origin it is a folder without code, as an uninstalled library may leave behind.
    return spec is not None and spec.origin is not None


@lru_cache
def requirements() -> dict:
    """What disalign and its extras ask for: ``{"timm": ">=1.0.9"}``; hardly anything where it is not installed."""
    try:
        lines = metadata.requires("disalign") or ()
    except Exception:
        lines = ()
    matches = [re.match(r"([\w.-]+)\s*\(?([^;)]*)", line) for line in lines]
    # The one requirement without which installing something is no use: 82 has no pkg_resources.
    return {"setuptools": "<82", **{match[1].lower(): match[2].strip() for match in matches if match}}


def upstream() -> list:
    """The installed distributions of OpenMMLab itself."""
    return [name for names in OPENMMLAB.values() for name in names if version_of(name) is not None]


def install(libraries) -> str:
    """The command that installs libraries, beside what is there."""
    names = [library.distributions[0] for library in libraries if library.name != "detectron2"]
    if upstream():
        names = [OPENMMLAB[name][0] if name == "onedl-mim" else name for name in names]
    commands = []
    if names and OPENMMLAB.keys() & names and upstream():
        commands = [maintained(names)]
    elif names:
        wanted = requirements()
        commands = [f"{PIP} install {shlex.join(name + wanted.get(name, '') for name in names)}"]
    if len(names) < len(libraries):
        commands.append(f"{PIP} install {DETECTRON2}")
    return " && ".join(commands)


def maintained(names=()) -> str:
    """The command that puts the maintained distributions in the place of OpenMMLab's, and installs ``names`` beside."""
    there = [name for name in OPENMMLAB if any(version_of(each) is not None for each in (name, *OPENMMLAB[name]))]
    doubled = [name for name in there if version_of(name) is not None]
    return (
        f"{PIP} uninstall -y {' '.join(upstream() + doubled)} && "
        f"{PIP} install {' '.join(dict.fromkeys([*there, *names]))}"
    )


def own_install() -> str | None:
    """The command that installs the checkout at hand; None where this is no checkout."""
    return f"{PIP} install --no-deps -e {shlex.quote(str(HERE))}" if (HERE / "setup.py").is_file() else None


def same_build() -> str:
    """The command for a torchvision that fits the torch at hand, which stays."""
    match = re.match(r"2\.(\d+)\.", version_of("torch") or "")
    # To torch 2.13, each torchvision is for one torch (0.28 for 2.13); 0.29 is for 2.14 and later.
    version = f"==0.{int(match[1]) + 15}.*" if match and int(match[1]) < 14 else ""
    return f"{PIP} install --force-reinstall --no-deps {shlex.quote('torchvision' + version)}"


def shadow(library: Library) -> str | None:
    """The folder that a library is taken from, where it is not the one that it is installed in."""
    module = (library.module or library.name).partition(".")[0]
    try:
        spec, distribution = find_spec(module), metadata.distribution(installed(_PROVIDERS[module]))
        folder = os.path.dirname(os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin)
        editable = re.search(r'"editable": *true', distribution.read_text("direct_url.json") or "")
        return None if editable or os.path.samefile(folder, distribution.locate_file("")) else folder
    except Exception:  # there is nothing to compare
        return None


def mend_of(library: Library, error: str) -> str | None:
    """The command for what trying a library said; None where we know of none that surely mends it."""
    if error == NOT_INSTALLED:
        return install([library])
    if error.startswith((NOT_TRIED, NOT_CHECKED, *NO_EXCEPTION)):
        return None
    if re.search(r"torchvision::nms|torchvision\S*\.so|[Cc]ustom C\+\+ ops", error):
        return same_build()
    if re.search(r"lib(GL|gthread|glib|SM|Xext|Xrender)\b", error):
        return HEADLESS
    operators = re.search(r"mmcv[./]_ext", error)
    if operators or library.name == "checkpoints":
        # No registry has an mmcv with operators for every torch; the maintained mmseg starts without.
        return maintained() if upstream() and library.name in ("checkpoints", "mmseg") else None
    absent = re.search(r"No module named '([^'.]+)|there is no (\w+);", error)
    absent = absent and (absent[1] or absent[2])
    if absent and absent.startswith("disalign"):
        return own_install()
    if absent and (absent == "pkg_resources" or absent != library.name.partition(".")[0]):
        return _with_module(library, absent)
    if library.name.startswith("detectron2"):
        return f"{PIP} install --force-reinstall --no-deps {DETECTRON2}"
    return reinstall(library) if library.distributions else None


def _with_module(library: Library, module: str) -> str | None:
    """The command for a library that lacks another's module; a distribution of that name may be a stranger's."""
    provider, name = _PROVIDERS.get(module), installed(library)
    if provider and (module == "pkg_resources" or not is_there(provider)):
        return install([provider])
    if not name or name in ("torch", "torchvision", "detectron2", *upstream()):
        return None
    if is_there(Library(module, (module,))):  # but not the part that is asked for: the library is too old for it
        return f"{PIP} install --upgrade {shlex.quote(name + requirements().get(name, ''))}"
    asked = {re.match(r"[\w.-]+", line)[0] for line in metadata.requires(name) or () if ";" not in line} - {*OPENCV}
    # Pip brings what is asked for, and what is not is not known.
    return f"{PIP} install {_as_it_is(name)}" if any(version_of(each) is None for each in asked) else None


def reinstall(library: Library) -> str:
    """The command that installs a library again, as it is."""
    name = installed(library) or library.distributions[0]
    # Torch's own libraries (CUDA's) are distributions too, and may be what is missing.
    options = "--force-reinstall" if name == "torch" else "--force-reinstall --no-deps"
    return f"{PIP} install {options} {_as_it_is(name)}"


def _as_it_is(distribution: str) -> str:
    version = (version_of(distribution) or "").partition("+")[0]
    return f"{distribution}{version and '=='}{version}"


# Who has a module whose name is not its distribution's.
_PROVIDERS = {library.name: library for part in PARTS.values() for library in part if library.distributions}
