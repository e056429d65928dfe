import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from disalign_cls.backbones import build_backbone
from disalign_mmengine.cli import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "cls"
LEAVES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("[!_]*/*.py"))
STAGE_ONE = [name for name in LEAVES if "/baseline" in name]
STAGE_TWO = [name for name in LEAVES if "/disalign" in name]
BOUNDS = [name for name in LEAVES if "/bound" in name]
CLASSES = {"imagenet_lt": 1000, "inaturalist2018": 8142, "places_lt": 365, "cifar_lt": None, "digits": 10}
PAPERS_BACKBONES = [
    f"{family}{depth}{suffix}" for family, suffix in (("resnet", ""), ("resnext", "_32x4d")) for depth in (50, 101, 152)
]


@cache
def text(name):
    return (FOLDER / name).read_text()


@cache
def config(name):
    return load_config(str(FOLDER / name), {})


def base_of(name):
    """The stage-one file that a stage-two file inherits, relative to the folder of configs."""
    base = re.search(r'^_base_ = "(.+)"$', text(name), re.MULTILINE)[1]
    return f"{name.split('/')[0]}/{base}"


def header(name):
    return [line for line in text(name).splitlines() if line.startswith("#")]


def build(name, **backbone):
    """The model on the meta device: shapes without memory."""
    model = config(name).model.to_dict()
    model["backbone"] |= {"pretrained": False} | backbone
    with torch.device("meta"):
        return MODELS.build(model)


def numbers(parameters):
    return sum(parameter.numel() for parameter in parameters)


@cache
def trunk_numbers(backbone):
    """test_backbones.py compares them with the literature's."""
    with torch.device("meta"):
        return numbers(build_backbone(backbone).parameters())


def test_every_row_of_the_paper_has_a_file():
    assert set(CLASSES) == {name.split("/")[0] for name in LEAVES}
    assert sorted(STAGE_ONE + STAGE_TWO + BOUNDS) == LEAVES
    # ImageNet-LT: 2 backbones x 2 classifiers, iNaturalist: 2 lengths x 2, Places, CIFAR: 2 x 2, digits: 2.
    assert len(STAGE_ONE) == len(STAGE_TWO) == 4 + 4 + 1 + 4 + 2


@pytest.mark.parametrize("name", LEAVES)
def test_it_builds_with_the_datasets_number_of_classes(name):
    model = build(name)
    dataset = name.split("/")[0]
    expected = CLASSES[dataset] or int(re.search(r"cifar(\d+)", name)[1])
    assert model.num_classes == model.classifier.out_features == expected
    for split in ("train", "val", "test"):
        assert config(name)[f"{split}_dataloader"].dataset.get("num_classes", expected) == expected
    assert ("Cosine" in type(model.classifier).__name__) == ("-cosine" in name)


@pytest.mark.parametrize("name", STAGE_ONE)
def test_stage_one_trains_everything(name):
    model = build(name)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_trains_exactly_2k_plus_d_plus_1_numbers(name):
    model = build(name)
    expected = 2 * model.num_classes + model.backbone.num_features + 1
    assert numbers(parameter for parameter in model.parameters() if parameter.requires_grad) == expected


@pytest.mark.parametrize("backbone", PAPERS_BACKBONES)
@pytest.mark.parametrize("name", [name for name in STAGE_TWO if "resnet50_" in name or "resnet152_" in name])
def test_every_backbone_of_the_paper_is_one_override(name, backbone):
    cfg = load_config(str(FOLDER / name), {"model.backbone.name": backbone, "model.backbone.pretrained": False})
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    calibration = 2 * model.num_classes + 2048 + 1
    classifier = 2048 * model.num_classes + (1 if "-cosine" in name else model.num_classes)
    assert numbers(model.parameters()) == trunk_numbers(backbone) + classifier + calibration


@pytest.mark.parametrize("name", LEAVES)
def test_a_file_is_short(name):
    lines = [line for line in text(name).splitlines() if line.strip()]
    assert 3 <= len(lines) <= 15


@pytest.mark.parametrize("name", LEAVES)
def test_its_header_says_command_paper_and_ours(name):
    lines = "\n".join(header(name))
    command = r"--bound (\S+)" if name in BOUNDS else r"disalign_cls\.train (\S+)"
    assert re.search(command, lines)[1] == f"configs/cls/{name}"
    assert re.search(r"# (Paper, Table \d, .*\d\d\.\d %|Paper, Fig|Not in the paper)", lines)
    assert re.search(r"Ours\b.*(not measured yet|docs/\w+\.md|\d %)", lines)
    kind = "Stage one: " if name in STAGE_ONE else "The empirical bound " if name in BOUNDS else "DisAlign: "
    assert lines.startswith(f"# {kind}")


