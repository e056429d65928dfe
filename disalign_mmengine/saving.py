"""Checkpoints of a run: a new one is complete before an old one is removed."""

import glob
import os
import zipfile
from collections import deque
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from torch import nn

from disalign import FitReport
from disalign.io import atomic_file

from .checkpoints import load_checkpoint

#: The file in a work folder that names the checkpoint to resume.
LAST = "last_checkpoint"


@register_backend("disalign_atomic")
class AtomicBackend(LocalBackend):
    """MMEngine's own, but a file is written completely or not at all, and removed only by :meth:`clear`."""

    def __init__(self) -> None:
        self._outdated: list[str] = []

    def put(self, obj: bytes, filepath: str | os.PathLike[str]) -> None:
        with atomic_file(filepath) as file:
            file.write(obj)

    def remove(self, filepath: str | os.PathLike[str]) -> None:
        self._outdated.append(os.fspath(filepath))

    def clear(self, kept: Container[Any]) -> None:
        """Remove the outdated files that are not among those ``kept``."""
        while self._outdated:
            if (path := self._outdated.pop()) not in kept:
                Path(path).unlink(missing_ok=True)


class WholeCheckpointHook(CheckpointHook):
    """MMEngine's, but neither a kill nor a full disk loses a checkpoint.

    The order is: the new checkpoint is written beside its place, synced and renamed; ``last_checkpoint`` names it,
    relative to the work folder, which may move; then the outdated one is removed. A resumed run finds the best
    checkpoint even if it was killed before another checkpoint recorded it.
    """

    keep_ckpt_ids: deque

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # When the resumed checkpoint was written, until newer best ones have been looked for; else None.
        resumed = latest_checkpoint(runner.work_dir) if runner.iter else None
        self._resumed = os.path.getmtime(resumed) if resumed else None

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        # Not MMEngine's, which removes first and writes last_checkpoint in place.
        name, outdated = self.filename_tmpl.format(step), []
        self.last_ckpt = os.path.join(self.out_dir, name)
        if self.max_keep_ckpts > 0:
            steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
            outdated, kept = steps[: -self.max_keep_ckpts], steps[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept)
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            # MMEngine's own Runner, which reads the file itself, does not resolve a path relative to the folder.
            last = self.last_ckpt if type(runner) is Runner else os.path.relpath(self.last_ckpt, runner.work_dir)
            with atomic_file(os.path.join(runner.work_dir, LAST), "w") as file:
                file.write(last)
            for old in outdated:
                Path(self.out_dir, self.filename_tmpl.format(old)).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self._resumed and self.save_best:
            self._find_best(runner, metrics, self._resumed)
            self._resumed = None
        super()._save_best_checkpoint(runner, metrics)  # ends with a checkpoint that records the new best one
        self.file_backend.clear(runner.message_hub.runtime_info.values())

    def _find_best(self, runner: Runner, metrics: dict, since: float) -> None:
        """Find the best checkpoints that are newer than the resumed one, which does not record them."""
        if "auto" in self.key_indicators:
            self._init_rule(self.rules, [next(iter(metrics))])
        hub = runner.message_hub
        for key in self.key_indicators:
            end = f"_{key}" if len(self.key_indicators) > 1 else ""
            for path in sorted(Path(self.out_dir).glob(f"best_{glob.escape(key.replace('/', '_'))}_*.pth")):
                score = load_checkpoint(path)["message_hub"]["runtime_info"].get(f"best_score{end}")
                known = hub.runtime_info.get(f"best_score{end}")
                if path.stat().st_mtime > since and (known is None or self.is_better_than[key](score, known)):
                    hub.update_info(f"best_score{end}", score)
                    hub.update_info(f"best_ckpt{end}", str(path))


def save_fit(
    path: str | os.PathLike[str], model: nn.Module, dataset_meta: Mapping[str, Any], facts: dict, report: FitReport
) -> None:
    """Write a model that :func:`disalign.fit` calibrated as the Runner writes it: tensors, the data set's metadata,
    and ours."""
    meta = {"dataset_meta": dict(dataset_meta), "disalign": facts | {"fit": report.record()}}
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with atomic_file(path) as file:
        torch.save({"meta": meta, "state_dict": state}, file)


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint to resume in a work folder: what ``last_checkpoint`` names, or else the newest whole one.

    The folder may have been moved since, and the last file may be incomplete.
    """
    folder = Path(work_dir)
    try:
        named = folder / (folder / LAST).read_text().partition("\0")[0].strip()
    except (OSError, UnicodeDecodeError):
        named = folder
    numbered = [*folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth")]
    found = [named, folder / named.name, *sorted(numbered, key=os.path.getmtime, reverse=True)]
    return next((str(path) for path in found if zipfile.is_zipfile(path)), None)
