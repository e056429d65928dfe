"""A tiny set in ADE20K's layout, tiny configs of both stages over it, and runs of the commands in this process."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.runner import Runner

from disalign_mmengine.cli import load_config
from disalign_mmseg import test as test_command
from disalign_mmseg import train as train_command

ROOT = Path(__file__).parents[2]
CALIBRATION = {
    f"decode_head.calibration.{name}" for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
}

#: MMSegmentation's own config, as small as it goes: a model of 8 channels, images of 64 pixels.
TINY = """
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(depth=18, base_channels=8, stem_channels=8, norm_cfg=dict(type="BN", momentum=0.5)),
    decode_head=dict(in_channels=64, channels=16, num_convs=1, norm_cfg=dict(type="BN", momentum=0.5)),
    auxiliary_head=dict(in_channels=32, channels=8, norm_cfg=dict(type="BN", momentum=0.5)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(128, 64), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(64, 64), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 64), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
_data = dict(num_workers=0, persistent_workers=False)
# Serialising collects garbage, which takes half a second each time.
_set = dict(data_root=DATA, serialize_data=False)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline, **_set), **_data)
val_dataloader = dict(batch_size=1, dataset=dict(pipeline=test_pipeline, **_set), **_data)
test_dataloader = val_dataloader
visualizer = dict(vis_backends=[])
default_hooks = dict(logger=dict(interval=1))
"""

STAGE_ONE = """
_base_ = __import__("disalign_mmseg.bases").bases.mmseg_config("fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py")
DATA = {data!r}
{tiny}
train_cfg = dict(max_iters=8, val_interval=8)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="Adam", lr=0.01))
param_scheduler = [dict(type="PolyLR", power=0.9, begin=0, end=8, by_epoch=False)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=8))
randomness = dict(seed=0)
"""

STAGE_TWO = """
_base_ = __import__("disalign_mmseg").mmseg_config("fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, {base!r})
DATA = {data!r}
{tiny}
model.pop("auxiliary_head")
train_cfg = dict(max_iters=4, val_interval=2)
# Few steps must move the calibration far.
optim_wrapper = dict(optimizer=dict(lr=5.0))
# As many as the batch: the learning rate stays.
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=4, by_epoch=False)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(128, size), keep_ratio=True) for size in (48, 64)],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations", reduce_zero_label=True)],
            [dict(type="PackSegInputs")],
        ],
    ),
]
"""


#: Stage two without random augmentation.
PLAIN = """
_base_ = "two.py"
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=False),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
"""

_numbers = itertools.count()


def make_ade(folder, *options: str) -> None:
    """Write the generated set."""
    path = ROOT / "scripts" / "make_tiny_ade.py"
    spec = importlib.util.spec_from_file_location("make_tiny_ade", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(folder), *options]) == 0


def write_configs(folder, data) -> SimpleNamespace:
    """Paths of configs over the set ``data``: ``one``, ``two``, and ``plain``, stage two without augmentation."""
    base = "_base_/disalign_4k_ade20k.py"
    made = SimpleNamespace(one=folder / "one.py", two=folder / "two.py", plain=folder / "plain.py")
    made.one.write_text(STAGE_ONE.format(data=str(data), tiny=TINY))
    made.two.write_text(STAGE_TWO.format(data=str(data), base=base, tiny=TINY))
    made.plain.write_text(PLAIN)
    return made


def quick(iterations: int | None = None) -> list[str]:
    """Options of every run: a name of its own, which mmengine's globals go by, and perhaps another length."""
    options = [f"experiment_name=run{next(_numbers)}"]
    return options if iterations is None else [*options, f"train_cfg.max_iters={iterations}"]


def train(config, work_dir, *options: str, iterations: int | None = None, flags=()) -> int:
    """Exit status of ``disalign_mmseg.train``."""
    given = [*quick(iterations), *options]
    return train_command.main([str(config), "--work-dir", str(work_dir), *flags, "--cfg-options", *given])


def stock_runner(config, work_dir, **options) -> Runner:
    """MMEngine's own, as mim's commands build it for a config without ours."""
    cfg = load_config(str(config), options | dict(option.split("=") for option in quick()))
    cfg.pop("runner_type", None)
    cfg.work_dir = str(work_dir)
    return Runner.from_cfg(cfg)


def evaluate(config, checkpoint, work_dir, *options: str, flags=()) -> int:
    """Exit status of ``disalign_mmseg.test``."""
    given = [str(config), str(checkpoint), "--work-dir", str(work_dir), *flags]
    return test_command.main([*given, "--cfg-options", *quick(), *options])


def log(work_dir) -> str:
    """All that the runs in a work folder have logged."""
    return "".join(path.read_text() for path in sorted(Path(work_dir).glob("*/*.log")))


def load(path):
    return torch.load(path, weights_only=True)


def left_behind(folder) -> list[str]:
    """Checkpoints, results and caches below a folder."""
    return [str(path) for path in Path(folder).rglob("*") if path.suffix in (".pth", ".json", ".npz", ".disalign-tmp")]
