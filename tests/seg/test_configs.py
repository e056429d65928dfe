"""Every shipped ADE20K config: MMSegmentation's own, with stage two laid over it and nothing else changed."""

import re
import subprocess
import sys
import textwrap
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import mmseg
import numpy as np
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import PolyLR, build_optim_wrapper
from mmseg.registry import DATASETS, METRICS, MODELS
from PIL import Image

import disalign_mmseg
from disalign import InputError, load_class_counts
from disalign.cli import find_config
from disalign_mmseg.bases import disalign_config, mmseg_config

FOLDER = Path(__file__).parents[2] / "configs" / "mmseg"
PAGE = Path(__file__).parents[2] / "docs" / "segmentation.md"
STOCK = Path(mmseg.__path__[0], ".mim", "configs")
ADE20K = sorted(str(path.relative_to(FOLDER)) for path in (FOLDER / "ade20k").glob("*.py"))

# Table 6 as printed: Mean IoU and Mean Accuracy, each average, head, body, tail; baseline, then DisAlign.
TABLE_6 = """
FCN         R-50   38.1 64.6 40.0 29.6 46.3 78.6 49.3 35.4   40.1 65.0 42.8 31.3 51.4 78.6 56.1 40.6
FCN         R-101  41.4 67.0 43.3 33.2 50.2 80.6 52.9 40.1   43.7 67.4 46.1 35.7 55.9 80.6 59.7 46.4
DeepLabV3+  R-50   44.9 67.7 48.3 36.4 55.0 80.1 60.8 44.1   45.7 67.7 48.6 37.8 57.3 80.8 63.0 46.9
DeepLabV3+  R-101  46.4 68.7 49.0 38.4 56.7 80.9 61.5 46.7   47.1 68.7 49.4 39.6 59.5 81.4 64.2 50.3
DeepLabV3+  S-101  47.3 69.0 49.7 39.7 58.1 80.8 63.4 48.2   47.8 68.9 49.8 40.7 60.1 81.0 65.5 52.0
"""
PAPER = {tuple(row.split()[:2]): [float(cell) for cell in row.split()[2:]] for row in TABLE_6.strip().splitlines()}
# The file's name in the paper's words.
MODEL = {"fcn": "FCN", "deeplabv3plus": "DeepLabV3+"}
BACKBONE = {"r50-d8": "R-50", "r101-d8": "R-101", "s101-d8": "S-101"}
TODAY = {"disalign_upernet_swin-t", "disalign_segformer_mit-b2"}

# What stage two may change in MMSegmentation's config: these keys, and anything within those.
WITHIN = ("model.decode_head.loss_decode.", "optim_wrapper.", "val_evaluator.", "test_evaluator.")
CHANGED = {
    *("custom_imports", "runner_type", "stage_one", "randomness", "auto_scale_lr"),
    *("model.type", "model.pretrained", "model.auxiliary_head", "model.backbone.init_cfg"),
    *("model.decode_head.type", "param_scheduler", "train_cfg.max_iters", "train_cfg.val_interval"),
    *("train_dataloader.batch_size", "tta_pipeline"),
    *("default_hooks.checkpoint.interval", "default_hooks.checkpoint.max_keep_ckpts"),
    *(f"default_hooks.{name}" for name in ("plain_checkpoint", "class_counts", "stage_two", "comparison")),
}


@cache
def text(name):
    return (FOLDER / name).read_text()


def header(name):
    """The comment at the top."""
    return text(name)[: text(name).index("_base_ =")]


@cache
def config(name):
    return Config.fromfile(FOLDER / name)


def stock_name(name):
    """MMSegmentation's config that a file inherits."""
    return re.search(r'mmseg_config\(\s*"(.+?)"', text(name))[1]


@cache
def stock(name):
    return Config.fromfile(STOCK / stock_name(name))


@cache
def model(name):
    return MODELS.build(config(name).model)


@cache
def stock_shapes(name):
    """Shapes of the tensors of the stock model, which stage one is; without memory, except for transformers."""
    cfg = {**stock(name).model, "pretrained": None}
    with torch.device("meta" if "ResN" in cfg["backbone"]["type"] else "cpu"):
        return {key: value.shape for key, value in MODELS.build(cfg).state_dict().items()}


def row_of(name):
    """The paper's (model, backbone), or None."""
    row = tuple(words.get(part) for words, part in zip((MODEL, BACKBONE), Path(name).stem.split("_")[1:3], strict=True))
    return row if row in PAPER else None


def differences(one, two, prefix=""):
    """The full names of the keys that differ."""
    found = set()
    for key in one.keys() | two.keys():
        left, right = one.get(key), two.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.add(prefix + key)
    return found