def test_the_command_for_imagenets_balanced_list(tmp_path):
    """As docs/datasets.md gives it, on a toy of ImageNet's folders."""
    text = (FOLDER.parents[1] / "docs" / "datasets.md").read_text()
    (command,) = re.findall(r"^find train .*?ImageNet_balanced_train\.txt$", text, re.MULTILINE | re.DOTALL)
    names = [f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in ("n02", "n01", "n10") for number in (1, 10, 2)]
    for name in names:
        path = tmp_path / "imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "imagenet_lt").mkdir()
    (tmp_path / "imagenet_lt" / "ImageNet_LT_val.txt").write_text("train/n02/n02_1.JPEG 1\n")
    subprocess.run(["bash", "-c", command], cwd=tmp_path / "imagenet", check=True)
    found = (tmp_path / "imagenet_lt" / "ImageNet_balanced_train.txt").read_text().splitlines()
    label = {"n01": 0, "n02": 1, "n10": 2}
    assert sorted(found) == sorted(f"{name} {label[name.split('/')[1]]}" for name in names if name != names[0])


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_inherits_stage_ones_model_and_data(name):
    one, two = config(base_of(name)), config(name)
    assert base_of(name) in STAGE_ONE
    assert f"# Stage one: {base_of(name).split('/')[1]};" in text(name)
    for key in ("train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator"):
        assert two[key] == one[key]
    model = two.model.to_dict()
    assert model.pop("type") == "DisAlignClassifier"
    assert model.pop("loss") == dict(rho=1.5 if "digits" in name else 1.2, reduction="weighted_mean")
    expected = one.model.to_dict()
    del expected["type"]
    # Stage two's weights come from stage one: nothing is fetched for it.
    assert model["backbone"].pop("pretrained", False) is False
    expected["backbone"].pop("pretrained", None)
    assert model == expected


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_starts_from_the_last_epoch_of_its_stage_one(name):
    base = base_of(name)
    stem = base.split("/")[1].removesuffix(".py")
    assert config(name).stage_one == f"work_dirs/{stem}/epoch_{config(base).train_cfg.max_epochs}.pth"


@pytest.mark.parametrize("name", LEAVES)
def test_the_schedule_ends_with_the_training(name):
    cfg = config(name)
    assert cfg.param_scheduler.T_max == cfg.train_cfg.max_epochs
    assert cfg.train_cfg.max_epochs % cfg.train_cfg.val_interval == 0


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_clips_and_does_not_decay_the_magnitude(name):
    model = build(name)
    wrapper = build_optim_wrapper(model, config(name).optim_wrapper)
    assert wrapper.clip_grad_kwargs == {"max_norm": 1.0}
    decay = {id(parameter): group["weight_decay"] for group in wrapper.param_groups for parameter in group["params"]}
    calibration = model.classifier.calibration
    assert decay[id(calibration.magnitude)] == 0
    assert decay[id(calibration.margin)] > 0
    assert {group["lr"] for group in wrapper.param_groups if group["params"][0].requires_grad} == {0.1}


def test_places_lts_trunk_learns_ten_times_slower_in_stage_one():
    (name,) = (name for name in STAGE_ONE if name.startswith("places"))
    assert config(name).model.backbone == {"name": "resnet152.tv_in1k", "pretrained": True}
    model = build(name)
    wrapper = build_optim_wrapper(model, config(name).optim_wrapper)
    rate = {id(parameter): group["lr"] for group in wrapper.param_groups for parameter in group["params"]}
    assert {round(rate[id(parameter)], 9) for parameter in model.backbone.parameters()} == {0.01}
    assert {rate[id(parameter)] for parameter in model.classifier.parameters()} == {0.1}


def test_a_config_brings_its_own_imports():
    """mim and mmengine's own tools import mmengine only."""
    program = (
        "import sys; from mmengine.config import Config; from mmengine.registry import MODELS;"
        "assert 'disalign_cls' not in sys.modules;"
        "print(type(MODELS.build(Config.fromfile(sys.argv[1]).model)).__name__)"
    )
    path = FOLDER / "digits/disalign_cnn_1xb64-60e_digits-lt.py"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["DisAlignClassifier"], done.stderr


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_config(f"cls/{LEAVES[0]}", {}), Config)
