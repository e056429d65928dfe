"""The doctor, in environments broken on purpose: each line, each command, each exit status, never a traceback."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import packaging
import pytest

from disalign import doctor
from disalign.libraries import PARTS
from disalign.probes import Outcome, try_pieces

ROOT = Path(__file__).parents[2]
OURS = ("doctor.py", "libraries.py", "probes.py")

# Stands for whatever is not spelled out.
ANYTHING = """
class Anything:
    def __getattr__(self, name):
        return self
    def __call__(self, *arguments, **options):
        return self
    __add__ = __call__
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()
"""
DISALIGN = f"""{ANYTHING}
def wrap_classifier(*arguments, **options):
    return Anything(), Anything()
"""
TORCH = f"""
class version:
    cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
def get_num_threads():
    return 1
{ANYTHING}"""
# Distribution, version, and the modules that the doctor tries.
HEALTHY = {
    "numpy": ("numpy", "2.4.6"),
    "torch": ("torch", "2.15.0", "utils/tensorboard"),
    "cv2": ("opencv-python-headless", "5.0.0.93"),
    "torchvision": ("torchvision", "0.29.2"),
    "timm": ("timm", "1.0.31"),
    "mmengine": ("onedl-mmengine", "0.10.12", "runner", "logging"),
    "sklearn": ("scikit-learn", "1.9.1", "datasets"),
    "matplotlib": ("matplotlib", "3.11.2", "figure"),
    "tensorboard": ("tensorboard", "2.21.0"),
    "tqdm": ("tqdm", "4.70.1"),
    "mmcv": ("onedl-mmcv", "2.3.6", "_ext"),
    "mmseg": ("onedl-mmsegmentation", "1.4.2", "apis"),
    "mim": ("onedl-mim", "0.5.1"),
    "fvcore": ("fvcore", "0.1.5.post20221221", "common/config"),
    "pkg_resources": ("setuptools", "81.0.0"),
    "detectron2": ("detectron2", "0.6", "modeling", "_C", "model_zoo"),
    "faster_coco_eval": ("faster-coco-eval", "1.8.0"),
    "lvis": ("lvis", "0.5.3", "eval"),
    "PIL": ("pillow", "13.0.0", "Image"),
    "onnx": ("onnx", "1.23.2"),
    "onnxscript": ("onnxscript", "0.7.2"),
    "onnxruntime": ("onnxruntime", "1.31.1"),
}
OWN = {
    "disalign_cls": (),
    "disalign_mmseg": (),
    "disalign_d2": (),
    "disalign_tools": ("convert", "count_classes"),
}
REQUIREMENTS = ("torch>=2.6", "timm>=1.0.9; extra == 'cls'", "setuptools<82,>=80; extra == 'd2'")
DETECTRON2 = "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
SAME_BUILD = "python -m pip install --force-reinstall --no-deps torchvision"
OPERATORS = "CCHead, PSAHead, PointHead and SANHead need an mmcv built with its operators"
HEADLESS = "python -m pip install --force-reinstall --no-deps opencv-python-headless"


@pytest.fixture(scope="session")
def empty_python(tmp_path_factory):
    """A Python with nothing but its standard library."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


