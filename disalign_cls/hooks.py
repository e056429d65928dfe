"""Hooks of a classification run: class counts, one set of BatchNorm statistics, results."""

import os

from mmengine.dist import broadcast, master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from disalign import InputError, load_class_counts
from disalign.io import write_json
from disalign.stage_two import require_same_classes
from disalign_mmengine.checkpoints import class_names, metadata
from disalign_mmengine.models import unwrapped


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Passes the training set's class counts to the model and the metrics, and saves them in the checkpoint.

    They are stored under ``meta["disalign"]``, with the model's ``metadata()``. It also tells the model the epoch.
    """

    def __init__(self) -> None:
        self._classes: list[str] | None = None

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        dataset = runner.train_dataloader.dataset
        counts = dataset.class_counts
        if model.class_counts is not None and model.class_counts.tolist() != counts.tolist():
            raise InputError(
                f"expected the training set that this checkpoint was made with ({int(model.class_counts.sum())} images "
                f"of {len(model.class_counts)} classes), got {int(counts.sum())} of {len(counts)}; start a new run"
            )
        model.set_class_counts(counts)
        self._classes = dataset.metainfo["classes"]
        if runner.val_loop is not None:
            self._before_epoch(runner, "val")

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode == "train":
            unwrapped(runner.model).set_epoch(runner.epoch)
            return
        loop, model = getattr(runner, f"{mode}_loop"), unwrapped(runner.model)
        dataset = loop.dataloader.dataset
        require_same_classes(self._classes, dataset.metainfo["classes"], f"the {dataset.metainfo['split']} set")
        for metric in loop.evaluator.metrics:
            if metric.collect_dir is None and metric.collect_device == "cpu":
                # mmengine's default is below the current folder, which may be read-only, or differ between nodes.
                metric.collect_dir = os.path.join(runner.work_dir, ".collect")
            if getattr(metric, "class_counts", 0) is None:
                metric.class_counts = model.class_counts
            counts = getattr(metric, "class_counts", None)
            if counts is not None and len(counts) != model.num_classes:
                raise InputError(
                    f"expected one of the metric's class_counts for each of the model's {model.num_classes} classes, "
                    f"got {len(counts)}"
                )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        counts = (metadata(checkpoint).get("disalign") or {}).get("class_counts")
        if counts is not None:
            unwrapped(runner.model).set_class_counts(load_class_counts(counts))
        self._classes = class_names(checkpoint)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["meta"]["disalign"] = unwrapped(runner.model).metadata()


@HOOKS.register_module()
class BroadcastBuffersHook(Hook):
    """Evaluates on all ranks with rank 0's BatchNorm statistics, which the checkpoint stores.

    Each rank of a stage-one run has its own: stage one would print other figures than stage two finds for it.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        for buffer in runner.model.buffers():
            broadcast(buffer)


@HOOKS.register_module()
class ResultsHook(Hook):
    """Writes the last evaluation in full, per class, to ``results_{split}.json`` in the work folder."""

    @master_only
    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode == "train":
            return
        for metric in getattr(runner, f"{mode}_evaluator").metrics:
            report = getattr(metric, "report", None)
            if report:
                write_json(os.path.join(runner.work_dir, f"results_{report['split']}.json"), report)
