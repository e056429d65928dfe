"""Stage one beside stage two: the same model, the same images, with and without its calibration."""

import copy
import os
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner, TestLoop, autocast
from mmseg.models import SegTTAModel
from mmseg.registry import HOOKS

from disalign import at_identity
from disalign.io import write_json
from disalign.report import table
from disalign.stage_two import calibrations

from .metrics import LongTailIoUMetric


def reporting_metric(loop: Any) -> Any:
    """The loop's metric that keeps a report (a :class:`LongTailIoUMetric`), or None."""
    metrics = (metric for metric in loop.evaluator.metrics if isinstance(metric, LongTailIoUMetric))
    return next((metric for metric in metrics if not metric.format_only), None)


def evaluate(runner: Runner, loop: Any) -> dict | None:
    """Evaluate the model again on a validation or test loop's images; returns the report, on the main process.

    It calls no hooks, writes no predictions, and leaves the loop's own metrics unchanged.
    """
    metric = copy.copy(reporting_metric(loop))
    metric.results, metric.report = [], None
    metric.output_dir = None  # holds the predictions of the regular evaluation
    evaluator = Evaluator(metric)
    # Only test_step supports test-time augmentation.
    step = runner.model.test_step if isinstance(loop, TestLoop) else runner.model.val_step
    runner.model.eval()
    with torch.no_grad():
        for number, batch in enumerate(loop.dataloader, 1):
            with autocast(enabled=loop.fp16):
                samples = step(batch)
            evaluator.process(data_samples=samples, data_batch=batch)
            if number % 50 == 0:
                runner.logger.info(f"evaluated {number} of {len(loop.dataloader)} batches")
        evaluator.evaluate(len(loop.dataloader.dataset))
    return metric.report


@HOOKS.register_module()
class ComparisonHook(Hook):
    """Prints stage one's figures beside stage two's after training and after testing, and writes both.

    Stage two at the identity is stage one bit for bit, so the same model is evaluated with magnitude 1 and margin 0 on
    the same images. ``results_val.json`` in the work folder (``results_test.json``, ``results_test_tta.json``) is then
    the report of :class:`LongTailIoUMetric` with stage one's figures beside it. For a stage-one model these are its own
    figures only; without such a metric the hook does nothing.

    Args:
        stage_one: evaluate stage one too, which takes a second pass over the images.
    """

    # After the checkpoint is saved: the pass over the images may be long.
    priority = "LOWEST"

    def __init__(self, stage_one: bool = True) -> None:
        self.stage_one = stage_one
        self._validated_at: int | None = None

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._validated_at = runner.iter

    def after_train(self, runner: Runner) -> None:
        if runner.val_loop is not None:
            self._compare(runner, runner.val_loop, "val", evaluated=self._validated_at == runner.iter)

    def after_test(self, runner: Runner) -> None:
        self._compare(runner, runner.test_loop, "test", evaluated=True)

    def _compare(self, runner, loop, split: str, evaluated: bool) -> None:
        metric = reporting_metric(loop)
        if metric is None:
            return
        # All processes know which passes to make, only the main one has the reports.
        after = metric.report if evaluated else evaluate(runner, loop)
        before = None
        if self.stage_one and calibrations(runner.model):
            runner.logger.info("evaluating stage one, which is stage two at the identity, on the same images")
            with at_identity(runner.model):
                before = evaluate(runner, loop)
        if not is_main_process() or after is None:
            return
        augmented = any(isinstance(module, SegTTAModel) for module in runner.model.modules())
        results = {
            "dataset": type(loop.dataloader.dataset).__name__,
            "split": split,
            "tta": augmented,
            "checkpoint": runner.cfg.get("load_from") if split == "test" else None,
            **after,
        }
        if before is not None:
            results["stage_one"] = {name: before[name] for name in ("figures", "per_class")}
            runner.logger.info(f"{split}, {after['images']} images, before and after\n{table(results)}")
        path = os.path.join(runner.work_dir, f"results_{split}{'_tta' if augmented else ''}.json")
        write_json(path, results)
        runner.logger.info(f"all figures, per class too, are in {path}")