class Environment:
    """Fake libraries in a folder, beside a copy of the doctor."""

    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        self.module("disalign", DISALIGN)
        for name in OURS:
            shutil.copy(ROOT / "disalign" / name, folder / "disalign" / name)
        self.metadata("disalign", "0.1.0", *REQUIREMENTS)
        self.module("pip")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
        for name, (distribution, version, *modules) in HEALTHY.items():
            self.module(name, TORCH if name == "torch" else ANYTHING)
            for module in modules:
                self.module(f"{name}/{module}", ANYTHING)
            self.metadata(distribution, version)
        for name, modules in OWN.items():
            for module in (name, *(f"{name}/{module}" for module in modules)):
                self.module(module)

    def module(self, name, code=""):
        """A package, ``"a"`` or ``"a/b"``."""
        folder = self.folder
        for part in name.split("/"):
            folder /= part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / "__init__.py").write_text(code)

    def metadata(self, distribution, version, *requirements):
        self.no_metadata(distribution)
        folder = self.folder / f"{distribution.replace('-', '_')}-{version or 0}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", *(f"Requires-Dist: {each}" for each in requirements)]
        (folder / "METADATA").write_text("\n".join(lines + [f"Version: {version}"] * bool(version)) + "\n")
        return folder

    def no_metadata(self, distribution):
        for old in self.folder.glob(f"{distribution.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(old)

    def without(self, *names):
        for name in names:
            shutil.rmtree(self.folder / name)
            self.no_metadata(HEALTHY[name][0])

    def variables(self, **variables):
        path = f"{self.python.parent}{os.pathsep}{os.defpath}"
        return {"PATH": path, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **variables}

    def run(self, *arguments, **variables):
        """Exit status and text of the doctor."""
        command = [self.python, "-m", "disalign.doctor", *arguments]
        variables = self.variables(**variables)
        done = subprocess.run(command, env=variables, cwd=self.elsewhere, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stdout + done.stderr
        assert done.returncode == 2 or done.stderr == ""
        return done.returncode, done.stdout

    def report(self, *arguments, **variables):
        """Exit status, and each line that is not ok as ``{name: [state, detail, mend]}``."""
        status, text = self.run("--json", *arguments, **variables)
        report = json.loads(text)
        assert list(report) == ["ok", "python", "versions", "checks"]
        assert all(list(check) == ["part", "name", "state", "detail", "mend"] for check in report["checks"])
        assert {check["state"] for check in report["checks"]} <= {"ok", "note", "problem", "absent"}
        assert report["ok"] == (status == 0) == all(check["state"] != "problem" for check in report["checks"])
        lines = [check for check in report["checks"] if check["state"] != "ok"]
        return status, {check["name"]: [check["state"], check["detail"], check["mend"]] for check in lines}


@pytest.fixture
def environment(tmp_path, empty_python):
    return Environment(tmp_path, empty_python)


def test_everything_works(environment):
    status, text = environment.run()
    assert status == 0
    states = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert states == {"ok"}
    assert text.endswith(f"\n\nworks: {', '.join(PARTS)}\n")
    assert "  ok       torch                 2.15.0\n" in text
    assert "  ok       mmengine              0.10.12 (onedl-mmengine)\n" in text
    assert text.isascii()


def test_the_versions_are_in_the_json(environment):
    environment.metadata("opencv-python", "5.0.0.93")
    report = json.loads(environment.run("--json", "core")[1])
    expected = {distribution: version for distribution, version, *_ in HEALTHY.values()}
    assert report["versions"] == {**expected, "disalign": "0.1.0", "opencv-python": "5.0.0.93"}
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))


# A broken import never takes the doctor down, and what needs it is not blamed.

BREAKAGES = {
    "raise OSError('libcudart.so.13: no such file\\nmore')": "OSError: libcudart.so.13: no such file",
    "import os, signal; print('noise'); os.kill(os.getpid(), signal.SIGSEGV)": "it crashes Python (SIGSEGV)",
    "import sys; sys.exit(0)": "it ends Python, with exit status 0",
    "import os; os._exit(7)": "it ends Python, with exit status 7",
    "import time; time.sleep(60)": "no answer within 0.5 seconds: give --timeout more seconds",
    "input()": "EOFError: EOF when reading a line",
    "raise Exception": "Exception",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "def (": "SyntaxError: invalid syntax (__init__.py, line 1)",
}


@pytest.mark.parametrize("code", BREAKAGES)
def test_a_torch_that_does_not_import(environment, code):
    environment.module("torch", code)
    status, lines = environment.report("core", "cls", "--timeout", "0.5" if "sleep" in code else "20")
    assert status == 1
    # More time is no command, and what crashes may be anything.
    unclear = BREAKAGES[code].startswith(("it ", "no answer"))
    mend = None if unclear else "python -m pip install --force-reinstall torch==2.15.0"
    assert lines.pop("torch") == ["problem", f"2.15.0: {BREAKAGES[code]}", mend]
    assert set(lines) == {"disalign", "torchvision", "timm", "mmengine", "tensorboard", "disalign_cls"}
    assert all("not tried, since" in detail for _, detail, _ in lines.values())
    assert {mend for *_, mend in lines.values()} == {None}


def test_without_torch(environment):
    environment.without("torch")
    status, lines = environment.report("core")
    assert status == 1
    assert lines["torch"] == ["problem", "not installed", "python -m pip install 'torch>=2.6'"]
    assert lines["disalign"] == ["problem", "not tried, since torch does not work", None]


def test_without_numpy(environment):
    environment.without("numpy")
    environment.module("timm", "import numpy")
    status, lines = environment.report("core")
    assert status == 1
    assert lines["numpy"] == ["problem", "not installed", "python -m pip install numpy"]
    assert "torch" not in lines


