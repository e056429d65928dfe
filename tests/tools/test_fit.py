"""disalign fit, compare and check find the command of a config's framework."""

import importlib
import re
import sys

import pytest

from disalign_tools import __main__ as console
from disalign_tools import fit

CONFIGS = {
    "disalign_cls": "cls/imagenet_lt/disalign_resnet50_8xb32-10e_imagenet-lt-224.py",
    "disalign_mmseg": "mmseg/camvid/disalign_fcn_r18_1xb8-400_camvid-160x224.py",
    "disalign_d2": "d2/shapes/disalign_mask-rcnn_small_fpn_400it.yaml",
}
FRAMEWORKS = {"disalign_cls": "timm", "disalign_mmseg": "mmseg", "disalign_d2": "detectron2"}
#: An argument that each refuses before it looks for anything, and what it says.
REFUSED = {
    "fit": (["--rho", "-1"], "expected a finite rho >= 0, got -1"),
    "compare": (["--methods", "nonsense"], "expected methods among stage_one"),
}
COMMANDS = pytest.mark.parametrize("name", REFUSED)


@COMMANDS
@pytest.mark.parametrize("package", CONFIGS)
def test_the_framework_is_the_configs(package, name, tmp_path, monkeypatch, capfd):
    pytest.importorskip(FRAMEWORKS[package])
    assert fit.host_of(CONFIGS[package], name).__name__ == f"{package}.{name}"
    monkeypatch.chdir(tmp_path)
    # The command is told all arguments.
    arguments, sentence = REFUSED[name]
    assert console.main([name, CONFIGS[package], "--stage-one", "one.pth", *arguments]) == 2
    assert sentence in capfd.readouterr().err


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_detectron2s_configs_are_yaml(suffix, tmp_path):
    pytest.importorskip("detectron2")
    (tmp_path / f"own{suffix}").touch()
    assert fit.host_of(str(tmp_path / f"own{suffix}"), "compare").__name__ == "disalign_d2.compare"


def test_missing_libraries_of_a_command_are_named(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "disalign_tools.report", None)
    assert console.main(["report", "--help"]) == 2
    assert "expected the libraries of `disalign report`" in capfd.readouterr().err


@pytest.mark.parametrize("package", CONFIGS)
def test_check_too(package, tmp_path, monkeypatch, capfd):
    pytest.importorskip(FRAMEWORKS[package])
    monkeypatch.chdir(tmp_path)
    assert console.main(["check", CONFIGS[package]]) == 2
    assert re.search("^error: expected (complete|whole) data, ", capfd.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_describes_itself(name, capsys):
    module, purpose = console.COMMANDS[name]
    with pytest.raises(SystemExit, match=r"^0$"):
        sys.exit(importlib.import_module(module).main(["--help"]))
    assert re.search("usage: |CONFIG", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        console.main(["--help"])
    assert re.search(rf"^  {name} +{re.escape(purpose)}$", capsys.readouterr().out, re.MULTILINE)


@COMMANDS
def test_a_missing_framework_is_named(name, monkeypatch, capfd):
    for module in [module for module in sys.modules if module.startswith("disalign_d2")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert console.main([name, CONFIGS["disalign_d2"], "--stage-one", "x.pth"]) == 2
    assert "disalign_d2 needs detectron2, which is on no package registry" in capfd.readouterr().err


@COMMANDS
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_config_it_describes_itself(name, arguments, capsys):
    assert console.main([name, *arguments]) == 0
    assert f"disalign {name} CONFIG --stage-one FILE" in capsys.readouterr().out


@COMMANDS
@pytest.mark.parametrize("arguments", [["--rho", "1"], ["nowhere.yaml"], ["nowhere.py"]])
def test_refused(name, arguments, capfd):
    assert console.main([name, *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: expected a config")