@cache
def metafile(folder):
    """The part of MMSegmentation's zoo that stands beside its configs."""
    return yaml.safe_load((STOCK / folder / "metafile.yaml").read_text())["Models"]


def zoo(name):
    """The public weights of a file's stage one, and their metrics. (The zoo lists one name twice, once with 80k's.)"""
    for entry in metafile(stock_name(name).split("/")[0]):
        if entry["Config"] == f"configs/{stock_name(name)}" and "160k" in entry["Weights"]:
            yield entry["Weights"].rsplit("/", 1)[1], entry["Results"]["Metrics"]


def test_table_6_and_the_examples_of_today_have_a_file_each():
    stems = {"_".join(Path(name).stem.split("_")[:3]) for name in ADE20K}
    table = {f"disalign_{model}_{backbone}" for model in MODEL for backbone in BACKBONE}
    assert stems == table | TODAY
    assert {row_of(name) for name in ADE20K} == {*PAPER, None}  # FCN with S-101 is not printed


@pytest.mark.parametrize("name", ADE20K)
def test_it_builds_as_the_stock_model_with_a_calibration(name):
    shapes = {key: value.shape for key, value in model(name).state_dict().items()}
    # The loss keeps its weights with the model.
    shapes = {key: shape for key, shape in shapes.items() if ".loss_decode." not in key}
    calibration = {key for key in shapes if key.startswith("decode_head.calibration.")}
    kept = {key: shape for key, shape in stock_shapes(name).items() if not key.startswith("auxiliary_head.")}
    assert {key: shape for key, shape in shapes.items() if key not in calibration} == kept
    head = model(name).decode_head
    assert f"DisAlign{stock(name).model.decode_head.type}" == type(head).__name__
    assert f"DisAlign{stock(name).model.type}" == type(model(name)).__name__
    trained = sum(parameter.numel() for parameter in model(name).parameters() if parameter.requires_grad)
    assert trained == 2 * 150 + head.conv_seg.in_channels + 1
    assert sum(shapes[key].numel() for key in calibration) == trained


@pytest.mark.parametrize("name", ADE20K)
def test_only_stage_two_differs_from_mmsegmentations_own(name):
    found = differences(config(name).to_dict(), stock(name).to_dict())
    assert {key for key in found if key not in CHANGED and not key.startswith(WITHIN)} == set()
    # Data, augmentation and the plain test are the stock config's: ADE20K where MMSegmentation expects it.
    assert config(name).train_dataloader.dataset.data_root == "data/ade/ADEChallengeData2016"


@pytest.mark.parametrize("name", ADE20K)
def test_nothing_is_downloaded_and_no_auxiliary_head_is_there(name):
    assert config(name).model.pretrained is None
    assert config(name).model.backbone.init_cfg is None
    assert config(name).model.auxiliary_head is None
    assert not hasattr(model(name), "auxiliary_head") or model(name).auxiliary_head is None


@pytest.mark.parametrize("name", ADE20K)
def test_its_header_names_the_file_itself_in_both_commands(name):
    assert header(name).startswith("# DisAlign: ADE20K, ")
    assert f"mim train mmseg configs/mmseg/{name} " in header(name)
    assert f"python -m disalign_mmseg.train mmseg/{name} " in header(name)
    assert header(name).count("--cfg-options stage_one=FILE") == 2
    assert Path(find_config(f"mmseg/{name}")).samefile(FOLDER / name)


@pytest.mark.parametrize("name", ADE20K)
def test_its_header_names_the_public_stage_one_and_its_published_figures(name):
    said = re.search(r"^# Stage one, .*: (\S+\.pth), mIoU ([\d.]+), multi-scale and flip ([\d.]+)$", header(name), re.M)
    published = [(weights, metrics["mIoU"], metrics["mIoU(ms+flip)"]) for weights, metrics in zoo(name)]
    assert published == [(said[1], float(said[2]), float(said[3]))]


@pytest.mark.parametrize("name", ADE20K)
def test_its_header_has_the_papers_row(name):
    (line,) = (line for line in header(name).splitlines() if re.match(r"# (Paper|Not in the paper)\b", line))
    assert re.search(r"Ours: (not measured yet|.*docs/results\.md)", line)
    row = row_of(name)
    if "fcn_s101" in name:  # its row is a sentence
        assert line.startswith("# Paper, Sec. 4.2: +0.7 mIoU, +2.8 mean accuracy over stage one")
    else:
        assert line.startswith("# Paper, Table 6, " if row else "# Not in the paper")
    if row is None:
        return
    assert line.startswith(f"# Paper, Table 6, {row[0]} {row[1]}, multi-scale and flip (--tta): mIoU ")
    figures = [float(figure) for figure in re.findall(r"\d\d\.\d", line)]
    iou, accuracy = [0, 1, 2, 3], [4, 5, 6, 7]
    before, after = PAPER[row][:8], PAPER[row][8:]
    expected = []
    for average, *groups in (iou, accuracy):
        expected += [before[average], after[average], *(before[k] for k in groups), *(after[k] for k in groups)]
    assert figures == expected


