"""The doctor, in environments broken on purpose: what it reports, which command it gives, and its exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from disalign_tools.__main__ import main as console
from disalign_tools.doctor import __main__ as doctor
from disalign_tools.doctor import checks
from disalign_tools.doctor.libraries import Library

ROOT = Path(__file__).parents[2]
PARTS = ["core", "cls", "mmseg", "d2", "tools", "export"]

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
NO_GPU = f"{ANYTHING}\n__version__ = '2.15.0'\nclass cuda:\n    def is_available(): return False\n"
# Module: distribution, version, and the submodules that the doctor imports.
HEALTHY = {
    "numpy": ("numpy", "2.4.6"),
    "torch": ("torch", "2.15.0", "utils/tensorboard"),
    "PIL": ("pillow", "13.0.0", "Image"),
    "tqdm": ("tqdm", "4.70.1"),
    "cv2": ("opencv-python-headless", "5.0.0.93"),
    "torchvision": ("torchvision", "0.29.2"),
    "timm": ("timm", "1.0.31"),
    "mmengine": ("onedl-mmengine", "0.10.12", "runner", "logging"),
    "sklearn": ("scikit-learn", "1.9.1", "datasets"),
    "matplotlib": ("matplotlib", "3.11.2", "figure"),
    "tensorboard": ("tensorboard", "2.21.0"),
    "mmcv": ("onedl-mmcv", "2.3.6", "_ext"),
    "mmseg": ("onedl-mmsegmentation", "1.4.2", "apis"),
    "fvcore": ("fvcore", "0.1.5.post20221221", "common/config"),
    "pkg_resources": ("setuptools", "81.0.0"),
    "detectron2": ("detectron2", "0.6", "modeling", "_C", "model_zoo"),
    "faster_coco_eval": ("faster-coco-eval", "1.8.0"),
    "lvis": ("lvis", "0.5.3", "eval"),
    "onnx": ("onnx", "1.23.2"),
    "onnxscript": ("onnxscript", "0.7.2"),
    "onnxruntime": ("onnxruntime", "1.31.1"),
}
OWN = ["disalign", "disalign_cls", "disalign_mmseg", "disalign_d2", "disalign_tools/convert"]
REQUIREMENTS = ("torch>=2.6", "timm>=1.0.9; extra == 'cls'", "setuptools<82,>=80; extra == 'd2'")
DETECTRON2 = "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """A Python with nothing but its standard library."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