def test_a_folder_that_an_uninstalled_library_left_is_not_the_library(environment):
    environment.without("timm")
    (environment.folder / "timm" / "layers").mkdir(parents=True)
    status, lines = environment.report("cls")
    assert (status, lines["timm"]) == (1, ["problem", "not installed", "python -m pip install 'timm>=1.0.9'"])
    environment.metadata("timm", "1.0.31")
    status, lines = environment.report("cls")
    left = f"ImportError: a folder without code stands in its place: {environment.folder / 'timm'}"
    mend = "python -m pip install --force-reinstall --no-deps timm==1.0.31"
    assert (status, lines["timm"]) == (1, ["problem", f"1.0.31: {left}"[:208], mend])


def test_a_modules_name_is_not_taken_for_a_distributions(environment):
    # What timm asks for, pip brings; what sklearn and ours do not ask for, nobody knows.
    environment.module("timm", "import absl.flags")
    environment.metadata("timm", "1.0.31", "torch", "absl_py>=2")
    environment.module("sklearn", "import hydra")
    environment.metadata("scikit-learn", "1.9.1", "numpy>=1", "colorama; os_name == 'nt'", "opencv-contrib-python")
    environment.module("disalign_tools", "import google.protobuf")
    _, lines = environment.report("cls", "tools")
    assert lines.pop("timm")[2] == "python -m pip install timm==1.0.31"
    assert lines.pop("sklearn") == [
        "problem",
        "1.9.1 (scikit-learn): ModuleNotFoundError: No module named 'hydra'",
        None,
    ]
    assert lines.pop("disalign_tools") == ["problem", "ModuleNotFoundError: No module named 'google'", None]
    environment.metadata("absl-py", "2.3")
    assert environment.report("cls")[1]["timm"][2] is None


def test_a_library_of_ours_that_is_not_there_is_installed(environment):
    environment.without("tqdm")
    environment.module("timm", "import tqdm.auto")
    assert environment.report("cls")[1]["timm"][2] == "python -m pip install tqdm"


def test_a_library_too_old_for_another_is_upgraded(environment):
    environment.module("torchvision/transforms")
    for module in ("torchvision.transforms.functional_tensor", "PIL.nothing"):
        environment.module("timm", f"import {module}")
        status, lines = environment.report("cls")
        detail = f"1.0.31: ModuleNotFoundError: No module named '{module}'"
        assert (status, lines["timm"]) == (1, ["problem", detail, "python -m pip install --upgrade 'timm>=1.0.9'"])
    # Neither gigabytes nor what stands still.
    environment.module("timm", ANYTHING)
    environment.module("torch", "import numpy.nothing")
    assert environment.report("core")[1]["torch"][2] is None
    environment.module("torch", TORCH)
    to_upstream(environment)
    environment.module("mmseg", "import torch.nothing")
    assert environment.report("mmseg")[1]["mmseg"][2] is None


def shadowed(environment, name, code):
    """A folder that comes first on the path, with a module."""
    folder = environment.folder / "shadows"
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder, f"{folder}{os.pathsep}{environment.folder}"


def test_a_broken_module_in_the_way(environment):
    folder, path = shadowed(environment, "torch", "__version__ = '1'\nraise RuntimeError('not me')")
    where = f"taken from {folder}, not the installed 2.15.0 (remove that folder from PYTHONPATH, or rename torch there)"
    status, lines = environment.report("core", PYTHONPATH=path)
    assert (status, lines["torch"]) == (1, ["problem", f"{where}: RuntimeError: not me", None])
    assert environment.report("core") == (0, {})


def test_a_working_module_in_the_way(environment):
    folder, path = shadowed(environment, "mmengine", f"__version__ = '0.10.7'\n{ANYTHING}")
    for module in ("runner", "logging"):
        (folder / "mmengine" / f"{module}.py").write_text(ANYTHING)
    where = f"taken from {folder}, not the installed 0.10.12 (onedl-mmengine) "
    where += "(remove that folder from PYTHONPATH, or rename mmengine there)"
    status, lines = environment.report("cls", PYTHONPATH=path)
    assert (status, lines) == (0, {"mmengine": ["note", f"0.10.7 {where}", None]})