@pytest.mark.parametrize("row", PAPER, ids=" ".join)
def test_the_papers_baseline_is_the_zoos_with_multi_scale_and_flip(row):
    (name,) = (name for name in ADE20K if row_of(name) == row)
    ((_, metrics),) = zoo(name)
    assert metrics["mIoU(ms+flip)"] == pytest.approx(PAPER[row][0], abs=0.0501)


@pytest.mark.parametrize("name", ADE20K)
def test_its_name_says_what_it_does(name):
    setting, schedule, dataset, size = re.search(r"_(8xb\d+)-(4k)_(ade20k)-(512x512)\.py$", name).groups()
    cfg = config(name)
    gpus, batch = map(int, setting.split("xb"))
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=gpus * batch)
    assert (schedule, cfg.train_cfg.max_iters) == ("4k", 4000)
    assert isinstance(DATASETS.get(cfg.train_dataloader.dataset.type), type)
    assert cfg.val_evaluator.class_counts == dataset
    assert f"{size.split('x')[0]}, {size.split('x')[1]}" in str(cfg.model.data_preprocessor["size"])


@pytest.mark.parametrize("name", ADE20K)
def test_stage_two_has_the_official_values(name):
    cfg = config(name)
    loss = cfg.model.decode_head.loss_decode
    assert loss == dict(
        type="GRWCrossEntropyLoss", class_counts="ade20k", rho=0.2, reduction="mean", avg_non_ignore=False
    )
    assert cfg.optim_wrapper.optimizer == dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert cfg.param_scheduler == [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=4000, by_epoch=False)]
    assert model(name).decode_head.calibration.confidence is not None


@pytest.mark.parametrize("name", ADE20K)
def test_the_built_loss_has_the_official_weights(name):
    weight = MODELS.build(config(name).model.decode_head.loss_decode).weight
    counts = load_class_counts("ade20k").double()
    by_hand = counts**-0.2
    torch.testing.assert_close(weight.double(), by_hand / by_hand.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ADE20K)
