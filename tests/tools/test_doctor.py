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
OWN = ["disalign", "disalign_cls", "disalign_mmseg", "disalign_d2", "disalign_tools/count_classes"]
# What they import of each other.
IMPORTS = {
    "torch": "numpy, tqdm",
    "disalign": "torch",
    "cv2": "numpy",
    "torchvision": "torch, PIL",
    "timm": "torchvision",
    "mmengine": "torch, cv2",
    "sklearn": "numpy",
    "matplotlib": "PIL",
    "disalign_cls": "disalign, timm, mmengine",
    "mmcv": "mmengine",
    "mmseg": "torchvision, timm, mmcv",
    "disalign_mmseg": "disalign, mmseg",
    "fvcore": "torch, PIL",
    "detectron2": "fvcore, cv2, tqdm",
    "detectron2/model_zoo": "pkg_resources",
    "faster_coco_eval": "cv2",
    "lvis": "cv2, matplotlib",
    "disalign_d2": "disalign, detectron2",
    "disalign_tools/count_classes": "disalign, PIL, tqdm",
    "onnx": "numpy",
    "onnxscript": "onnx",
    "onnxruntime": "numpy",
}
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
        self.pip = f"{python} -m pip"
        self.install, self.again = f"{self.pip} install --upgrade", f"{self.pip} install --force-reinstall --no-deps"
        for name, (distribution, version, *modules) in HEALTHY.items():
            self.module(name, NO_GPU if name == "torch" else ANYTHING)
            for module in modules:
                self.module(f"{name}/{module}", ANYTHING)
            self.metadata(distribution, version)
        for name in OWN:
            self.module(name)
        for name in ("doctor", "__main__.py"):
            (self.folder / "disalign_tools" / name).symlink_to(ROOT / "disalign_tools" / name)

    def module(self, name, code=""):
        """A package, ``"a"`` or ``"a/b"``, that runs ``code`` and then imports what it needs."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").touch()
        (folder / "__init__.py").write_text(f"{code}\nimport {IMPORTS[name]}\n" if name in IMPORTS else code)

    def metadata(self, distribution, version):
        self.no_metadata(distribution)
        folder = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")

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
        # With something to read, which no library may take.
        options = dict(input="yes\n", capture_output=True, text=True, timeout=60)
        done = subprocess.run(command, env=variables, cwd=self.elsewhere, **options)
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
        "command": f"{environment.install} timm",
    }
    assert checks["PIL"]["installed"] == "pillow 13.0.0"
    assert "mmseg" not in checks


def test_what_is_not_installed_is_a_problem_only_where_asked_for(environment):
    environment.without("timm", "mmseg", "mmcv", "detectron2", "onnx")
    status, text = environment.run()
    assert status == 0
    assert text.endswith("\nworks: core, tools\n")
    lacking = {"cls": "timm", "mmseg": "mmseg", "d2": "detectron2", "export": "onnx"}
    expected = {
        part: ["absent", f"not installed: {library} (`disalign doctor {part}` tells how)", None]
        for part, library in lacking.items()
    }
    assert environment.report() == (0, expected)
    commands = {"cls": "timm", "mmseg": "onedl-mmsegmentation", "d2": DETECTRON2, "export": "onnx"}
    for part, library in lacking.items():
        status, lines = environment.report(part)
        command = f"{environment.install} {commands[part]}"
        assert (status, lines[library]) == (1, ["problem", "not installed", command])
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


@pytest.mark.parametrize("name", ["doctor", "count", "convert", "report"])
def test_the_usage_of_a_command_names_it(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["disalign", name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        console()
    assert capsys.readouterr().out.startswith(f"usage: disalign {name} ")


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
    assert lines["torch"][1] == "needs numpy, which has a problem"
    (environment.elsewhere / "numpy.py").unlink()
    lines = environment.report(*command, "core", module=module)[1]
    assert lines["torch"][1].startswith("RuntimeError: torch was imported")
    assert lines["disalign"] == ["problem", "needs torch, which has a problem", None]
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
    command = f"{environment.pip} install --force-reinstall torch==2.15.0" if is_exception else None
    assert commands_of(lines) == ({"torch": command} if command else {})
    assert lines.keys() >= {"CUDA", "disalign", "torchvision", "timm", "mmengine", "disalign_cls"}
    assert all(detail.startswith("needs ") for name, (_, detail, _) in lines.items() if name != "torch")
    assert lines["timm"][1] == "needs torch, which has a problem"


def test_a_library_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 1)
    library = Library("json", "core", code="import time; time.sleep(60)")
    assert doctor._try(library) == ("problem", "no answer within 1 seconds")


@pytest.mark.parametrize(
    ("name", "broken", "pinned", "parts"),
    [
        ("numpy", "raise ImportError('Error importing numpy')", "numpy==2.4.6", PARTS),
        ("PIL", "raise ImportError('_imaging')", "pillow==13.0.0", PARTS[1:-1]),
    ],
)
def test_a_broken_numpy_or_pillow_is_all_that_is_repaired(environment, name, broken, pinned, parts):
    environment.module(name, broken)
    status, lines = environment.report()
    assert status == 1
    assert commands_of(lines) == {name: f"{environment.again} {pinned}"}
    assert lines["torchvision"] == ["problem", f"needs {name}, which has a problem", None]
    assert lines["lvis"] == ["problem", f"needs {name}, which has a problem", None]
    for part in parts:
        assert commands_of(environment.report(part)[1]) == {name: f"{environment.again} {pinned}"}


@pytest.mark.parametrize(
    ("name", "version", "user"), [("tqdm", "4.70.1", "detectron2"), ("matplotlib", "3.11.2", "lvis")]
)
def test_of_a_library_and_one_that_imports_it_only_the_first_is_repaired(environment, name, version, user):
    environment.module(name, "raise ImportError('broken')")
    status, lines = environment.report("d2")
    assert (status, commands_of(lines)) == (1, {name: f"{environment.again} {name}=={version}"})
    assert lines[user] == ["problem", f"needs {name}, which has a problem", None]


def test_a_library_without_what_it_asks_for(environment):
    environment.module("timm", "import absl.flags")
    assert environment.report("cls")[1]["timm"] == [
        "problem",
        "ModuleNotFoundError: No module named 'absl'",
        f"{environment.pip} install timm==1.0.31",
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
        "timm": f"{environment.install} timm",
        "onnx": f"{environment.again} onnx==1.23.2",
    }


def test_a_package_of_ours_that_does_not_import(environment):
    environment.module("disalign_d2", "raise RuntimeError('of our own')")
    assert environment.report("d2") == (1, {"disalign_d2": ["problem", "RuntimeError: of our own", None]})


# Known conflicts.


def test_both_distributions_of_openmmlab(environment):
    environment.metadata("mmengine", "0.10.7")
    environment.metadata("mmcv-lite", "2.1.0")
    assert "onedl-mmengine 0.10.12, mmengine 0.10.7: overwrite each other's files\n" in environment.run("cls")[1]
    detail, uninstall = "overwrite each other's files", f"{environment.pip} uninstall -y"
    mmengine = f"{uninstall} onedl-mmengine mmengine && {environment.install} onedl-mmengine"
    mmcv = f"{uninstall} onedl-mmcv mmcv-lite && {environment.install} onedl-mmcv"
    assert environment.report("cls") == (1, {"mmengine": ["problem", detail, mmengine]})
    assert environment.report("mmseg") == (
        1,
        {"mmengine": ["problem", detail, mmengine], "mmcv": ["problem", detail, mmcv]},
    )
    assert environment.report("d2") == (0, {})


def test_segmentation_is_not_installed_over_upstreams_mmengine(environment):
    environment.without("mmseg", "mmcv")
    environment.no_metadata("onedl-mmengine")
    environment.metadata("mmengine", "0.10.7")
    assert environment.report("cls") == (0, {})
    command = f"{environment.pip} uninstall -y mmengine && {environment.install} onedl-mmcv"
    assert environment.report("mmseg")[1]["mmcv"] == ["problem", "not installed", command]


def test_mmcv_without_operators(environment):
    shutil.rmtree(environment.folder / "mmcv" / "_ext")
    detail = "CCHead, PSAHead, PointHead and SANHead need an mmcv with operators: No module named 'mmcv._ext'"
    assert environment.report("mmseg") == (0, {"mmcv": ["note", detail, None]})


def test_two_versions_of_opencv(environment):
    environment.metadata("opencv-python", "5.0.0.93")
    assert environment.report("cls") == (0, {})
    environment.metadata("opencv-python", "4.9.0.80")
    uninstall = f"{environment.pip} uninstall -y opencv-python-headless opencv-python"
    command = f"{uninstall} && {environment.install} opencv-python-headless"
    expected = {"cv2": ["note", "overwrite each other's files", command]}
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
    [("2.6.0", "torch==2.6.0"), ("2.13.0+cpu", "torch==2.13.0  # from the index that has torch +cpu")],
)
def test_a_torchvision_that_does_not_work_with_this_torch(environment, code, torch, fits):
    environment.metadata("torch", torch)
    environment.module("torchvision", code)
    status, lines = environment.report("cls", "d2")
    command = f"{environment.pip} uninstall -y torchvision && {environment.pip} install torchvision {fits}"
    assert (status, commands_of(lines)) == (1, {"torchvision": command})


def test_setuptools_without_pkg_resources(environment):
    shutil.rmtree(environment.folder / "pkg_resources")
    environment.metadata("setuptools", "82.0.1")
    status, lines = environment.report("d2")
    assert (status, commands_of(lines)) == (1, {"pkg_resources": f"{environment.again} 'setuptools<82'"})
    assert lines["detectron2"][1] == "needs pkg_resources, which has a problem"


def test_an_lvis_that_uses_what_numpy_removed(environment):
    path = environment.folder / "lvis" / "eval.py"
    shutil.rmtree(environment.folder / "lvis" / "eval")
    path.write_text("if False:\n    tp_sum = np.cumsum(tps, axis=1).astype(dtype=np.float)\n")
    status, lines = environment.report("d2")
    state, detail, command = lines.pop("lvis")
    assert (status, state, lines) == (0, "note", {})
    assert detail.startswith("LVISEval uses np.float, which numpy 1.24 removed")
    subprocess.run(command, shell=True, check=True)
    assert path.read_text() == "if False:\n    tp_sum = np.cumsum(tps, axis=1).astype(dtype=float)\n"
    assert environment.report("d2") == (0, {})


def test_a_detectron2_built_for_another_torch(environment):
    environment.module("detectron2/_C", "raise ImportError('/x/_C.so: undefined symbol: _ZN3c106detail')")
    status, lines = environment.report("d2")
    assert (status, commands_of(lines)) == (1, {"detectron2": f"{environment.again} {DETECTRON2}"})


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
    assert re.search(rf"run: {bare_python} -m pip install --upgrade numpy\n", done.stdout)
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