def test_an_editable_installation_is_not_in_the_way(environment):
    folder, path = shadowed(environment, "timm", "")
    direct = [metadata / "direct_url.json" for metadata in environment.folder.glob("timm-*.dist-info")]
    direct[0].write_text(json.dumps({"dir_info": {"editable": True}, "url": folder.as_uri()}))
    assert environment.report("cls", PYTHONPATH=path) == (0, {})


def test_a_broken_pillow_is_what_is_blamed(environment):
    environment.module("PIL", "raise ImportError('_imaging')")
    for name in ("torchvision", "matplotlib"):
        environment.module(name, "import PIL.Image")
    for part, needs in (("cls", {"torchvision", "matplotlib"}), ("d2", {"torchvision"})):
        status, lines = environment.report(part)
        mend = "python -m pip install --force-reinstall --no-deps pillow==13.0.0"
        assert (status, lines["PIL"]) == (1, ["problem", "13.0.0 (pillow): ImportError: _imaging", mend])
        assert {lines[name][2] for name in needs} == {None}
        assert all("not tried, since PIL does not work" in lines[name][1] for name in needs)


def test_the_python_that_is_examined_is_the_one_that_is_mended(environment):
    environment.without("timm")
    mend = "-m pip install 'timm>=1.0.9'"
    assert environment.report("cls")[1]["timm"][2] == f"python {mend}"
    other = environment.folder / "a bin" / "python"
    other.parent.mkdir()
    for found in (other.parent / "nothing", other):  # another virtual environment's, of the same Python
        found.symlink_to(environment.python.resolve())
        mended = environment.report("cls", PATH=str(other.parent))[1]["timm"][2]
        assert mended == f"{environment.python} {mend}"


