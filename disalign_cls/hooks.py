"""What stage two adds to a classification run: counts, the strict hand-over, results."""

import hashlib
import os

from mmengine.dist import broadcast, master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from disalign import InputError, load_class_counts, load_file, load_stage_one
from disalign.errors import some
from disalign.hand_over import require_tensors, state_dict_of
from disalign.io import write_json
from disalign_mmengine.checkpoints import metadata
from disalign_mmengine.hooks import FrozenHook, unwrapped

from .classifiers import DisAlignClassifier
from .datasets import require_same_classes


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Takes the class counts from the training set to the model and the metrics, and keeps them in the checkpoint.

    They lie, with what the model's ``metadata()`` says, under ``meta["disalign"]``.
    """

    def __init__(self) -> None:
        self._classes = None

    def before_train(self, runner) -> None:
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
            self._tell(runner, runner.val_loop)

    def before_val(self, runner) -> None:
        self._tell(runner, runner.val_loop)

    def before_test(self, runner) -> None:
        self._tell(runner, runner.test_loop)

    def _tell(self, runner, loop) -> None:
        model = unwrapped(runner.model)
        dataset = loop.dataloader.dataset
        require_same_classes(self._classes, dataset)
        for metric in loop.evaluator.metrics:
            if metric.collect_dir is None and metric.collect_device == "cpu":
                # mmengine's default is below the current folder, which may be read-only, or another on each node.
                metric.collect_dir = os.path.join(runner.work_dir, ".collect")
            if getattr(metric, "class_counts", 0) is None:
                metric.class_counts = model.class_counts
            counts = getattr(metric, "class_counts", None)
            if counts is not None and len(counts) != model.num_classes:
                raise InputError(
                    f"expected one of the metric's class_counts for each of the model's {model.num_classes} classes, "
                    f"got {len(counts)}"
                )

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        meta = metadata(checkpoint)
        counts = (meta.get("disalign") or {}).get("class_counts")
        if counts is not None:
            unwrapped(runner.model).set_class_counts(load_class_counts(counts))
        self._classes = (meta.get("dataset_meta") or {}).get("classes")

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        checkpoint["meta"]["disalign"] = unwrapped(runner.model).metadata()


@HOOKS.register_module()
class WholeCheckpointHook(Hook):
    """Takes back only whole checkpoints of this very model; mmengine would load what fits and warn."""

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        model = unwrapped(runner.model).state_dict()
        try:
            require_tensors(
                state_dict_of(checkpoint), model, "tensors of the config's model", where=" in the checkpoint"
            )
        except InputError as error:
            hint = "a stage-one file belongs into stage_one=..., and a resumed run into its own work_dir"
            raise InputError(f"{error} ({hint})") from None


@HOOKS.register_module()
class StageOneHook(FrozenHook):
    """Starts stage two from ``stage_one`` of the config, strictly, and proves at the end that it was only calibrated.

    A resumed run starts from its own checkpoint instead; a stage-one run has nothing to hand over.
    """

    priority = "HIGH"

    def before_train(self, runner) -> None:
        model = unwrapped(runner.model)
        if not isinstance(model, DisAlignClassifier):
            return
        if runner.iter == 0:
            self._hand_over(runner, model)
        super().before_train(runner)

    def _hand_over(self, runner, model) -> None:
        stage_one = runner.cfg.get("stage_one")
        if runner.cfg.get("load_from"):
            raise InputError(
                "expected stage two to start from stage_one=FILE, got load_from; use stage_one or --resume"
            )
        if not stage_one:
            raise InputError("expected the stage-one checkpoint, got none; give it: --cfg-options stage_one=FILE")
        folder, name = os.path.split(os.path.realpath(stage_one))
        if folder == os.path.realpath(runner.work_dir) and name.startswith(("epoch_", "iter_", "best_")):
            raise InputError(
                f"expected a work folder of stage two's own, got stage one's, {runner.work_dir!r}, whose checkpoints "
                "have the same names; give another --work-dir"
            )
        meta = metadata(load_file(stage_one))
        theirs, ours = (meta.get("dataset_meta") or {}), runner.train_dataloader.dataset
        if theirs.get("classes") and ours.metainfo["classes"] and theirs["classes"] != ours.metainfo["classes"]:
            raise InputError(
                f"expected a stage one of the training set's classes, but {os.fspath(stage_one)!r} was trained with "
                f"others, or in another order ({some(theirs['classes'], 3)})"
            )
        counts = (meta.get("disalign") or {}).get("class_counts")
        if counts and counts != ours.class_counts.tolist():
            runner.logger.warning(
                f"stage one saw another training set ({sum(counts)} images, here {int(ours.class_counts.sum())}); make "
                "sure that none of its images is evaluated"
            )
        report = load_stage_one(model, stage_one, new=model.freeze_report.trainable)
        runner.logger.info(f"{os.path.basename(stage_one)} (sha256 {_sha256(stage_one)[:12]}): {report}")


@HOOKS.register_module()
class BroadcastBuffersHook(Hook):
    """Evaluates all ranks with rank 0's BatchNorm statistics, those that the checkpoint keeps.

    Each rank of a stage-one run has its own, and stage two would meet other figures than stage one printed.
    """

    def before_val_epoch(self, runner) -> None:
        for buffer in runner.model.buffers():
            broadcast(buffer)


@HOOKS.register_module()
class ResultsHook(Hook):
    """Writes the last evaluation in full, per class, to ``results_{split}.json`` in the work folder."""

    def after_val_epoch(self, runner, metrics=None) -> None:
        self._write(runner, runner.val_evaluator)

    def after_test_epoch(self, runner, metrics=None) -> None:
        self._write(runner, runner.test_evaluator)

    @master_only
    def _write(self, runner, evaluator) -> None:
        for metric in evaluator.metrics:
            report = getattr(metric, "report", None)
            if report:
                write_json(os.path.join(runner.work_dir, f"results_{report['split']}.json"), report)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
