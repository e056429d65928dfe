"""What stage two adds to a segmentation run: checked data and class counts."""

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import nn

from disalign import InputError, load_class_counts
from disalign_mmengine.checkpoints import metadata
from disalign_mmengine.models import unwrapped

from .annotations import guard
from .data_check import check_dataset
from .decode_heads import DisAlignHead
from .losses import GRWCrossEntropyLoss
from .pixel_counts import class_counts_of, on_main_process
from .segmentors import FrozenSegmentor


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Checks the data before the first step, and takes the class counts to the loss, the metrics and the checkpoint.

    Counts that the config does not name (``class_counts="dataset"``) are the training set's pixels, counted once and
    kept in the work folder. A checkpoint keeps them, with what the loss's ``metadata()`` says, under
    ``meta["disalign"]``.

    Raises:
        InputError: data that does not fit, see :func:`disalign_mmseg.data_check.check_dataset`; counts of another
            number of classes than the model's, or others than those of the resumed run.
    """

    # Before the hooks that train or look at the model.
    priority = "HIGH"

    def __init__(self) -> None:
        self._kept: dict = {}
        self._total_pixels: int | None = None

    def before_train(self, runner: Runner) -> None:
        head = calibrated_head(runner.model)
        datasets = [runner.train_dataloader.dataset]
        if runner.val_loop is not None:
            datasets.append(runner.val_dataloader.dataset)
        for dataset in datasets:
            on_main_process(check_dataset, dataset, head.num_classes, head.ignore_index)
        loss = head.loss_decode
        if isinstance(loss, GRWCrossEntropyLoss):
            self._resolve(runner, head, loss)
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
        self._total_pixels = self._kept.get("total_pixels")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        loss = calibrated_head(runner.model).loss_decode
        if isinstance(loss, GRWCrossEntropyLoss):
            checkpoint["meta"]["disalign"] = loss.metadata() | {"total_pixels": self._total_pixels}

    def _resolve(self, runner, head: DisAlignHead, loss: GRWCrossEntropyLoss) -> None:
        if loss.class_counts is None:
            dataset = runner.train_dataloader.dataset
            record = class_counts_of(
                dataset, head.num_classes, head.ignore_index, runner.work_dir, accept=loss.set_class_counts
            )
            self._total_pixels = record["total_pixels"]
            loss.set_class_counts(record["train_counts"])
        counts = loss.metadata()["class_counts"]
        if len(counts) != head.num_classes:
            raise InputError(
                f"expected one of the loss's class_counts for each of the model's {head.num_classes} classes, got "
                f"{len(counts)}; do they belong to this dataset?"
            )
        if self._kept.get("class_counts") not in (None, counts):
            raise InputError(
                "expected the class counts that this run was started with, got others; start a new run, or restore the "
                "training set"
            )

    def _tell(self, runner, loop) -> None:
        loss = calibrated_head(runner.model).loss_decode
        counts = getattr(loss, "class_counts", None)
        if counts is None and self._kept.get("class_counts"):
            counts = load_class_counts(self._kept["class_counts"])
        for metric in loop.evaluator.metrics:
            if counts is not None and getattr(metric, "class_counts", 0) is None:
                if metric.total_pixels is None:
                    metric.total_pixels = self._total_pixels
                metric.class_counts = counts


def calibrated_head(model: nn.Module) -> DisAlignHead:
    """A segmentor's calibrated head, through DDP's and test-time augmentation's wrappers.

    Raises:
        InputError: none is calibrated.
    """
    model = unwrapped(model)
    if not isinstance(model, FrozenSegmentor):
        raise InputError(f"expected a segmentor with a calibrated head, got {type(model).__name__}")
    return model.calibrated_head
