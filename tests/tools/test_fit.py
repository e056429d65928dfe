"""disalign fit finds the command of a config's framework."""

import sys

import pytest

from disalign_tools import __main__ as console
from disalign_tools import fit

CONFIGS = {
    "disalign_cls.fit": "cls/imagenet_lt/disalign_resnet50_8xb32-10e_imagenet-lt-224.py",
    "disalign_mmseg.fit": "mmseg/camvid/disalign_fcn_r18_1xb8-400_camvid-160x224.py",
    "disalign_d2.fit": "d2/shapes/disalign_mask-rcnn_small_fpn_400it.yaml",
}
FRAMEWORKS = {"disalign_cls.fit": "timm", "disalign_mmseg.fit": "mmseg", "disalign_d2.fit": "detectron2"}


@pytest.mark.parametrize("module", CONFIGS)
def test_the_framework_is_the_configs(module, tmp_path, monkeypatch, capfd):
    pytest.importorskip(
        {"disalign_cls.fit": "timm", "disalign_mmseg.fit": "mmseg", "disalign_d2.fit": "detectron2"}[module]
    )
    assert fit.host_of(CONFIGS[module]).__name__ == module
    monkeypatch.chdir(tmp_path)
    # The command is told all arguments.
    assert console.main(["fit", CONFIGS[module], "--stage-one", "one.pth", "--rho", "-1"]) == 2
    assert "expected a finite rho >= 0, got -1" in capfd.readouterr().err


def test_a_missing_framework_is_named(monkeypatch, capfd):
    for name in [name for name in sys.modules if name.startswith("disalign_d2")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert console.main(["fit", CONFIGS["disalign_d2.fit"], "--stage-one", "x.pth"]) == 2
    assert "disalign_d2 needs detectron2, which is on no package registry" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_config_it_describes_itself(arguments, capsys):
    assert console.main(["fit", *arguments]) == 0
    assert "disalign fit CONFIG --stage-one FILE" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--rho", "1"], ["nowhere.yaml"], ["nowhere.py"]])
def test_refused(arguments, capfd):
    assert console.main(["fit", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: expected a config")
