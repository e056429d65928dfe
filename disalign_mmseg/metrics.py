"""The long-tail metric: IoU and accuracy of the classes, their means, and those of head, body and tail."""

import inspect
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from mmengine.logging import print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from disalign import InputError, group_means, head_body_tail, load_class_counts
from disalign.counts import ClassCounts, bundled
from disalign.errors import some
from disalign.io import read_json
from disalign.report import report, table

#: The paper's groups (Sec. 4.2): head above 1 % of all pixels, tail at most 0.1 %.
THRESHOLDS = {"head": 0.01, "tail": 0.001}
GROUPS = ("head", "body", "tail")


@METRICS.register_module()
class LongTailIoUMetric(IoUMetric):
    """mIoU, mean accuracy and overall accuracy, and the means of both over head, body and tail.

    The metrics are named ``mIoU``, ``mAcc``, ``aAcc``, ``mIoU.head``, ``mIoU.body``, ``mIoU.tail``, ``mAcc.head``, ...
    and are percentages. They differ from mmseg's in two ways. A class without a ground-truth pixel in the evaluation is
    left out of all means, where mmseg gives it an IoU of 0 if any pixel is predicted as it. And areas are whole
    numbers, where mmseg adds them up in float32, which loses pixels above 2**24. A group without an evaluated
    class is left out of the metrics, null in the JSON and n/a in the text.

    Args:
        class_counts: training pixels per class, anything :func:`disalign.load_class_counts` takes; default: those that
            a hook sets as ``metric.class_counts`` before the evaluation. Without counts there are no groups.
        groups: ``"ade20k"``, the official split of its 150 classes into 20, 55 and 75 by the printed pixel ratios,
            which needs no counts; or thresholds as shares of all pixels, ``dict(head=0.05, tail=0.01)``: head is above
            the first, tail at or below the second, body between them. Default: ``"ade20k"`` if ``class_counts`` is,
            else the paper's 0.01 and 0.001.
        total_pixels: pixels of the training set, including unlabelled ones, for the shares; default:
            ``"total_pixels"`` of the JSON file with the counts, or else the labelled ones, the sum of the counts.
        iou_metrics: ``"mIoU"``, ``"mDice"``, ``"mFscore"``; the figures of each are grouped in the same way.
        keep_results: set by ``mim test --out``; predictions in ``output_dir`` are always kept.
        collect_dir: see :class:`mmengine.evaluator.BaseMetric`.
        stock: other arguments of mmseg's ``IoUMetric`` (``ignore_index``, ``nan_to_num``, ``beta``, ``output_dir``,
            ``format_only``, ``collect_device``, ``prefix``).

    Raises:
        InputError: an unknown argument or figure; thresholds out of order; counts of another number of classes than the
            dataset has; labels or predictions out of range, of another size, or missing.
    """

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        groups: str | Mapping[str, float] | None = None,
        total_pixels: float | None = None,
        iou_metrics: Any = ("mIoU",),
        keep_results: bool = False,
        collect_dir: str | None = None,
        **stock: Any,
    ) -> None:
        if unknown := stock.keys() - (inspect.signature(IoUMetric).parameters.keys() - {"kwargs"}):
            # IoUMetric would swallow them.
            raise InputError(f"expected arguments of LongTailIoUMetric or mmseg's IoUMetric, got {some(unknown)}")
        if stock.get("format_only") and not stock.get("output_dir"):
            raise InputError("expected an output_dir with format_only, got none; give the folder for the predictions")
        figures = [iou_metrics] if isinstance(iou_metrics, str) else list(iou_metrics)
        if not figures or not set(figures) <= {"mIoU", "mDice", "mFscore"}:
            raise InputError(f"expected iou_metrics among mIoU, mDice, mFscore, got {some(figures) or 'none'}")
        super().__init__(iou_metrics=figures, **stock)
        self.collect_dir = collect_dir
        if groups is None:
            groups = "ade20k" if isinstance(class_counts, str) and class_counts == "ade20k" else THRESHOLDS
        if groups != "ade20k" and not _are_thresholds(groups):
            raise InputError(
                "expected groups 'ade20k', or dict(head=0.01, tail=0.001) with shares of all pixels, 0 <= tail <= head "
                f"< 1, got {groups!r}"
            )
        self.groups: Any = groups
        #: All pixels of the training set, or None: the labelled ones.
        self.total_pixels = _recorded_total(class_counts) if total_pixels is None else total_pixels
        self.class_counts = class_counts
        #: The last evaluation in full, ready for JSON, figures in percent; on the main process only.
        self.report: dict | None = None

    @property
    def class_counts(self) -> Tensor | None:
        """(K,) int64 training pixels per class, or None until they are set."""
        return self._class_counts

    @class_counts.setter
    def class_counts(self, class_counts: ClassCounts | None) -> None:
        self._class_counts = None if class_counts is None else load_class_counts(class_counts)
        self.members()  # refuses counts that do not fit

    @IoUMetric.dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict | None) -> None:
        self._dataset_meta = dataset_meta
        self.members()

    def take_counts(self, class_counts: ClassCounts, total_pixels: float | None) -> None:
        """Set a run's counts and total pixels in a metric whose config has none."""
        if self.class_counts is None:
            if self.total_pixels is None:
                self.total_pixels = total_pixels
            self.class_counts = class_counts

    def members(self) -> dict[str, Tensor] | None:
        """``{"head", "body", "tail"}`` -> (K,) bool, or None without class counts.

        Raises:
            InputError: another number of classes than the dataset's, or fewer pixels in all than labelled ones.
        """
        official = bundled("ade20k")["pixel_ratio"] if self.groups == "ade20k" else None
        classes = (self._dataset_meta or {}).get("classes")
        for what, values in (("class_counts", self.class_counts), ("groups='ade20k'", official)):
            if classes and values is not None and len(values) != len(classes):
                raise InputError(
                    f"expected the dataset's {len(classes)} classes in the metric's {what}, got {len(values)}; do they "
                    "belong to this dataset?"
                )
        if official:
            return head_body_tail(official)
        if self.class_counts is None:
            return None
        labelled = int(self.class_counts.sum())
        if self.total_pixels is not None and self.total_pixels < labelled:
            raise InputError(
                f"expected total_pixels to hold all {labelled} labelled pixels of class_counts, got "
                f"{self.total_pixels}; count both on the same set, in the same unit"
            )
        return head_body_tail(self.class_counts, **self.groups, total=self.total_pixels)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        for sample in () if self.format_only else data_samples:
            self.refuse_other_classes(sample)
        super().process(data_batch, data_samples)

    def refuse_other_classes(self, sample: Mapping) -> None:
        """Refuse a data sample, as a dict, without ground truth, of two sizes, or with classes out of range.

        Raises:
            InputError: names its file.
        """
        num_classes = len(self.dataset_meta["classes"])
        name = sample.get("seg_map_path") or sample.get("img_path")
        if "gt_sem_seg" not in sample:
            raise InputError(f"expected ground truth for {name}, got none; for a set without it, set format_only=True")
        predicted, label = (sample[key]["data"].squeeze() for key in ("pred_sem_seg", "gt_sem_seg"))
        if predicted.shape != label.shape:
            raise InputError(
                f"expected an annotation as large as its image, got {list(label.shape)} and {list(predicted.shape)} "
                f"for {name}; check that the two belong together"
            )
        for what, classes in (("labels", label[label != self.ignore_index]), ("predictions", predicted)):
            wrong = classes[(classes < 0) | (classes >= num_classes)]
            if len(wrong):
                raise InputError(
                    f"expected {what} of the dataset's {num_classes} classes, got class {int(wrong[0])} for {name}; do "
                    "the annotation and the model have these classes?"
                )

    @staticmethod
    def intersect_and_union(
        pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mmseg's four areas per class, each (K,) int64 on the CPU: intersection, union, prediction, label."""
        valid = label != ignore_index
        pred_label, label = pred_label[valid].long(), label[valid].long()
        intersection, predicted, labelled = (
            torch.bincount(pixels, minlength=num_classes).cpu()
            for pixels in (label[pred_label == label], pred_label, label)
        )
        return intersection, predicted + labelled - intersection, predicted, labelled

    def compute_metrics(self, results: list) -> dict[str, float]:
        if self.format_only:
            return super().compute_metrics(results)
        num_classes = len(self.dataset_meta["classes"])
        summed = [torch.stack(area).to(torch.float64).sum(0) for area in zip(*results, strict=True)]
        intersection, union, predicted, labelled = summed or torch.zeros(4, num_classes, dtype=torch.float64)
        # x / NaN: a class that is not in the ground truth has no figures.
        absent = labelled == 0
        areas = intersection, union.masked_fill(absent, math.nan), predicted.masked_fill(absent, math.nan), labelled
        if not absent.all():
            super().compute_metrics([areas])  # logs the table of all classes
        self.report = self._report(areas, len(results))
        print_log(f"{self.report['groups']['split']}\n{table(self.report)}", logger="current")
        figures = self.report["figures"]
        return {name: round(value, 2) for name, value in figures.items() if value is not None}

    def _report(self, areas, images: int) -> dict:
        stock = self.total_area_to_metrics(*areas, self.metrics, self.nan_to_num, self.beta)
        overall = 100 * float(stock.pop("aAcc"))
        values = {name: 100 * torch.from_numpy(fractions) for name, fractions in stock.items()}
        pixels, members = areas[-1].long(), self.members() or {}
        figures: dict[str, float | None] = {f"m{name}": float(column.nanmean()) for name, column in values.items()}
        figures["aAcc"] = overall
        for name, column in values.items():
            means = group_means(column, members)
            figures |= {f"m{name}.{group}": means.get(group) for group in GROUPS}
        return report(
            figures,
            per_class={
                "group": [next((group for group in members if members[group][j]), None) for j in range(len(pixels))],
                "pixels": pixels.tolist(),
                **{name: column.tolist() for name, column in values.items()},
            },
            images=images,
            groups={
                "split": self._split(),
                "classes": {group: int(chosen.sum()) for group, chosen in members.items()},
                "evaluated": {group: int((chosen & (pixels > 0)).sum()) for group, chosen in members.items()},
            },
            classes=list(self.dataset_meta["classes"]),
            class_counts=None if self.class_counts is None else self.class_counts.tolist(),
            total_pixels=self.total_pixels,
        )

    def _split(self) -> str:
        if self.groups == "ade20k":
            return "ADE20K's official split, 20 head, 55 body and 75 tail classes"
        if self.class_counts is None:
            return "no groups, since there are no class counts"
        return ", ".join(f"{group}: {text}" for group, text in self.groups_text().items())

    def groups_text(self) -> dict[str, str]:
        """A description of each group."""
        if self.groups == "ade20k":
            sizes = {"head": 20, "body": 55, "tail": 75}
            return {group: f"{size} classes of ADE20K's official split" for group, size in sizes.items()}
        pixels = "the labelled" if self.total_pixels is None else "all"
        head, tail = (f"{100 * self.groups[name]:g} %" for name in ("head", "tail"))
        return {
            "head": f"more than {head} of {pixels} training pixels",
            "tail": f"at most {tail}",
            "body": "between them",
        }


def _are_thresholds(groups: Any) -> bool:
    """Whether they are those of head and tail, as shares of all pixels."""
    with suppress(TypeError):  # no numbers
        return set(groups) == set(THRESHOLDS) and 0 <= groups["tail"] <= groups["head"] < 1
    return False


def _recorded_total(class_counts) -> int | None:
    """The total number of pixels that a file with counts records, if any."""
    path = os.fspath(class_counts) if isinstance(class_counts, (str, os.PathLike)) else ""
    if path.endswith(".txt"):
        return 10_000  # objectInfo150.txt prints shares of all pixels, with four decimals
    record = read_json(path, "class counts") if path.endswith(".json") else None
    return record.get("total_pixels") if isinstance(record, dict) else None
