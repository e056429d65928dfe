"""The long-tail metric: average, groups, per class; stage two beside stage one."""

from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS

from disalign import group_means, load_class_counts, many_medium_few
from disalign.counts import ClassCounts
from disalign.report import report, table

COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "balanced": "per-class mean",
    "f1": "macro F1",
    "many": "many",
    "medium": "medium",
    "few": "few",
}


@METRICS.register_module()
class LongTailAccuracy(BaseMetric):
    """Top-1, top-5, class-balanced mean, macro F1, and many/medium/few means of the per-class accuracy.

    All in percent, and named after the evaluated split (``test/top1``). A group without an evaluated class is left
    out of the metrics, null in the JSON and n/a in the table. A stage-two model reports stage one's figures beside its
    own: the trunk is frozen, so both come from one pass.

    Args:
        class_counts: training counts, anything :func:`disalign.load_class_counts` takes; default: the training set's,
            or those stored in the checkpoint.
        many, few: thresholds of the groups (training images).
        stage_one: report stage one's figures too.
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        many: float = 100,
        few: float = 20,
        stage_one: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.class_counts = None if class_counts is None else load_class_counts(class_counts)
        many_medium_few([0], many, few)  # refuse bad thresholds before the first evaluation
        self.many, self.few = many, few
        self.stage_one = stage_one
        #: The last evaluation in full, ready for JSON.
        self.report: dict | None = None

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend({name: value.numpy() for name, value in sample.items()} for sample in data_samples)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        meta = self.dataset_meta or {}
        self.prefix = meta.get("split", "val")
        found = {name: np.stack([result[name] for result in results]) for name in results[0]}
        figures, per_class = self._figures(found["label"], found["top"])
        before = before_per_class = None
        if self.stage_one and "stage_one" in found:
            before, before_per_class = self._figures(found["label"], found["stage_one"])
        self.report = report(
            figures,
            before,
            per_class=per_class,
            stage_one_per_class=before_per_class,
            dataset=meta.get("dataset"),
            split=self.prefix,
            images=len(results),
            groups={"many": f"> {self.many} training images", "few": f"< {self.few}"},
            classes=meta.get("classes"),
            class_counts=None if self.class_counts is None else self.class_counts.tolist(),
        )
        title = f"{meta.get('dataset') or 'dataset'} {self.prefix}, {len(results)} images, accuracy"
        print_log(f"{title}\n{table(self.report, COLUMNS)}", logger="current")
        own = {name: value for name, value in figures.items() if value is not None}
        return own | {f"stage_one_{name}": before[name] for name in own if before}

    def _figures(self, labels: np.ndarray, top: np.ndarray) -> tuple[dict, dict]:
        num_classes = len(self.class_counts) if self.class_counts is not None else int(max(labels.max(), top.max())) + 1
        best = top[:, 0]
        hits, seen, predicted = (
            np.bincount(chosen, minlength=num_classes) for chosen in (labels[best == labels], labels, best)
        )
        seen = np.where(seen > 0, seen, np.nan)  # only evaluated classes count
        accuracy = 100 * hits / seen
        f1 = 200 * hits / (seen + predicted)  # 2 TP / (images + predictions)
        groups = dict.fromkeys(("many", "medium", "few"))
        if self.class_counts is not None:
            groups = group_means(accuracy.tolist(), many_medium_few(self.class_counts, self.many, self.few))
        figures = {
            "top1": 100 * float(hits.sum() / len(labels)),
            "top5": 100 * float((top == labels[:, None]).any(1).mean()),
            "balanced": float(np.nanmean(accuracy)),
            "f1": float(np.nanmean(f1)),
            **groups,
        }
        return figures, {"accuracy": accuracy.tolist()}
