"""Stage one beside stage two: the same model, the same images, with and without its calibration."""

import hashlib
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from disalign import InputError
from disalign.freezing import fingerprints, frozen_tensors
from disalign.io import read_json, write_json
from disalign.report import report, table, without_nan
from disalign.stage_two import trained_parts

FIGURES = ("AP", "AP50", "AP75", "APr", "APc", "APf")


def stage_one_key(cfg: CfgNode, model: nn.Module) -> str:
    """SHA-256 of everything that stage one's figures depend on: its tensors, the annotations, the test settings."""
    settings = cfg.clone()
    settings.defrost()
    for unrelated in ("OUTPUT_DIR", "SOLVER", "DATALOADER", "SEED", "VERSION"):
        settings.pop(unrelated, None)
    for unrelated in ("WEIGHTS", "DISALIGN", "DEVICE"):
        settings.MODEL.pop(unrelated, None)
    for unrelated in ("EVAL_PERIOD", "EXPECTED_RESULTS", "AUG", "PRECISE_BN"):
        settings.TEST.pop(unrelated, None)
    digest = hashlib.sha256(settings.dump().encode())
    model = getattr(model, "module", model)  # out of DDP
    for name, value in sorted(fingerprints(frozen_tensors(model, trained_parts(model))).items()):
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
        kept = read_json(path, "stage one's results")
    except InputError:
        return None
    return kept["results"] if isinstance(kept, dict) and kept.get("key") == key else None


def save_stage_one_results(path: str, key: str, results: Mapping) -> None:
    """Keep stage one's results, so that it is evaluated only once."""
    write_json(path, {"key": key, "results": without_nan(results)})


def reports(cfg: CfgNode, results: Mapping, stage_one: Mapping | None) -> dict[str, dict[str, dict]]:
    """Dataset -> task (``"bbox"``, ``"segm"``) -> :func:`disalign.report.report`.

    Built from Detectron2's results: dataset (left out if there is only one) -> task -> figure -> percent. A task for
    which stage one detected nothing has no figures of stage one.
    """
    if len(cfg.DATASETS.TEST) == 1:
        results = {cfg.DATASETS.TEST[0]: results}
        stage_one = None if stage_one is None else {cfg.DATASETS.TEST[0]: stage_one}
    return {
        dataset: {task: report(after, stage_one and stage_one[dataset].get(task, {})) for task, after in tasks.items()}
        for dataset, tasks in results.items()
    }


def tables(content: Mapping) -> str:
    """:func:`reports` as text: a table for each dataset and task."""
    return "\n\n".join(
        f"{dataset}, {task}, before and after\n{table(one, [name for name in FIGURES if name in one['figures']])}"
        for dataset, tasks in content.items()
        for task, one in tasks.items()
    )
