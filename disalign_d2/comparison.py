"""Stage one beside stage two: the same model, the same images, with and without its calibration."""

import hashlib
import json
import math
from collections.abc import Mapping

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import nn

from disalign.freezing import fingerprints, frozen_tensors
from disalign.io import write_json

from .freezing import calibrations

FIGURES = ("AP", "AP50", "AP75", "APr", "APc", "APf")


def stage_one_key(cfg, model: nn.Module) -> str:
    """SHA-256 of all that stage one's figures depend on: its tensors, the annotations, the settings of the test."""
    settings = cfg.clone()
    settings.defrost()
    for unrelated in ("OUTPUT_DIR", "SOLVER", "DATALOADER", "SEED", "VERSION"):
        settings.pop(unrelated, None)
    for unrelated in ("WEIGHTS", "DISALIGN", "DEVICE"):
        settings.MODEL.pop(unrelated, None)
    for unrelated in ("EVAL_PERIOD", "EXPECTED_RESULTS", "AUG", "PRECISE_BN"):
        settings.TEST.pop(unrelated, None)
    digest = hashlib.sha256(settings.dump().encode())
    # Without the loss's weights, which no state dict holds: evaluation alone does not know them.
    saved = model.state_dict()
    frozen = frozen_tensors(model, calibrations(model))
    kept = {name: tensor for name, tensor in frozen.items() if name in saved}
    for name, value in sorted(fingerprints(kept).items()):
        digest.update(f"{name} {value}".encode())
    for dataset in cfg.DATASETS.TEST:
        json_file = MetadataCatalog.get(dataset).get("json_file")
        if json_file:
            with open(PathManager.get_local_path(json_file), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_stage_one_results(path: str, key: str) -> dict | None:
    """The results kept in ``path`` by :func:`save_stage_one_results`, if they are this stage one's."""
    try:
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
    except (OSError, ValueError):
        return None
    return _with_nan(kept["results"]) if isinstance(kept, dict) and kept.get("key") == key else None


def save_stage_one_results(path: str, key: str, results: Mapping) -> None:
    """Keep stage one's results, so that it is evaluated once only."""
    write_json(path, {"key": key, "results": plain(results)})


def by_dataset(cfg, results: Mapping) -> dict:
    """Detectron2 leaves out the dataset's name when there is one only; this puts it back."""
    return {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else dict(results)


def plain(value):
    """For JSON: NaN (no ground truth) becomes null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _with_nan(value):
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    return float("nan") if value is None else value


def write_results(path: str, stage_one: Mapping | None, disalign: Mapping) -> None:
    """Both stages' figures, or DisAlign's alone, in percent, as JSON: dataset -> stage -> task -> figure."""
    stages = {"disalign": disalign} if stage_one is None else {"stage_one": stage_one, "disalign": disalign}
    write_json(path, plain({name: {stage: figures[name] for stage, figures in stages.items()} for name in disalign}))


def table(stage_one: Mapping, disalign: Mapping) -> str:
    """Before and after, a table for each dataset and task: figures in percent, gains in points.

    Args:
        stage_one, disalign: dataset -> task (``"bbox"``, ``"segm"``) -> figure -> percent.
    """
    tables = []
    for dataset, tasks in disalign.items():
        for task, after in tasks.items():
            # A model that detects nothing has no figures of masks.
            before = dict.fromkeys(after, math.nan) | dict(stage_one[dataset].get(task, {}))
            figures = [figure for figure in FIGURES if figure in after]
            rows = [
                ["stage one", *(_shown(before[figure]) for figure in figures)],
                ["DisAlign", *(_shown(after[figure]) for figure in figures)],
                ["gain", *(_shown(after[figure] - before[figure], "+z.1f") for figure in figures)],
            ]
            lines = tabulate(rows, headers=[task, *figures], tablefmt="github", disable_numparse=True)
            tables.append(f"{dataset}, {task}, before and after\n{lines}")
    return "\n\n".join(tables)


def _shown(value: float, form: str = ".1f") -> str:
    return "n/a" if math.isnan(value) else format(value, form)
