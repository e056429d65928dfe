"""Detectron2's LVIS evaluator, with figures computed by faster-coco-eval."""

import json
import math
import os
from typing import Any

from detectron2.evaluation import LVISEvaluator

from disalign.io import atomic_file, write_json

from .lvis_metrics import ImageCounts, evaluation_reports, table


class DisAlignLVISEvaluator(LVISEvaluator):
    """Boxes and masks by :func:`disalign_d2.lvis_metrics.evaluate_lvis`; lvis-api only reads the annotations.

    Writes to ``output_dir`` all detections as ``lvis_instances_results.json``, for ``python -m disalign_d2.evaluate``,
    and that command's output as ``lvis_results.json``. For Detectron2 a figure without ground truth is NaN.

    Args:
        args, stock: the arguments of ``LVISEvaluator``. Without ``tasks`` a model that detects nothing at all is
            evaluated for boxes only; ``max_dets_per_image`` is LVIS's 300 by default.
        fixed_ap: also the fixed AP; the model should give it more than 300 detections per image.
        image_counts: see :func:`disalign_d2.lvis_metrics.evaluate_lvis`; a function is called only if needed.
    """

    def __init__(self, *args: Any, fixed_ap: bool = False, image_counts: ImageCounts = None, **stock: Any) -> None:
        super().__init__(*args, **stock)
        self._fixed_ap = fixed_ap
        self._image_counts = image_counts

    def _eval_predictions(self, predictions):
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        # LVIS itself has no mapping: its ids count from 1 without gaps.
        to_id = {label: id_ for id_, label in ids.items()}.get if ids else (lambda label: label + 1)
        found = [detection for prediction in predictions for detection in prediction["instances"]]
        detections = [dict(detection, category_id=to_id(detection["category_id"])) for detection in found]
        if self._output_dir:
            with atomic_file(os.path.join(self._output_dir, "lvis_instances_results.json"), "w") as file:
                file.write(json.dumps(detections))
        if not self._do_evaluation:
            self._logger.info("The annotation file holds no annotations: nothing to evaluate against.")
            return
        tasks = sorted(self._tasks or self._tasks_from_predictions(detections))
        max_dets = 300 if self._max_dets_per_image is None else self._max_dets_per_image
        self._logger.info("Evaluating %d detections: %s", len(detections), ", ".join(tasks))
        ground_truth = self._lvis_api.dataset
        reports = evaluation_reports(ground_truth, detections, tasks, max_dets, self._fixed_ap, self._image_counts)
        if self._output_dir:
            write_json(os.path.join(self._output_dir, "lvis_results.json"), reports)
        self._logger.info("Evaluation results:\n%s", table(reports))
        for task, report in reports.items():
            figures = report["figures"].items()
            self._results[task] = {name: math.nan if value is None else value for name, value in figures}