def test_the_schedule_ends_with_the_training(name):
    cfg = config(name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    ((_, settings),) = ((one.pop("type"), one) for one in (dict(one) for one in cfg.param_scheduler))
    scheduler = PolyLR(optimizer, **settings)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(cfg.train_cfg.max_iters):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[-1] == pytest.approx(1e-4)
    assert all(later < earlier for earlier, later in pairwise(rates[:-1]))
    assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    checkpoint = cfg.default_hooks.checkpoint
    assert (checkpoint.by_epoch, cfg.train_cfg.max_iters % checkpoint.interval) == (False, 0)


@pytest.mark.parametrize("name", ADE20K)
def test_the_optimizer_has_the_calibration_alone_and_does_not_decay_the_magnitude(name):
    wrapper = build_optim_wrapper(model(name), config(name).optim_wrapper)
    assert wrapper.clip_grad_kwargs == {"max_norm": 1.0}
    groups = wrapper.optimizer.param_groups  # the wrapper's own have a dummy more
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    parameters = dict(model(name).decode_head.calibration.named_parameters())
    assert decay.keys() == {id(parameter) for parameter in parameters.values()}
    assert decay == {id(parameter): 0.0 if key == "magnitude" else 5e-4 for key, parameter in parameters.items()}
    assert {group["lr"] for group in groups} == {0.01}


@pytest.mark.parametrize("name", ADE20K)
def test_evaluation_is_by_the_official_groups(name):
    cfg = config(name)
    assert cfg.val_evaluator == cfg.test_evaluator
    metric = METRICS.build(cfg.val_evaluator)
    assert type(metric).__name__ == "LongTailIoUMetric"
    assert (metric.groups, len(metric.class_counts)) == ("ade20k", 150)


def test_multi_scale_and_flip_is_the_official_one(tmp_path):
    """MMSegmentation 0.x multiplied the plain test's 2048 x 512 by the ratios."""
    for name in ADE20K:
        assert config(name).tta_pipeline == config(ADE20K[0]).tta_pipeline
        assert config(name).tta_model == stock(name).tta_model
    Image.fromarray(np.zeros((120, 160, 3), np.uint8)).save(tmp_path / "image.jpg")
    Image.fromarray(np.full((120, 160), 1, np.uint8)).save(tmp_path / "labels.png")
    data = dict(img_path=tmp_path / "image.jpg", seg_map_path=tmp_path / "labels.png")
    views = Compose(config(ADE20K[0]).tta_pipeline)(data | dict(reduce_zero_label=True, seg_fields=[]))
    samples = views["data_samples"]
    seen = [(image.shape[1], sample.flip) for image, sample in zip(views["inputs"], samples, strict=True)]
    ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert sorted(seen) == [(int(512 * ratio), flip) for ratio in ratios for flip in (False, True)]
    # ADE20K's label 1 is class 0, at the annotation's own size.
    assert all(torch.equal(sample.gt_sem_seg.data, torch.zeros(1, 120, 160).long()) for sample in samples)


def test_a_config_brings_its_own_imports(tmp_path):
    """mim and mmengine's own tools import mmengine and mmseg only."""
    program = """
import sys
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, RUNNERS
assert "disalign_mmseg" not in sys.modules
cfg = Config.fromfile(sys.argv[1])
DefaultScope.get_instance("test", scope_name=cfg.default_scope)
print(RUNNERS.get(cfg.runner_type).__name__, *(HOOKS.get(hook["type"]).__name__ for hook in cfg.default_hooks.values()))
print(OPTIM_WRAPPER_CONSTRUCTORS.get(cfg.optim_wrapper.constructor).__name__, type(MODELS.build(cfg.model)).__name__)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, FOLDER / "ade20k" / Path(ADE20K[-1]).name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    *_, found, built = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert built == "CalibrationOptimWrapperConstructor DisAlignEncoderDecoder"
    hooks = {"PlainCheckpointHook", "StageTwoHook", "ClassCountsHook", "ComparisonHook"}
    assert {"DisAlignSegRunner"} | hooks < set(found.split())


@pytest.mark.parametrize("name", ADE20K)
def test_what_is_dumped_beside_a_run_stands_alone(name, tmp_path):
    config(name).dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == config(name).to_dict()


OWN = """
custom_imports = dict(imports=["json"], allow_failed_imports=False)
default_scope = "mmseg"
model = dict(
    type="EncoderDecoder",
    backbone=dict(type="ResNetV1c", depth=18),
    decode_head=dict(type="FCNHead", num_classes=7, loss_decode=[dict(type="CrossEntropyLoss")]),
    auxiliary_head=[dict(type="FCNHead")],
)
train_dataloader = dict(batch_size=2, dataset=dict(type="MyDataset"))
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=9, val_interval=1)
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic", optimizer=dict(type="AdamW", lr=1.0))
param_scheduler = [dict(type="LinearLR"), dict(type="PolyLR")]
default_hooks = dict(logger=dict(type="LoggerHook", interval=7))
val_evaluator = [dict(type="IoUMetric"), dict(type="CityscapesMetric")]
test_evaluator = dict(type="CityscapesMetric", output_dir="results")
"""


def test_stage_two_lies_over_any_config_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "two.py").write_text('_base_ = "own.py"\n__import__("disalign_mmseg").stage_two(_base_, rho=0.5)\n')
    cfg = Config.fromfile(tmp_path / "two.py")
    shared = Config.fromfile(FOLDER / "_base_" / "disalign_4k.py").stage_two
    assert cfg.custom_imports.imports == ["json", "disalign_mmseg"]
    assert (cfg.model.type, cfg.model.decode_head.type) == ("DisAlignEncoderDecoder", "DisAlignFCNHead")
    for key in ("train_cfg", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator"):
        expected = shared[key]
        if isinstance(expected, dict):
            expected = {one: value for one, value in expected.items() if one != "_delete_"}
        assert cfg[key] == expected  # nothing of the own optimizer, loop or metric is left
    assert cfg.model.backbone == dict(type="ResNetV1c", depth=18, init_cfg=None)
    assert (cfg.model.decode_head.num_classes, cfg.model.auxiliary_head) == (7, None)
    assert cfg.model.decode_head.loss_decode.pop("rho") == 0.5
    assert set(cfg.model.decode_head.loss_decode) == {"type", "reduction", "avg_non_ignore"}  # counts: the dataset's
    assert cfg.train_dataloader == dict(batch_size=4, dataset=dict(type="MyDataset"))
    assert cfg.default_hooks.logger == dict(type="LoggerHook", interval=7)
    assert "stage_two" not in cfg


CAMVID = sorted(str(path.relative_to(FOLDER)) for path in (FOLDER / "camvid").glob("*.py"))


def test_camvid_has_both_stages_of_one_model():
    one, two = CAMVID
    shapes = [{key: value.shape for key, value in model(name).state_dict().items()} for name in CAMVID]
    added = {key for key in shapes[1] if key.startswith("decode_head.calibration.")}
    assert {key: shape for key, shape in shapes[1].items() if key not in added} == shapes[0]
    assert len(added) == 4
    assert [type(model(name)).__name__ for name in CAMVID] == ["EncoderDecoder", "DisAlignEncoderDecoder"]
    for name in CAMVID:
        assert f"mim train mmseg configs/mmseg/{name}" in header(name)
        assert f"python -m disalign_mmseg.train mmseg/{name}" in header(name)
        assert METRICS.build(config(name).test_evaluator).groups == dict(head=0.05, tail=0.01)
        assert config(name).param_scheduler[-1].end == config(name).train_cfg.max_iters
    assert config(one).train_dataloader == config(two).train_dataloader
    assert (config(two).model.decode_head.loss_decode.rho, config(two).optim_wrapper.optimizer.lr) == (0.5, 0.1)
    assert f"iter_{config(one).train_cfg.max_iters}.pth" in header(two)


def test_stage_ones_own_start_is_not_stage_twos(tmp_path):
    start = 'load_from = "pretrained.pth"\nresume = True\nwork_dir = "one"\nlog_processor = dict(by_epoch=True)\n'
    (tmp_path / "own.py").write_text(OWN + start)
    (tmp_path / "two.py").write_text('_base_ = "own.py"\n__import__("disalign_mmseg").stage_two(_base_)\n')
    cfg = Config.fromfile(tmp_path / "two.py")
    assert (cfg.stage_one, cfg.load_from, cfg.resume, cfg.work_dir) == (None, None, False, None)
    assert cfg.log_processor.by_epoch is False


def test_the_pages_recipe_for_heads_in_a_row_builds(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (recipe,) = (block for block in blocks if "ocrnet" in block)
    (tmp_path / "two.py").write_text(textwrap.dedent(recipe))
    model = MODELS.build(Config.fromfile(tmp_path / "two.py").model)
    assert type(model).__name__ == "DisAlignCascadeEncoderDecoder"
    assert type(model.decode_head[0]).__name__ == "FCNHead"
    assert type(model.calibrated_head).__name__ == "DisAlignOCRHead"
    assert model.freeze_report.num_trainable == 2 * 150 + model.calibrated_head.conv_seg.in_channels + 1
    loss = model.calibrated_head.loss_decode
    assert (loss.rho, loss.reduction, loss.avg_non_ignore, len(loss.class_counts)) == (0.2, "mean", False, 150)


def test_mmsegmentations_configs_are_found():
    assert Path(mmseg_config("fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py")).samefile(
        STOCK / "fcn" / "fcn_r50-d8_4xb4-160k_ade20k-512x512.py"
    )


def test_a_config_that_mmsegmentation_does_not_have_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^expected 'fcn/none\.py' among MMSegmentation's configs, which pip and mim"):
        mmseg_config("fcn/none.py")
    with pytest.raises(InputError, match="expected 'fcn' among MMSegmentation's configs"):
        mmseg_config("fcn")  # a folder
    monkeypatch.setattr(mmseg, "__path__", [str(tmp_path)])
    with pytest.raises(InputError, match=r"which pip and mim install, but there is no file '.*\.mim.*'"):
        mmseg_config("fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py")


def test_the_place_of_mmsegmentations_configs_is_said_once():
    package = Path(disalign_mmseg.__file__).parent
    said = [path for path in (*package.rglob("*.py"), *FOLDER.rglob("*.py")) if ".mim" in path.read_text()]
    assert said == [package / "bases.py"]


def test_our_bases_are_found_from_anywhere():
    assert Path(disalign_config("_base_/disalign_4k.py")).samefile(FOLDER / "_base_" / "disalign_4k.py")
    with pytest.raises(InputError, match=r"expected 'none\.py' among the shipped configs, but"):
        disalign_config("none.py")


def test_a_base_without_a_segmentor_is_refused(tmp_path):
    (tmp_path / "own.py").write_text('model = dict(type="ImageClassifier")\n')
    (tmp_path / "two.py").write_text('_base_ = "own.py"\n__import__("disalign_mmseg").stage_two(_base_)\n')
    with pytest.raises(InputError, match=r"config of an EncoderDecoder or .* as _base_, got a model of 'ImageClassif"):
        Config.fromfile(tmp_path / "two.py")