def test_without_pip(environment):
    shutil.rmtree(environment.folder / "pip")
    detail = "not there, though commands that mend need it"
    assert environment.report("core") == (0, {"pip": ["note", detail, "python -m ensurepip"]})


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("reader", ["gone", "full"])
def test_where_nobody_reads_the_exit_status_says_it(environment, reader, broken):
    if broken:
        environment.without("timm")
    if reader == "gone":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    command = [environment.python, "-m", "disalign.doctor", "cls" if broken else "core"]
    with os.fdopen(write, "w") as stdout:
        done = subprocess.run(
            command, env=environment.variables(), cwd=environment.elsewhere, stdout=stdout, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (int(broken), b"")


def test_a_folder_with_an_umlaut_stays_itself_in_a_command(environment):
    folder = environment.folder / "f\u00fcr"
    folder.mkdir()
    shutil.move(environment.folder / "disalign", folder)
    environment.no_metadata("disalign")
    (folder / "setup.py").touch()
    path = f"{folder}{os.pathsep}{environment.folder}"
    mend = f"python -m pip install --no-deps -e '{folder}'\n"
    assert mend in environment.run("core", PYTHONPATH=path, PYTHONUTF8="1")[1]
    mend = mend.replace("\u00fc", "\\xfc")
    assert mend in environment.run("core", PYTHONPATH=path, PYTHONIOENCODING="ascii")[1]


# What is asked for decides the exit status.


def test_what_is_not_installed_is_no_problem_unless_asked_for(environment):
    environment.without("timm", "mmseg", "mmcv", "detectron2", "onnx")
    status, text = environment.run()
    assert status == 0
    assert text.endswith("\nworks: core, tools\n")
    lines = environment.report()[1]
    assert {name: state for name, (state, *_) in lines.items()} == dict.fromkeys(
        ["cls", "mmseg", "d2", "export"], "absent"
    )
    assert lines["cls"][1:] == ["not installed: timm", "python -m pip install 'timm>=1.0.9'"]
    assert lines["mmseg"][1:] == ["not installed: mmcv, mmseg", "python -m pip install onedl-mmcv onedl-mmsegmentation"]
    assert lines["d2"][1:] == ["not installed: detectron2", f"python -m pip install {DETECTRON2}"]
    for part, library in {"cls": "timm", "mmseg": "mmseg", "d2": "detectron2", "export": "onnx"}.items():
        status, lines = environment.report(part)
        assert (status, lines[library][0]) == (1, "problem")
        assert not any(state == "absent" for state, *_ in lines.values())


def test_a_broken_framework_counts_as_installed(environment):
    shutil.rmtree(environment.folder / "mmseg")
    status, lines = environment.report()
    mend = "python -m pip install --force-reinstall --no-deps onedl-mmsegmentation==1.4.2"
    assert status == 1
    assert lines["mmseg"] == [
        "problem",
        "1.4.2 (onedl-mmsegmentation): ModuleNotFoundError: No module named 'mmseg'",
        mend,
    ]


def test_what_breaks_another_part_is_not_asked_for(environment):
    environment.module("detectron2", "raise RuntimeError")
    assert environment.report("cls", "mmseg", "tools")[0] == 0
    assert environment.report("cls", "d2")[0] == 1
    assert environment.run("d2")[1].endswith("\ndoes not work: d2\n")


@pytest.mark.parametrize(
    "arguments", [["torch"], ["core", "disalign_cls"], ["--timeout", "0"], ["--timeout", "nan"], ["--no"]]
)
def test_bad_arguments(environment, arguments):
    assert environment.run(*arguments) == (2, "")


# Known conflicts.


def test_both_distributions_of_openmmlab(environment):
    environment.metadata("mmengine", "0.10.7")
    environment.metadata("mmcv-lite", "2.1.0")
    environment.metadata("openmim", "0.3.9")
    environment.no_metadata("onedl-mim")
    for part in ("cls", "mmseg"):
        status, lines = environment.report(part)
        detail = (
            "onedl-mmengine and mmengine, onedl-mmcv and mmcv-lite are both installed and overwrite each other's files"
        )
        mend = (
            "python -m pip uninstall -y mmengine mmcv-lite openmim onedl-mmengine onedl-mmcv onedl-mmsegmentation"
            " && python -m pip install onedl-mmengine onedl-mmcv onedl-mmsegmentation onedl-mim"
        )
        assert status == 1
        assert lines == {"OpenMMLab": ["problem", detail, mend]}


def to_upstream(environment):
    for ours, version, upstream in (
        ("onedl-mmengine", "0.10.7", "mmengine"),
        ("onedl-mmcv", "2.1.0", "mmcv"),
        ("onedl-mmsegmentation", "1.2.2", "mmsegmentation"),
        ("onedl-mim", "0.3.9", "openmim"),
    ):
        environment.no_metadata(ours)
        environment.metadata(upstream, version)


FROM_UPSTREAM = (
    "python -m pip uninstall -y mmengine mmcv mmsegmentation openmim"
    " && python -m pip install onedl-mmengine onedl-mmcv onedl-mmsegmentation onedl-mim"
)


def test_upstream_alone_is_fine(environment):
    to_upstream(environment)
    status, text = environment.run("cls", "mmseg")
    assert status == 0
    assert "  ok       mmengine        0.10.7\n" in text
    assert "  ok       mmseg           1.2.2 (mmsegmentation)\n" in text


def test_upstream_without_mim(environment):
    to_upstream(environment)
    environment.no_metadata("openmim")
    shutil.rmtree(environment.folder / "mim")
    status, lines = environment.report("mmseg")
    detail = "python -m disalign_mmseg.train does what mim train does; not installed"
    assert (status, lines) == (0, {"mim": ["note", detail, "python -m pip install openmim"]})


def test_segmentation_is_not_installed_over_upstreams_mmengine(environment):
    environment.without("mmseg", "mmcv", "mim", "mmengine")
    environment.module("mmengine", ANYTHING)
    environment.metadata("mmengine", "0.10.7")
    mend = environment.report("mmseg")[1]["mmseg"][2]
    assert mend == "python -m pip uninstall -y mmengine && python -m pip install onedl-mmengine onedl-mmsegmentation"


def test_an_mmengine_that_does_not_load_its_own_checkpoints(environment):
    to_upstream(environment)
    environment.module(
        "mmengine/runner", "def __getattr__(name): raise ValueError('\\x1b[1mWeights only\\x1b[0m load failed')"
    )
    status, lines = environment.report("cls")
    detail = "MMEngine does not load its own, our commands do; ValueError: Weights only load failed"
    assert (status, lines) == (0, {"checkpoints": ["note", detail, FROM_UPSTREAM]})


def test_mmcv_without_operators(environment):
    shutil.rmtree(environment.folder / "mmcv" / "_ext")
    status, lines = environment.report("mmseg")
    detail = f"{OPERATORS}; ModuleNotFoundError: No module named 'mmcv._ext'"
    assert (status, lines) == (0, {"mmcv._ext": ["note", detail, None]})
    # Nor does the maintained one have them.
    to_upstream(environment)
    assert environment.report("mmseg") == (0, {"mmcv._ext": ["note", detail, None]})


def test_upstream_mmcv_without_operators(environment):
    to_upstream(environment)
    shutil.rmtree(environment.folder / "mmcv" / "_ext")
    environment.module("mmseg", "import mmcv._ext")
    status, lines = environment.report("mmseg")
    detail = "1.2.2 (mmsegmentation): ModuleNotFoundError: No module named 'mmcv._ext'"
    assert (status, lines["mmseg"]) == (1, ["problem", detail, FROM_UPSTREAM])
    assert lines["mmcv._ext"][2] is None


def test_setuptools_without_pkg_resources(environment):
    shutil.rmtree(environment.folder / "pkg_resources")
    environment.metadata("setuptools", "82.0.1")
    status, lines = environment.report("d2")
    detail = "82.0.1 (setuptools): ModuleNotFoundError: No module named 'pkg_resources'"
    mend = "python -m pip install 'setuptools<82,>=80'"
    assert status == 1
    assert lines == {
        "pkg_resources": ["problem", detail, mend],
        "detectron2.model_zoo": ["problem", "not tried, since pkg_resources does not work", None],
    }
    # With nothing that says which versions are asked for.
    (environment.folder / "packaging").unlink()
    environment.no_metadata("disalign")
    status, lines = environment.report("d2")
    assert (status, lines["pkg_resources"]) == (1, ["problem", detail, "python -m pip install 'setuptools<82'"])


def test_mim_without_pkg_resources(environment):
    environment.without("pkg_resources")
    environment.module("mim", "import pkg_resources")
    status, lines = environment.report("mmseg")
    assert (status, lines["mim"][0], lines["mim"][2]) == (0, "note", "python -m pip install 'setuptools<82,>=80'")


@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        'class ops:\n    def nms(*boxes): raise RuntimeError("Couldn\'t load custom C++ ops. This can happen if")',
    ],
)
def test_a_torchvision_of_another_build(environment, code):
    environment.module("torchvision", code)
    status, lines = environment.report("cls", "d2")
    assert (status, lines["torchvision"][0], lines["torchvision"][2]) == (1, "problem", SAME_BUILD)
    assert lines["detectron2"][1:] == ["0.6: not tried, since torchvision does not work", None]


