"""The long tail's metric: IoU and accuracy of the classes, their means, and those of head, body and tail."""

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from disalign import InputError, group_means, head_body_tail, load_class_counts
from disalign.counts import ClassCounts, bundled
from disalign.errors import some
from disalign.functional import check_labels
from disalign.io import read_json
from disalign.report import report, shown, text_table

#: The paper's groups (Sec. 4.2): head above 1 % of all pixels, tail at most 0.1 %.
THRESHOLDS = {"head": 0.01, "tail": 0.001}
GROUPS = ("head", "body", "tail")


@METRICS.register_module()
class LongTailIoUMetric(IoUMetric):
    """mIoU, mean accuracy and overall accuracy, and the means of both over head, body and tail.

    The metrics are named ``mIoU``, ``mAcc``, ``aAcc``, ``mIoU.head``, ``mIoU.body``, ``mIoU.tail``, ``mAcc.head``, ...
    and are percentages. They differ from mmseg's in two ways. A class without a ground-truth pixel in the evaluation is
    not available: it counts in no mean, where mmseg gives it an IoU of 0 once a pixel is predicted as it. And areas are
    whole numbers, where mmseg adds them up in float32, which loses pixels above 2**24. A group without an evaluated
    class is left out of the metrics, null in the JSON and n/a in the text.

    Args:
        class_counts: training pixels per class, anything :func:`disalign.load_class_counts` takes; default: those that
            a hook sets as ``metric.class_counts`` before the evaluation. Without any there are no groups.
        groups: ``"ade20k"``, the official split of its 150 classes into 20, 55 and 75 by the printed pixel ratios,
            which needs no counts; or thresholds as shares of all pixels, ``dict(head=0.05, tail=0.01)``: head is above
            the one, tail at or below the other, body between them. Default: ``"ade20k"`` if ``class_counts`` is, else
            the paper's 0.01 and 0.001.
        total_pixels: all pixels of the training set, unlabelled ones too, that the shares are of; default:
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
        known = inspect.signature(IoUMetric).parameters.keys() - {"kwargs"}
        if stock.keys() - known:  # IoUMetric would swallow them
            ours = ("class_counts", "groups", "total_pixels", "keep_results", "collect_dir", *known)
            raise InputError(
                f"expected arguments of LongTailIoUMetric among {some(sorted(ours), len(ours))}, got "
                f"{some(stock.keys() - known)}"
            )
        if stock.get("format_only") and not stock.get("output_dir"):
            raise InputError("expected an output_dir with format_only, got none; give the folder for the predictions")
        super().__init__(iou_metrics=_checked_figures(iou_metrics), **stock)
        self.collect_dir = collect_dir
        if groups is None:
            groups = "ade20k" if isinstance(class_counts, str) and class_counts == "ade20k" else THRESHOLDS
        self.groups = _checked_groups(groups)
        #: All pixels of the training set, or None: the labelled ones.
        self.total_pixels = _recorded_total(class_counts) if total_pixels is None else total_pixels
        self.class_counts = class_counts
        #: The last evaluation in full, ready for JSON, figures in percent; on the main process only.
        self.report: dict | None = None

    @property
    def class_counts(self) -> torch.Tensor | None:
        """(K,) int64 training pixels per class, or None until they are set."""
        return self._class_counts

    @class_counts.setter
    def class_counts(self, class_counts: ClassCounts | None) -> None:
        self._class_counts = None if class_counts is None else load_class_counts(class_counts)
        self._refuse_other_classes()
        self.members()  # refuses a total that is too small

    @property
    def dataset_meta(self) -> dict | None:
        """Of the evaluated dataset; its ``"classes"`` must be as many as the counts."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict | None) -> None:
        self._dataset_meta = dataset_meta
        self._refuse_other_classes()

    def _class_names(self) -> list[str]:
        return list((self._dataset_meta or {})["classes"])

    def _refuse_other_classes(self) -> None:
        classes = (self._dataset_meta or {}).get("classes")
        if classes is None:
            return
        if self.class_counts is not None and len(self.class_counts) != len(classes):
            raise InputError(
                f"expected one of the metric's class_counts for each of the dataset's {len(classes)} classes, got "
                f"{len(self.class_counts)}; do the counts belong to this dataset?"
            )
        if self.groups == "ade20k" and len(classes) != len(_ade20k_ratios()):
            raise InputError(
                f"expected ADE20K's {len(_ade20k_ratios())} classes for groups='ade20k', got a dataset of "
                f"{len(classes)}; give thresholds, groups=dict(head=0.01, tail=0.001)"
            )

    def members(self) -> dict[str, torch.Tensor] | None:
        """``{"head", "body", "tail"}`` -> (K,) bool, or None without class counts.

        Raises:
            InputError: fewer pixels in all than labelled ones.
        """
        if self.groups == "ade20k":
            return head_body_tail(_ade20k_ratios())
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
        if not self.format_only:
            for sample in data_samples:
                self._refuse_other_labels(sample)
        super().process(data_batch, data_samples)

    def _refuse_other_labels(self, sample: Mapping) -> None:
        num_classes = len(self._class_names())
        name = sample.get("seg_map_path") or sample.get("img_path") or "an image"
        if "gt_sem_seg" not in sample:
            raise InputError(f"expected ground truth for {name}, got none; for a set without it, set format_only=True")
        predicted, label = (sample[key]["data"].squeeze() for key in ("pred_sem_seg", "gt_sem_seg"))
        if predicted.shape != label.shape:
            raise InputError(
                f"expected an annotation as large as its image, got {list(label.shape)} and {list(predicted.shape)} "
                f"for {name}; check that the two belong together"
            )
        try:
            check_labels(label.cpu(), num_classes, self.ignore_index)
        except InputError as error:
            raise InputError(f"{error} ({name})") from None
        if predicted.numel() and not 0 <= predicted.min() <= predicted.max() < num_classes:
            raise InputError(
                f"expected predictions of the dataset's {num_classes} classes, got class {int(predicted.max())} for "
                f"{name}; is the model built for another number of classes?"
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
        num_classes = len(self._class_names())
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
        pixels = areas[-1].long()
        members = self.members() or {}
        figures: dict[str, float | None] = {"aAcc": overall}
        for name, of_classes in values.items():
            figures |= group_means(of_classes, {f"m{name}": torch.ones(len(pixels), dtype=torch.bool)})
            means = group_means(of_classes, members)
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
            classes=self._class_names(),
            class_counts=None if self.class_counts is None else self.class_counts.tolist(),
            total_pixels=self.total_pixels,
        )

    def _split(self) -> str:
        if self.groups == "ade20k":
            return "ADE20K's official split, 20 head, 55 body and 75 tail classes"
        if self.class_counts is None:
            return "no groups, for want of class counts"
        pixels = "the labelled" if self.total_pixels is None else "all"
        head, tail = (f"{100 * self.groups[name]:g} %" for name in ("head", "tail"))
        return f"head: more than {head} of {pixels} training pixels, tail: at most {tail}, body: between them"