class Environment:
    """Fake libraries in a folder, beside the doctor."""

    def __init__(self, folder, python):
        self.folder, self.python = folder / "site", python
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.install, self.again = f"{python} -m pip install", f"{python} -m pip install --force-reinstall --no-deps"
        for name, (distribution, version, *modules) in HEALTHY.items():
            self.module(name, NO_GPU if name == "torch" else ANYTHING)
            for module in modules:
                self.module(f"{name}/{module}", ANYTHING)
            self.metadata(distribution, version)
        for name in (*OWN, "disalign_tools/count_classes"):
            self.module(name)
        self.metadata("disalign", "0.1.0", *REQUIREMENTS)
        for name in ("doctor", "__main__.py"):
            (self.folder / "disalign_tools" / name).symlink_to(ROOT / "disalign_tools" / name)

    def module(self, name, code=""):
        """A package, ``"a"`` or ``"a/b"``."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").touch()
        (folder / "__init__.py").write_text(code)

    def metadata(self, distribution, version, *requirements):
        self.no_metadata(distribution)
        folder = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requirements), ""]))

    def no_metadata(self, distribution):
        for old in self.folder.glob(f"{distribution.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(old)

    def without(self, *names):
        for name in names:
            shutil.rmtree(self.folder / name)
            self.no_metadata(HEALTHY[name][0])

    def run(self, *arguments, module="disalign_tools.doctor", first="", path=os.defpath):
        """Exit status and text of the doctor."""
        variables = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(first), str(self.folder)]))
        command = [self.python, "-m", module, *arguments]
        done = subprocess.run(command, env=variables, cwd=self.elsewhere, capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        return done.returncode, done.stdout

    def report(self, *arguments, **options):
        """Exit status, and what is not ok: ``{name: [state, detail, command]}``."""
        status, text = self.run(*arguments, "--json", **options)
        report = json.loads(text)
        assert report["ok"] == (status == 0) == all(check["state"] != "problem" for check in report["checks"])
        lines = [check for check in report["checks"] if check["state"] != "ok"]
        return status, {check["name"]: [check["state"], check["detail"], check["command"]] for check in lines}


@pytest.fixture
def environment(tmp_path, bare_python):
    return Environment(tmp_path, bare_python)


def commands_of(lines):
    return {name: command for name, (_, _, command) in lines.items() if command}


# The report.


def test_everything_works(environment):
    status, text = environment.run()
    first, *lines, last = text.splitlines()
    assert status == 0
    assert first == f"Python {'.'.join(map(str, sys.version_info[:3]))}, {environment.python}"
    assert {line.split()[0] for line in lines} == {"ok"}
    assert {tuple(line.split()[1:]) for line in lines} >= {
        ("torch", "torch", "2.15.0:", "works"),
        ("mmengine", "onedl-mmengine", "0.10.12:", "works"),
    }
    assert last == "works: " + ", ".join(PARTS)


def test_json(environment):
    environment.without("timm")
    status, text = environment.run("cls", "--json")
    report = json.loads(text)
    assert status == 1
    assert list(report) == ["ok", "python", "checks"]
    assert report["ok"] is False
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["timm"] == {
        "name": "timm",
        "parts": ["cls"],
        "state": "problem",
        "installed": "",
        "detail": "not installed",
        "command": f"{environment.install} 'timm>=1.0.9'",
    }
    assert checks["PIL"]["installed"] == "pillow 13.0.0"
    assert "mmseg" not in checks


def test_what_is_not_installed_is_a_problem_only_where_asked_for(environment):
    environment.without("timm", "mmseg", "mmcv", "detectron2", "onnx")
    status, text = environment.run()
    assert status == 0
    assert text.endswith("\nworks: core, tools\n")
    expected = {
        "cls": ["absent", "not installed: timm", f"{environment.install} 'timm>=1.0.9'"],
        "mmseg": ["absent", "not installed: mmcv, mmseg", f"{environment.install} onedl-mmcv onedl-mmsegmentation"],
        "d2": ["absent", "not installed: detectron2", f"{environment.install} {DETECTRON2}"],
        "export": ["absent", "not installed: onnx", f"{environment.install} onnx"],
    }
    assert environment.report() == (0, expected)
    for part, library in {"cls": "timm", "mmseg": "mmseg", "d2": "detectron2", "export": "onnx"}.items():
        status, lines = environment.report(part)
        assert (status, lines[library][:2]) == (1, ["problem", "not installed"])
        assert not any(state == "absent" for state, *_ in lines.values())


def test_only_what_is_asked_for_counts(environment):
    environment.module("detectron2", "raise RuntimeError")
    assert environment.report("cls", "mmseg", "tools") == (0, {})
    status, text = environment.run("cls", "d2")
    assert status == 1
    assert text.endswith("\nworks: core, cls\ndoes not work: d2\n")


@pytest.mark.parametrize("call", [doctor.main, lambda argv: console(["doctor", *argv])], ids=["module", "console"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cls", "torch"], "expected parts of core, cls, mmseg, d2, tools, export, got torch"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_bad_arguments(call, arguments, sentence, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        call(arguments)
    assert f"disalign doctor: error: {sentence}\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nope"], ["--json"]])
def test_the_console_command_refuses_what_is_no_command_of_its(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        console(arguments)
    assert capsys.readouterr().err.startswith("usage: disalign ")


# A library that does not work never takes the doctor down, and what needs it is not blamed.


@pytest.mark.parametrize("module", ["disalign_tools.doctor", "disalign_tools"])
def test_the_doctor_starts_where_torch_and_disalign_do_not(environment, module):
    names = ("torch", "disalign", "numpy", "PIL")
    for name in names:
        (environment.elsewhere / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    command = ["doctor"] if module == "disalign_tools" else []
    status, lines = environment.report(*command, "core", "tools", module=module)
    assert status == 1
    for name in ("numpy", "PIL"):
        assert lines[name][:2] == ["problem", f"RuntimeError: {name} was imported"]
    assert lines["torch"][1].startswith("not tried, since numpy does not work")
    (environment.elsewhere / "numpy.py").unlink()
    lines = environment.report(*command, "core", module=module)[1]
    assert lines["torch"][1].startswith("RuntimeError: torch was imported")
    assert lines["disalign"][:2] == ["problem", "not tried, since torch does not work"]
    (environment.elsewhere / "torch.py").unlink()
    assert (
        environment.report(*command, "core", module=module)[1]["disalign"][1] == "RuntimeError: disalign was imported"
    )


def test_the_doctor_imports_the_standard_library_only():
    code = "import sys; from disalign_tools.__main__ import main; main(['doctor', 'tools']); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, "-S", "-c", code], env=environment, text=True)
    imported = {name.partition(".")[0] for name in output.splitlines()[-1].split()}
    assert imported - {*sys.stdlib_module_names} <= {"disalign_tools", "__main__", "__mp_main__"}


BREAKAGES = {
    "raise OSError('libcudart.so.13:\\n no such file')": "OSError: libcudart.so.13: no such file",
    "def (": "SyntaxError: invalid syntax (__init__.py, line 1)",
    "input()": "EOFError: EOF when reading a line",
    "import os, signal; print('noise', flush=True); os.kill(os.getpid(), signal.SIGSEGV)": "crashes Python (SIGSEGV)",
    "import sys; sys.exit(0)": "ends Python with 0",
    "import os; os._exit(7)": "ends Python with 7",
    "raise KeyboardInterrupt": "crashes Python (SIGINT)",
    "import subprocess; subprocess.Popen(['sleep', '20']); raise ValueError": "ValueError:",
}


@pytest.mark.parametrize("code", BREAKAGES)
def test_a_torch_that_does_not_import(environment, code):
    environment.module("torch", code)
    status, lines = environment.report("core", "cls")
    assert status == 1
    assert lines["torch"][1].startswith(BREAKAGES[code])
    # What crashes, hangs or exits may be anything.
    is_exception = BREAKAGES[code].partition(":")[0].endswith("Error")
    command = f"{environment.install} --force-reinstall torch==2.15.0" if is_exception else None
    assert commands_of(lines) == ({"torch": command} if command else {})
    cause = {lines.pop(name)[1] for name in [*lines] if name != "torch"}
    assert cause == {"not tried, since torch does not work"}


def test_a_library_that_hangs(monkeypatch):
    monkeypatch.setattr(checks, "TIMEOUT", 1)
    library = Library("json", "core", code="import time; time.sleep(60)")
    assert checks._outcomes([library]) == [("", "no answer within 1 seconds")]


@pytest.mark.parametrize(
    ("name", "broken", "pinned", "parts"),
    [
        ("numpy", "raise ImportError('Error importing numpy')", "numpy==2.4.6", PARTS),
        ("PIL", "raise ImportError('_imaging')", "pillow==13.0.0", PARTS[1:-1]),
    ],
)
def test_a_broken_numpy_or_pillow_is_all_that_is_repaired(environment, name, broken, pinned, parts):
    environment.module(name, broken)
    for user in ("torch", "torchvision", "matplotlib", "lvis", "detectron2"):
        code = NO_GPU if user == "torch" else ANYTHING
        environment.module(user, f"{code}\nimport {'numpy' if user == 'torch' else name}")
    status, lines = environment.report()
    assert status == 1
    assert commands_of(lines) == {name: f"{environment.again} {pinned}"}
    assert lines["torchvision"] == ["problem", f"not tried, since {name} does not work", None]
    assert lines["lvis"] == ["problem", f"not tried, since {name} does not work", None]
    for part in parts:
        assert commands_of(environment.report(part)[1]) == {name: f"{environment.again} {pinned}"}


@pytest.mark.parametrize(
    ("name", "version", "user"), [("tqdm", "4.70.1", "detectron2"), ("matplotlib", "3.11.2", "lvis")]
)
def test_of_a_library_and_one_that_imports_it_only_the_first_is_repaired(environment, name, version, user):
    environment.module(name, "raise ImportError('broken')")
    environment.module(user, f"import {name}")
    status, lines = environment.report("d2")
    assert (status, commands_of(lines)) == (1, {name: f"{environment.again} {name}=={version}"})
    assert lines[user] == ["problem", f"not tried, since {name} does not work", None]


def test_a_library_without_what_it_asks_for(environment):
    environment.module("timm", "import absl.flags")
    assert environment.report("cls")[1]["timm"] == [
        "problem",
        "ModuleNotFoundError: No module named 'absl'",
        f"{environment.install} timm==1.0.31",
    ]
    # It is there, but without this module: another version of timm may not need it, and we don't know which.
    environment.module("timm", "import torchvision.nothing")
    assert environment.report("cls")[1]["timm"][2] is None


def test_what_an_uninstalled_or_half_installed_library_leaves(environment):
    environment.without("timm", "onnx")
    (environment.folder / "timm" / "layers").mkdir(parents=True)
    environment.metadata("onnx", "1.23.2")
    status, lines = environment.report("cls", "export")
    assert status == 1
    assert commands_of(lines) == {
        "timm": f"{environment.install} 'timm>=1.0.9'",
        "onnx": f"{environment.again} onnx==1.23.2",
    }


def test_a_package_of_ours_that_does_not_import(environment):
    environment.module("disalign_d2", "raise RuntimeError('of our own')")
    assert environment.report("d2") == (1, {"disalign_d2": ["problem", "RuntimeError: of our own", None]})


# Known conflicts.


def to_upstream(environment):
    for ours, version, upstream in (
        ("onedl-mmengine", "0.10.7", "mmengine"),
        ("onedl-mmcv", "2.1.0", "mmcv"),
        ("onedl-mmsegmentation", "1.2.2", "mmsegmentation"),
    ):
        environment.no_metadata(ours)
        environment.metadata(upstream, version)


def to_maintained(environment):
    names = "onedl-mmengine onedl-mmcv onedl-mmsegmentation"
    uninstall = f"{environment.python} -m pip uninstall -y mmengine mmcv mmsegmentation {names}"
    return f"{uninstall} && {environment.install} {names}"


def test_both_distributions_of_openmmlab(environment):
    environment.metadata("mmengine", "0.10.7")
    environment.metadata("mmcv-lite", "2.1.0")
    pairs = "onedl-mmengine and mmengine, onedl-mmcv and mmcv-lite"
    names = "onedl-mmengine onedl-mmcv"
    uninstall = f"{environment.python} -m pip uninstall -y mmengine mmcv-lite {names}"
    detail = f"{pairs} are both installed and overwrite each other's files"
    expected = {"OpenMMLab": ["problem", detail, f"{uninstall} && {environment.install} {names}"]}
    assert environment.report("cls") == environment.report("mmseg") == (1, expected)
    assert environment.report("d2") == (0, {})


def test_segmentation_is_not_installed_over_upstreams_mmengine(environment):
    environment.without("mmseg", "mmcv")
    environment.no_metadata("onedl-mmengine")
    environment.metadata("mmengine", "0.10.7")
    uninstall = f"{environment.python} -m pip uninstall -y mmengine onedl-mmengine"
    command = f"{uninstall} && {environment.install} onedl-mmengine onedl-mmcv onedl-mmsegmentation"
    assert environment.report()[1]["mmseg"][2] == command


def test_an_mmengine_that_does_not_load_its_own_checkpoints(environment):
    to_upstream(environment)
    status, lines = environment.report("cls")
    detail = "upstream MMEngine does not load its own checkpoints with torch 2.6 and later; our commands do"
    assert (status, lines) == (0, {"checkpoints": ["note", detail, to_maintained(environment)]})
    environment.metadata("torch", "2.5.1")
    environment.metadata("disalign", "0.1.0")
    assert environment.report("cls") == (0, {})


def test_mmcv_without_operators(environment):
    shutil.rmtree(environment.folder / "mmcv" / "_ext")
    detail = "CCHead, PSAHead, PointHead and SANHead need an mmcv with operators: No module named 'mmcv._ext'"
    assert environment.report("mmseg") == (0, {"mmcv._ext": ["note", detail, None]})
    # Upstream's MMSegmentation does not import without them.
    to_upstream(environment)
    environment.module("mmseg", "import mmcv._ext")
    status, lines = environment.report("mmseg")
    assert status == 1
    assert commands_of(lines) == dict.fromkeys(("mmseg", "checkpoints"), to_maintained(environment))


def test_two_versions_of_opencv(environment):
    environment.metadata("opencv-python", "5.0.0.93")
    assert environment.report("cls") == (0, {})
    environment.metadata("opencv-python", "4.9.0.80")
    detail = "opencv-python-headless 5.0.0.93 and opencv-python 4.9.0.80 overwrite each other's files"
    expected = {"OpenCV": ["note", detail, f"{environment.again} opencv-python-headless"]}
    for part in ("cls", "mmseg", "d2"):
        assert environment.report(part) == (0, expected)


def test_a_cv2_that_needs_libgl(environment):
    environment.module("cv2", "raise ImportError('libGL.so.1: cannot open shared object file')")
    status, lines = environment.report("cls", "d2")
    assert status == 1
    assert commands_of(lines) == {"cv2": f"{environment.again} opencv-python-headless"}


@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        'class ops:\n    def nms(*boxes): raise RuntimeError("Couldn\'t load custom C++ ops. This can happen if")',
    ],
)
@pytest.mark.parametrize(
    ("torch", "fits"),
    [
        ("2.6.0", "'torchvision==0.21.*'"),
        ("2.13.0+cpu", "'torchvision==0.28.*'  # from the index that has torch +cpu"),
        ("2.14.1", "torchvision"),
    ],
)
def test_a_torchvision_that_does_not_work_with_this_torch(environment, code, torch, fits):
    environment.metadata("torch", torch)
    environment.module("torchvision", code)
    status, lines = environment.report("cls", "d2")
    assert (status, commands_of(lines)) == (1, {"torchvision": f"{environment.again} {fits}"})


@pytest.mark.parametrize("tells", [True, False])
def test_setuptools_without_pkg_resources(environment, tells):
    shutil.rmtree(environment.folder / "pkg_resources")
    environment.metadata("setuptools", "82.0.1")
    if not tells:
        environment.no_metadata("disalign")
    status, lines = environment.report("d2")
    assert status == 1
    assert commands_of(lines) == {
        "pkg_resources": f"{environment.install} 'setuptools<82,>=80'"
        if tells
        else f"{environment.install} 'setuptools<82'"
    }
    assert lines["detectron2.model_zoo"][1] == "not tried, since pkg_resources does not work"


def test_a_detectron2_built_for_another_torch(environment):
    environment.module("detectron2/_C", "raise ImportError('/x/_C.so: undefined symbol: _ZN3c106detail')")
    status, lines = environment.report("d2")
    assert (status, commands_of(lines)) == (1, {"detectron2": f"{environment.again} {DETECTRON2}"})


@pytest.mark.parametrize("version", ["0.9.16", "1.0.8", "1.0"])
def test_a_version_that_is_too_low(environment, version):
    environment.metadata("timm", version)
    environment.metadata("torch", "2.13.0+cpu")
    command = f"{environment.install} 'timm>=1.0.9'"
    assert environment.report("cls") == (1, {"timm": ["problem", "expected >=1.0.9; works", command]})


# What torch sees.

CUDA = """
class cuda:
    def is_available(): return True
    def device_count(): return 2
    def get_device_name(i): return f"GPU number {i}"
