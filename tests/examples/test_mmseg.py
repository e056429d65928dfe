"""The example of one's own decode head, by the commands of its header."""

import shlex

import pytest

pytest.importorskip("mmseg")

import importlib.util

import torch
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from disalign_mmseg import train

from .conftest import EXAMPLES

FOLDER = EXAMPLES / "mmseg_custom_head"
ROOT = EXAMPLES.parent


def commands():
    """The header's commands as lists of words, without the line that sets the path."""
    text = (FOLDER / "my_head.py").read_text().split('"""')[1].replace("\\\\\n", "")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert lines[0] == "export PYTHONPATH=examples/mmseg_custom_head"
    return [shlex.split(line) for line in lines[1:]]


def make_tiny_ade(arguments):
    spec = importlib.util.spec_from_file_location("make_tiny_ade", ROOT / "scripts" / "make_tiny_ade.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main(arguments)


@pytest.fixture
def few_iterations():
    return ["train_cfg.max_iters=4", "train_cfg.val_interval=4", "default_hooks.checkpoint.interval=4"]


def test_the_commands_of_the_header(example, tmp_path, monkeypatch, few_iterations):
    example("my_head")
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("yapf"):  # MMEngine has a run's config formatted, which takes longer than the run
        monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
    make, one, two = commands()
    assert make[:2] == ["python", "scripts/make_tiny_ade.py"]
    assert one[:3] == two[:3] == ["python", "-m", "disalign_mmseg.train"]
    assert make_tiny_ade(make[2:]) == 0
    with DefaultScope.overwrite_default_scope("mmseg"):
        options = ["experiment_name=example_one", *few_iterations]
        assert train.main([str(ROOT / one[3]), *one[4:], "--cfg-options", *options]) == 0
        assert two[-1] == "stage_one=work_dirs/stage_one/iter_100.pth"
        stage_one = "stage_one=work_dirs/stage_one/iter_4.pth"
        options = ["experiment_name=example_two", stage_one, *few_iterations]
        assert train.main([str(ROOT / two[3]), *two[4:-1], *options]) == 0
    saved = [torch.load(f"work_dirs/stage_{name}/iter_4.pth", weights_only=False) for name in ("one", "two")]
    before, after = (checkpoint["state_dict"] for checkpoint in saved)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(after) - set(before) == {
        f"decode_head.calibration.{name}" for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
    }
    assert after["decode_head.calibration.margin"].any()
    assert (tmp_path / "work_dirs" / "stage_two" / "results_val.json").is_file()


def test_the_head_starts_at_stage_one(example):
    module = example("my_head")
    options = dict(in_channels=6, channels=5, num_classes=4, in_index=0, norm_cfg=dict(type="BN"))
    with DefaultScope.overwrite_default_scope("mmseg"):
        one = MODELS.build(dict(type="OwnHead", **options)).eval()
        loss = dict(type="GRWCrossEntropyLoss", class_counts=[9, 4, 2, 1])
        two = MODELS.build(dict(type="DisAlignOwnHead", loss_decode=loss, **options)).eval()
    assert isinstance(two, module.DisAlignOwnHead)
    missing = two.load_state_dict(one.state_dict(), strict=False).missing_keys
    assert all(name.startswith("calibration.") for name in missing)
    features = [torch.randn(2, 6, 7, 7)]
    assert torch.equal(one(features), two(features))