def table(content: dict) -> str:
    """A report's means, in percent: a row for all classes and one for each group."""
    figures, groups = content["figures"], content["groups"]
    means = [name for name in figures if name.startswith("m") and "." not in name]
    evaluated = sum(pixels > 0 for pixels in content["per_class"]["pixels"])
    rows = [["percent", "classes", "evaluated", *means, "aAcc"]]
    rows.append(["all", len(content["classes"]), evaluated, *(shown(figures[name]) for name in (*means, "aAcc"))])
    for group in groups["classes"]:
        sizes = groups["classes"][group], groups["evaluated"][group]
        rows.append([group, *sizes, *(shown(figures[f"{name}.{group}"]) for name in means), ""])
    return text_table(rows)


def _ade20k_ratios() -> list[float]:
    return bundled("ade20k")["pixel_ratio"]


def _checked_figures(names) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    known = ("mIoU", "mDice", "mFscore")
    if not names or not set(names) <= set(known):
        raise InputError(f"expected iou_metrics among {some(known)}, got {some(names) or 'none'}")
    return names


def _checked_groups(groups):
    if isinstance(groups, str) and groups == "ade20k":
        return groups
    if not isinstance(groups, Mapping) or set(groups) != set(THRESHOLDS):
        raise InputError(f"expected groups 'ade20k' or dict(head=0.01, tail=0.001), got {groups!r}")
    head, tail = groups["head"], groups["tail"]
    if not all(isinstance(share, (int, float)) for share in (head, tail)) or not 0 <= tail <= head < 1:
        raise InputError(
            f"expected the thresholds of head and tail as shares of all pixels, 0 <= tail <= head < 1, got "
            f"head={head!r} and tail={tail!r}"
        )
    return {"head": head, "tail": tail}


def _recorded_total(class_counts) -> int | None:
    """All pixels of the set that a file counts, if it says."""
    if not isinstance(class_counts, (str, os.PathLike)):
        return None
    path = os.fspath(class_counts)
    if path.endswith(".txt"):
        return 10_000  # objectInfo150.txt prints shares of all pixels, with four decimals
    record = read_json(path, "class counts") if path.endswith(".json") else None
    return record.get("total_pixels") if isinstance(record, dict) else None