class version:
    cuda, hip = "13.2", None
"""


def test_gpus(environment):
    environment.module("torch", ANYTHING + CUDA)
    status, text = environment.run("core")
    assert status == 0
    assert "13.2, GPU number 0, GPU number 1\n" in text
    refuse = "def ones(*size, device): raise RuntimeError('CUDA error: no kernel image')"
    environment.module("torch", ANYTHING + CUDA + refuse)
    expected = {"CUDA": ["problem", "RuntimeError: CUDA error: no kernel image", None]}
    assert environment.report("core") == (1, expected)


def test_a_gpu_that_torch_cannot_use(environment):
    (environment.elsewhere / "nvidia-smi").write_text("#!/bin/sh\n")
    (environment.elsewhere / "nvidia-smi").chmod(0o755)
    environment.module(
        "torch", f"{NO_GPU}    def init(): raise AssertionError('Torch not compiled with CUDA enabled')\n"
    )
    detail = "torch 2.15.0 cannot use the GPU: Torch not compiled with CUDA enabled"
    path = str(environment.elsewhere)
    assert environment.report("core", path=path) == (0, {"CUDA": ["note", detail, None]})
    assert environment.report("core") == (0, {})


# The real ones.


def test_a_python_without_anything(bare_python, tmp_path):
    command = [bare_python, "-B", "-m", "disalign_tools.doctor"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(rf"run: {bare_python} -m pip install '?numpy", done.stdout)
    assert done.stdout.endswith("\ndoes not work: core\n")


def test_the_environment_of_these_tests_works():
    command = [sys.executable, "-m", "disalign_tools.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout)
    problems = [check for check in report["checks"] if check["state"] == "problem"]
    assert not any("core" in check["parts"] for check in problems)
    assert (done.returncode, done.stderr) == (int(bool(problems)), "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "distribution"), [("numpy", "numpy"), ("PIL", "pillow")])
def test_with_the_real_libraries_only_the_broken_one_is_repaired(tmp_path, name, distribution):
    (tmp_path / f"{name}.py").write_text("raise ImportError('broken on purpose')")
    (tmp_path / f"{distribution}-1.dist-info").mkdir()
    (tmp_path / f"{distribution}-1.dist-info" / "METADATA").write_text(f"Name: {distribution}\nVersion: 99\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "disalign_tools.doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    broken = [check for check in json.loads(done.stdout)["checks"] if check["state"] == "problem"]
    repaired = [check["command"] for check in broken if check["command"]]
    assert repaired == [f"{sys.executable} -m pip install --force-reinstall --no-deps {distribution}==99"]
