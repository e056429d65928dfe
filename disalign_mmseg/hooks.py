"""Stage two's hook of a segmentation run: checks the data, and sets the class counts."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import nn

from disalign import InputError
from disalign_mmengine.checkpoints import metadata
from disalign_mmengine.models import unwrapped

from .annotations import guard
from .data_check import check_dataset
from .decode_heads import DisAlignHead
from .losses import GRWCrossEntropyLoss
from .metrics import LongTailIoUMetric
from .pixel_counts import class_counts_of, on_main_process
from .segmentors import DisAlignEncoderDecoder


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Checks the data before the first step, and passes the class counts to the loss, the metrics and the checkpoint.

    With ``class_counts="dataset"`` they are the training set's pixels, counted once and cached in the work folder. A
    checkpoint stores them, with the loss's ``metadata()``, under ``meta["disalign"]``.

    Raises:
        InputError: data that does not fit, see :func:`disalign_mmseg.data_check.dataset_problems`; or other counts than
            those of the resumed run.
    """

    # Before the hooks that train or read the model.
    priority = "HIGH"

    def __init__(self) -> None:
        self._kept: dict = {}

    def before_train(self, runner: Runner) -> None:
        head = calibrated_head(runner.model)
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            on_main_process(check_dataset, loop.dataloader.dataset, head.num_classes, head.ignore_index)
        if isinstance(head.loss_decode, GRWCrossEntropyLoss):
            self._resolve(runner, head)
        if runner.val_loop is not None:
            self._tell(runner, runner.val_loop)

    def before_val(self, runner: Runner) -> None:
        self._tell(runner, runner.val_loop)

    def before_test(self, runner: Runner) -> None:
        head = calibrated_head(runner.model)
        guard(runner.test_dataloader.dataset, head.num_classes, head.ignore_index)
        self._tell(runner, runner.test_loop)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._kept = metadata(checkpoint).get("disalign") or {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        loss = calibrated_head(runner.model).loss_decode
        if isinstance(loss, GRWCrossEntropyLoss):
            checkpoint["meta"]["disalign"] = loss.metadata() | {"total_pixels": self._kept.get("total_pixels")}

    def _resolve(self, runner: Runner, head: DisAlignHead) -> None:
        dataset, loss = runner.train_dataloader.dataset, head.loss_decode
        if loss.class_counts is None:
            record = on_main_process(class_counts_of, dataset, head.num_classes, head.ignore_index, runner.work_dir)
            loss.set_class_counts(record["train_counts"])
            self._kept["total_pixels"] = record["total_pixels"]
        if self._kept.get("class_counts") not in (None, loss.class_counts.tolist()):
            raise InputError(
                "expected the class counts that this run was started with, got others; start a new run, or restore the "
                "training set"
            )

    def _tell(self, runner: Runner, loop: Any) -> None:
        counts = getattr(calibrated_head(runner.model).loss_decode, "class_counts", None)
        counts = self._kept.get("class_counts") if counts is None else counts
        for metric in loop.evaluator.metrics:
            if counts is not None and isinstance(metric, LongTailIoUMetric):
                metric.take_counts(counts, self._kept.get("total_pixels"))


def calibrated_head(model: nn.Module) -> DisAlignHead:
    """A segmentor's calibrated head, through DDP's and test-time augmentation's wrappers."""
    model = unwrapped(model)
    if not isinstance(model, DisAlignEncoderDecoder):
        raise InputError(f"expected a segmentor with a calibrated head, got {type(model).__name__}")
    return model.calibrated_head
