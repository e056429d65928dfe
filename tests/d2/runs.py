"""Quick runs of disalign_d2.train_net in this process, on a generated set in LVIS format."""

import functools
import itertools
import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from detectron2.engine import defaults
from detectron2.utils.logger import setup_logger
from PIL import Image, ImageDraw

from disalign_d2 import train_net

from .annotations import unique
from .models import COUNTS, tiny_cfg

CLASSES = len(COUNTS)
SIZE = 64
COLOURS = ["red", "lime", "blue", "yellow", "magenta"]
#: A calibration's tensors below its predictor's name.
CALIBRATION = ("magnitude", "margin", "confidence.weight", "confidence.bias")


def write_dataset(folder: Path, images: int, seed: int) -> Path:
    """Coloured diamonds of five classes with polygons, in LVIS format; returns the annotation file."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records, annotations = [], []
    for number in range(1, images + 1):
        image = Image.fromarray(generator.integers(64, 192, (SIZE, SIZE, 3), dtype=np.uint8))
        labels = {0, number % 2, number % CLASSES}
        for label in sorted(labels):
            x, y, r = generator.integers((16, 16, 8), (48, 48, 14)).tolist()
            polygon = [x - r, y, x, y - r, x + r, y, x, y + r]
            ImageDraw.Draw(image).polygon(polygon, fill=COLOURS[label])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x - r, y - r, 2 * r, 2 * r],
                    "area": 2 * r * r,
                    "segmentation": [polygon],
                }
            )
        image.save(folder / f"{number}.png")
        absent = sorted(set(range(CLASSES)) - labels)
        records.append(
            {
                "id": number,
                "file_name": f"{number}.png",
                "width": SIZE,
                "height": SIZE,
                "neg_category_ids": [label + 1 for label in absent],
                "not_exhaustive_category_ids": [],
            }
        )
    categories = [
        {"id": label + 1, "name": COLOURS[label], "frequency": "ffccr"[label], "image_count": 1 + images // (label + 1)}
        for label in range(CLASSES)
    ]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    return path


def write_data(folder: Path) -> dict[str, list[str]]:
    """``"train"`` and ``"val"`` -> the entry of DATASETS.OWN: a new name, annotation file, image folder."""
    return {
        split: [unique(split), str(write_dataset(folder / split, images, seed)), str(folder / split)]
        for seed, (split, images) in enumerate({"train": 12, "val": 6}.items())
    }


def write_config(folder: Path, data: dict, name: str = "config", **kind) -> Path:
    """``models.tiny_cfg(**kind)`` on these data as YAML."""
    cfg = tiny_cfg(**kind)
    cfg.DATASETS.OWN = [data["train"], data["val"]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data["train"][0],), (data["val"][0],)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SEED = 1
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.02
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    path = folder / f"{name}.yaml"
    path.write_text(cfg.dump())
    return path


def main(config, output, *options, flags=()) -> int:
    """Exit status of the command, in this process."""
    with quiet():
        return train_net.main(arguments(config, output, *options, flags=flags))


@contextmanager
def quiet():
    """Within it a command runs without the report on the machine, and its loggers end with it."""
    setup_logger.cache_clear()
    try:
        # The report takes longer than all the rest.
        with mock.patch.object(defaults, "collect_env_info", return_value=""):
            yield
    finally:
        for name in ("detectron2", "fvcore", "disalign_d2", "disalign"):
            logger = logging.getLogger(name)
            logger.propagate = True
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
                handler.close()
        setup_logger.cache_clear()


@functools.cache
def trained(folder: Path) -> SimpleNamespace:
    """A short stage one and stage two, trained once below a folder: configs, work folders and checkpoints."""
    data = write_data(folder / "data")
    made = SimpleNamespace(folder=folder, data=data)
    made.config_one, made.config_two = (
        write_config(folder, data, name, calibrate=name == "stage_two") for name in ("stage_one", "stage_two")
    )
    made.one, made.two = folder / "one", folder / "two"
    made.weights_one, made.weights_two = made.one / "model_final.pth", made.two / "model_final.pth"
    assert main(made.config_one, made.one, "SOLVER.MAX_ITER", 100, "SOLVER.BASE_LR", 0.05) == 0
    options = ["SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 1.0, "TEST.EVAL_PERIOD", 4, "MODEL.WEIGHTS", made.weights_one]
    assert main(made.config_two, made.two, *options) == 0
    return made


def arguments(config, output, *options, flags=()) -> list[str]:
    return ["--config-file", str(config), *flags, "OUTPUT_DIR", str(output), *map(str, options)]


def start(*command, **options) -> subprocess.Popen:
    """A fresh interpreter that finds what this one does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, text=True, **options)


def load(path) -> dict:
    """A checkpoint, of tensors and plain values alone."""
    return torch.load(path, map_location="cpu", weights_only=True)


def log(folder) -> str:
    return (Path(folder) / "log.txt").read_text()


def results(folder) -> dict:
    return json.loads((Path(folder) / "results.json").read_text())


def figures(folder) -> dict:
    """results.json, as dataset -> stage (``"stage_one"``, ``"disalign"``) -> task -> figure -> percent."""
    found = {}
    for dataset, tasks in results(folder).items():
        found[dataset] = {"disalign": {task: report["figures"] for task, report in tasks.items()}}
        if any("stage_one" in report for report in tasks.values()):
            found[dataset]["stage_one"] = {task: report["stage_one"]["figures"] for task, report in tasks.items()}
    return found


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def left_behind(folder) -> list[str]:
    """Checkpoints, results and caches below a folder; the framework's logs (metrics.json is one) may be there."""
    suffixes = (".pth", ".pkl", ".json", ".disalign-tmp", ".npz")
    found = [path for path in Path(folder).rglob("*") if path.suffix in suffixes or path.name == "last_checkpoint"]
    return sorted(str(path.relative_to(folder)) for path in found if path.name != "metrics.json")


def same(one, two) -> bool:
    """Bit for bit the same tensors and plain values."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(itertools.starmap(same, zip(one, two, strict=True)))
    return type(one) is type(two) and one == two