def test_a_broken_torchvision_breaks_mmengines_report(environment):
    environment.module("mmengine", "class utils:\n  class dl_utils:\n    def collect_env(): import torchvision")
    environment.module("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    status, lines = environment.report("mmseg")
    assert (status, lines["mmengine"][2]) == (1, SAME_BUILD)


def test_a_torchvision_for_another_torch(environment):
    environment.metadata("torchvision", "0.20.1", "numpy", "torch (==2.5.1)", "gdown ; extra == 'gdown'")
    status, lines = environment.report("cls")
    detail = "2.15.0, but torchvision asks for ==2.5.1"
    assert (status, lines) == (0, {"torch": ["note", detail, SAME_BUILD]})
    environment.metadata("torchvision", "0.20.1", "torch==2.15.0")
    assert environment.report("cls") == (0, {})


@pytest.mark.parametrize(
    ("torch", "fits"),
    [("2.6.0", "'torchvision==0.21.*'"), ("2.13.0+cpu", "'torchvision==0.28.*'"), ("2.14.1", "torchvision")],
)
def test_torch_stays_and_the_torchvision_that_fits_is_installed(environment, torch, fits):
    environment.metadata("torch", torch)
    environment.metadata("torchvision", "0.20.1", "torch==2.5.1")
    environment.module("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    index = "; torch is a +cpu build and needs torchvision from the index that it came from" if "+" in torch else ""
    lines = environment.report("cls")[1]
    assert lines["torch"][1:] == [f"{torch}, but torchvision asks for ==2.5.1{index}", lines["torchvision"][2]]
    assert lines["torchvision"][1].endswith(f"nms does not exist{index}")
    assert lines["torchvision"][2] == f"python -m pip install --force-reinstall --no-deps {fits}"


def test_a_cv2_that_needs_libgl(environment):
    environment.module(
        "cv2", "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    for part in ("cls", "mmseg", "d2"):
        status, lines = environment.report(part)
        assert (status, lines["cv2"][0], lines["cv2"][2]) == (1, "problem", HEADLESS)
        assert "libGL.so.1" in lines["cv2"][1]
    environment.without("cv2")
    assert environment.report("cls")[1]["cv2"][2] == "python -m pip install opencv-python-headless"


def test_two_versions_of_opencv(environment):
    environment.metadata("opencv-python", "5.0.0.93")
    assert environment.report("cls") == (0, {})
    environment.metadata("opencv-python", "4.9.0.80")
    detail = "opencv-python-headless 5.0.0.93 and opencv-python 4.9.0.80 overwrite each other's files"
    assert environment.report("cls") == (0, {"OpenCV": ["note", detail, HEADLESS]})


def test_an_lvis_that_uses_what_numpy_removed(environment):
    path = environment.folder / "lvis" / "eval.py"
    shutil.rmtree(environment.folder / "lvis" / "eval")
    path.write_text("tp_sum = np.cumsum(tps, axis=1).astype(dtype=np.float)\n")
    status, lines = environment.report("d2")
    state, detail, mend = lines.pop("lvis")
    assert (status, state, lines) == (0, "note", {})
    assert "np.float" in detail
    subprocess.run(mend, shell=True, check=True)
    assert path.read_text() == "tp_sum = np.cumsum(tps, axis=1).astype(dtype=float)\n"
    assert environment.report("d2") == (0, {})
    path.write_text("np.float")
    environment.metadata("numpy", "1.23.5")
    assert environment.report("d2") == (0, {})


def test_a_detectron2_built_against_another_torch(environment):
    environment.module("detectron2/_C", "raise ImportError('/x/_C.so: undefined symbol: _ZN3c106detail')")
    status, lines = environment.report("d2")
    mend = f"python -m pip install --force-reinstall --no-deps {DETECTRON2}"
    assert (status, lines["detectron2._C"][0], lines["detectron2._C"][2]) == (1, "problem", mend)


# What torch sees.


def test_gpus(environment):
    cuda = "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 2)\n"
    cuda += "    get_device_name = staticmethod(lambda i: f'GPU number {i}')\n"
    environment.module("torch", TORCH + "class version:\n    cuda, hip = '13.2', None\n" + cuda)
    status, text = environment.run("core")
    assert status == 0
    assert "GPU number 0, GPU number 1 (torch for CUDA 13.2)" in text
    environment.module(
        "torch", TORCH + cuda + "def ones(*size, device): raise RuntimeError('CUDA error: no kernel image')"
    )
    status, lines = environment.report("core")
    assert (status, lines) == (1, {"GPU": ["problem", "RuntimeError: CUDA error: no kernel image", None]})


def test_a_driver_that_is_too_old(environment):
    warning = "import warnings; warnings.warn('The NVIDIA driver on your system is too old (found version 11040).')"
    environment.module("torch", f"{TORCH}\nclass cuda:\n    def is_available(): {warning}")
    status, lines = environment.report("core")
    assert (status, lines["GPU"][0]) == (0, "note")
    assert "The NVIDIA driver on your system is too old (found version 11040)." in lines["GPU"][1]


def test_a_gpu_that_torch_does_not_see(environment):
    (environment.folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (environment.folder / "nvidia-smi").chmod(0o755)
    status, lines = environment.report("core", PATH=str(environment.folder))
    detail = "none that torch (for CPUs) can use, though there is nvidia-smi"
    assert (status, lines["GPU"]) == (0, ["note", detail, None])
    environment.module("torch", TORCH + "class version:\n    cuda = '13.2'\n    hip = None\n")
    lines = environment.report("core", PATH=str(environment.folder))[1]
    assert lines["GPU"] == ["note", detail.replace("CPUs", "CUDA 13.2"), None]


# Metadata.


@pytest.mark.parametrize("break_it", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\xff\xfe")])
def test_metadata_that_is_not_there_or_not_text(environment, break_it):
    break_it(environment.metadata("timm", "1.0.31") / "METADATA")
    status, lines = environment.report("cls")
    mend = "python -m pip install --force-reinstall --no-deps timm"
    assert (status, lines) == (0, {"timm": ["note", "its metadata names no version", mend]})


def test_metadata_without_a_version(environment):
    environment.metadata("timm", None)
    environment.metadata("torch", None)
    status, lines = environment.report("cls")
    assert (status, set(lines)) == (0, {"timm", "torch"})
    assert lines["torch"][2] == "python -m pip install --force-reinstall torch"


def test_a_library_without_metadata_tells_its_own_version(environment):
    environment.no_metadata("timm")
    environment.module("timm", "__version__ = '1.1.dev0'")
    status, text = environment.run("cls")
    assert status == 0
    assert "  ok       timm          1.1.dev0\n" in text


def test_a_version_that_is_too_low(environment):
    environment.metadata("timm", "0.9.16")
    environment.metadata("torch", "2.13.0+cpu")
    status, lines = environment.report("cls")
    mend = "python -m pip install 'timm>=1.0.9'"
    assert (status, lines) == (1, {"timm": ["problem", "0.9.16: expected >=1.0.9", mend]})


def test_without_packaging_versions_are_not_compared(environment):
    environment.metadata("timm", "0.9.16")
    (environment.folder / "packaging").unlink()
    status, lines = environment.report("cls")
    assert (status, set(lines)) == (0, {"versions"})
    assert lines["versions"][2] == "python -m pip install packaging"


def test_an_old_python(environment):
    (environment.folder / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 10, 1)\n")
    status, lines = environment.report("core")
    assert (status, lines["Python"][0]) == (1, "problem")
    assert lines["Python"][1].endswith(": expected 3.11 or later; make a virtual environment with one")
    assert lines["Python"][2] is None


# disalign itself.


def test_a_checkout_that_is_not_installed(environment):
    # As a checkout looks: its own egg-info is no installation.
    (environment.folder / "setup.py").touch()
    environment.no_metadata("disalign")
    (environment.folder / "disalign.egg-info").mkdir()
    (environment.folder / "disalign.egg-info" / "PKG-INFO").write_text("Name: disalign\nVersion: 0.1.0\n")
    status, lines = environment.report("core")
    mend = f"python -m pip install --no-deps -e {environment.folder}"
    assert status == 0
    assert lines["installation"] == ["note", f"not installed, taken from {environment.folder}", mend]
    environment.module("disalign_tools", "import disalign_other")
    assert environment.report("tools")[1]["disalign_tools"][2] == mend


def test_installed_from_another_folder(environment, tmp_path):
    info = environment.metadata("disalign", "0.1.0")
    (info / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}, "url": "file:///some%20where"}))
    (environment.folder / "setup.py").touch()
    status, lines = environment.report("core")
    detail = f"0.1.0 is installed from /some where, but taken from {environment.folder}"
    mend = f"python -m pip install --no-deps -e {environment.folder}"
    assert (status, lines["installation"]) == (0, ["note", detail, mend])


def test_a_package_of_ours_that_does_not_import(environment):
    environment.module("disalign_d2", "raise RuntimeError('of our own')")
    status, lines = environment.report("d2")
    assert (status, lines) == (1, {"disalign_d2": ["problem", "RuntimeError: of our own", None]})


def test_a_fault_of_a_check_is_a_line_of_the_report(environment):
    (environment.metadata("disalign", "0.1.0") / "direct_url.json").write_text("[")
    status, lines = environment.report("core")
    assert (status, lines["installation"][0]) == (1, "problem")
    assert lines["installation"][1].startswith("could not be checked: JSONDecodeError")


def test_a_process_that_does_not_start_is_a_line_of_the_report(monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert doctor.main(["core"]) == 1
    printed = capsys.readouterr().out
    assert "could not be checked: no more processes" in printed
    assert "force-reinstall" not in printed


# Pieces of code in their process.


def test_pieces_share_a_process_until_one_fails():
    pieces = [
        "import sys; sys.shared = 4; print('noise', flush=True)",
        "import sys; value = sys.shared",
        "1 / 0",
        "value = 1",
    ]
    assert try_pieces(pieces, 20) == [Outcome(), Outcome(4), Outcome(error="ZeroDivisionError: division by zero")]


def test_what_a_piece_started_ends_with_it():
    started = time.monotonic()
    assert try_pieces(["import subprocess; subprocess.run(['sleep', '60'])"], 0.5)[0].error
    assert try_pieces(["import subprocess; value = subprocess.Popen(['sleep', '60']).pid"], 20)[0].value
    assert time.monotonic() - started < 20


# The real ones.


def test_the_doctor_starts_where_torch_does_not(empty_python, tmp_path):
    command = [empty_python, "-B", "-m", "disalign.doctor"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "  problem  torch         not installed\n" in done.stdout
    assert done.stdout.endswith("\ndoes not work: core\n")


def test_the_environment_of_these_tests_works():
    command = [sys.executable, "-m", "disalign.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert [check for check in report["checks"] if check["state"] == "problem"] == []
    assert (done.returncode, done.stderr) == (0, "")
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"core", "tools"} <= {check["part"] for check in report["checks"] if check["state"] == "ok"}
