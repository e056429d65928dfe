"""Train or evaluate, with the arguments of Detectron2's own train_net.py:

    python -m disalign_d2.train_net --config-file d2/lvis_v1/NAME.yaml [--num-gpus N] [--num-machines M]
        [--resume] [--eval-only] [--data-check] [KEY VALUE ...]

The config is a file, or the name of a shipped one below configs/. Stage two takes its stage one as MODEL.WEIGHTS.
"""

import argparse
import functools
import logging
import operator
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, defaults, hooks, launch
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.utils.data import DataLoader

from disalign import InputError, at_identity
from disalign.cli import command, config_errors, find_config, sentence_of
from disalign.errors import first_line, input_errors
from disalign.io import locked_folder, require_folder, write_json
from disalign.stage_two import keep_magnitude_from_decay, require_finite_settings, require_own_folder

from . import comparison
from .checkpoint import DisAlignCheckpointer
from .class_counts import training_image_counts
from .config import add_disalign_config
from .data_check import check_data, require_data
from .datasets import CheckedMapper, register_from_config
from .freezing import build_model
from .hooks import StageTwoHook
from .lvis_evaluation import DisAlignLVISEvaluator

logger = logging.getLogger("disalign_d2")


@contextmanager
def ddp_without_device_ids() -> Iterator[None]:
    """Context in which Detectron2 wraps a model on the CPU, for which it has no option."""
    stock = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(stock, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = stock


class Trainer(DefaultTrainer):
    """Detectron2's trainer: stage one, or with ``MODEL.DISALIGN.CALIBRATE`` stage two."""

    def __init__(self, cfg: CfgNode) -> None:
        with ddp_without_device_ids() if cfg.MODEL.DEVICE == "cpu" else nullcontext():
            super().__init__(cfg)

    build_model = staticmethod(build_model)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        require_finite_settings(optimizer)
        keep_magnitude_from_decay(optimizer, model)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=CheckedMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(cfg, dataset_name, mapper=CheckedMapper(cfg, False))

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None, max_dets: int | None = None
    ) -> DatasetEvaluator:
        """As in Detectron2; ``max_dets``: detections per image that LVIS's AP counts, 300 by default."""
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:  # their files have the same names
            output_folder = os.path.join(output_folder, dataset_name)
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind == "lvis":
            return DisAlignLVISEvaluator(
                dataset_name,
                tasks=("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
                output_dir=output_folder,
                max_dets_per_image=max_dets,
                fixed_ap=cfg.TEST.FIXED_AP,
                image_counts=functools.partial(training_image_counts, cfg),
            )
        if kind == "coco":
            return COCOEvaluator(dataset_name, output_dir=output_folder)
        raise InputError(
            f"expected LVIS or COCO format in DATASETS.TEST, got {dataset_name!r} of type {kind!r}; use DATASETS.OWN"
        )

    @classmethod
    def _evaluators(cls, cfg, folder):
        return [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]

    def build_hooks(self) -> list:
        # Before the hooks are built, since the one that saves keeps a reference to it.
        self.checkpointer = DisAlignCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, training=True, trainer=weakref.proxy(self)
        )
        stage_two = [StageTwoHook()] if self.cfg.MODEL.DISALIGN.CALIBRATE else []
        return [*stage_two, *super().build_hooks()]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        results = super().test(cfg, model, evaluators)
        if evaluators is None and cfg.MODEL.DISALIGN.CALIBRATE and cfg.DATASETS.TEST:
            stage_one = cls.test_stage_one(cfg, model) if cfg.MODEL.DISALIGN.EVAL_STAGE_ONE else None
            if comm.is_main_process():
                content = comparison.reports(cfg, results, stage_one)
                write_json(os.path.join(cfg.OUTPUT_DIR, "results.json"), content)
                if stage_one is not None:
                    logger.info(f"\n{comparison.tables(content)}")
        return results

    @classmethod
    def test_stage_one(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Stage one's figures, from an evaluation or, for the same weights and data, from an earlier one."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", "stage_one")
        path = os.path.join(folder, "results.json")
        key = comparison.stage_one_key(cfg, model)
        # All ranks follow the first one, whose files they may not see.
        stage_one = comm.all_gather(comparison.load_stage_one_results(path, key))[0]
        if stage_one is None:
            logger.info("Evaluating stage one (the calibration at its identity) for comparison")
            with at_identity(model):
                stage_one = super().test(cfg, model, cls._evaluators(cfg, folder))
            if comm.is_main_process():
                comparison.save_stage_one_results(path, key, stage_one)
        return stage_one

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation (``TEST.AUG``)."""
        logger.info("Evaluating with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), cls._evaluators(cfg, folder))
        return {f"{task}_TTA": figures for task, figures in results.items()}


def setup(args: argparse.Namespace) -> CfgNode:
    """The config that the arguments name, checked in itself and for this machine, with its datasets registered."""
    cfg = get_cfg()
    add_disalign_config(cfg)
    args.config_file = find_config(args.config_file)
    try:
        cfg.merge_from_file(args.config_file, allow_unsafe=False)  # otherwise YAML may call any function
        cfg.merge_from_list(args.opts)
    except Exception as error:  # yacs and yaml may raise anything
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error) or type(error).__name__
        raise InputError(
            f"expected settings of Detectron2 and DisAlign, but: {' '.join(reason.split())}; a float needs its "
            "point (1.0), and every KEY its VALUE"
        ) from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    try:
        torch.empty(0, device=cfg.MODEL.DEVICE)
    except Exception as error:  # each backend has its own
        raise InputError(
            f"expected a device that torch has here as MODEL.DEVICE, got {cfg.MODEL.DEVICE!r}: {first_line(error)}"
        ) from None
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES < 1:
        raise InputError(f"expected 1 or more as MODEL.ROI_HEADS.NUM_CLASSES, got {cfg.MODEL.ROI_HEADS.NUM_CLASSES}")
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise InputError(f"expected 1 or more as SOLVER.CHECKPOINT_PERIOD, got {cfg.SOLVER.CHECKPOINT_PERIOD}")
    if cfg.TEST.FIXED_AP and 0 <= cfg.TEST.DETECTIONS_PER_IMAGE <= 300:
        raise InputError(
            "expected TEST.DETECTIONS_PER_IMAGE above LVIS's 300 for TEST.FIXED_AP, got "
            f"{cfg.TEST.DETECTIONS_PER_IMAGE}; set it to some thousands, or to -1 for all"
        )
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        raise InputError("expected a GPU for SOLVER.AMP.ENABLED, got MODEL.DEVICE cpu; switch it off")
    if cfg.MODEL.DEVICE == "cpu" and args.num_gpus > 1 and torch.cuda.is_available():
        raise InputError("expected MODEL.DEVICE cuda for several processes, got cpu; or hide the GPUs from CUDA")
    register_from_config(cfg)
    cfg.freeze()
    return cfg


def refuse_other_stage(cfg: CfgNode) -> None:
    """Keep a run from writing into the folder of the other stage, see :func:`disalign.stage_two.require_own_folder`."""
    last = Checkpointer(torch.nn.Identity(), cfg.OUTPUT_DIR).get_checkpoint_file()
    paths = [last, os.path.join(cfg.OUTPUT_DIR, "model_final.pth")]  # copied there it has no tag
    folder, name = os.path.split(os.path.realpath(cfg.MODEL.WEIGHTS))
    if folder == os.path.realpath(cfg.OUTPUT_DIR) and name.startswith("model_"):
        paths.append(cfg.MODEL.WEIGHTS)
    require_own_folder(cfg.OUTPUT_DIR, paths, cfg.MODEL.DISALIGN.CALIBRATE, "OUTPUT_DIR")


def run(args: argparse.Namespace) -> Any:
    """Run in each process."""
    cfg = setup(args)
    if comm.is_main_process():
        require_data(cfg, training=not args.eval_only)
    comm.synchronize()  # so that no other process fails first with another message
    require_folder(cfg.OUTPUT_DIR)
    refuse_other_stage(cfg)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="disalign_d2")
    if cfg.MODEL.DEVICE == "cpu":
        logger.info("Running on the CPU" + ("" if torch.cuda.is_available() else ": CUDA finds no GPU"))
    if args.eval_only:
        with config_errors(args.config_file):
            model = Trainer.build_model(cfg)
        DisAlignCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    with config_errors(args.config_file):
        trainer = Trainer(cfg)
    with input_errors(f"expected a checkpoint of this run in {cfg.OUTPUT_DIR!r}", "resume another, or start a new run"):
        trainer.resume_or_load(resume=args.resume)
        operator.index(trainer.start_iter)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks([hooks.EvalHook(0, lambda: trainer.test_with_tta(cfg, trainer.model))])
    with locked_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR") if comm.is_main_process() else nullcontext():
        try:
            return trainer.train()
        except FloatingPointError as error:  # Detectron2's, raised before the optimizer step
            raise InputError(
                f"expected a finite loss, but: {first_line(error)}; the last checkpoint is from before: add --resume "
                "with a lower SOLVER.BASE_LR and SOLVER.CLIP_GRADIENTS on, and check the data"
            ) from error


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--data-check", action="store_true", help="report missing data, and stop")
    args = parser.parse_args(argv)
    if args.data_check:
        cfg = setup(args)
        problems = check_data(cfg, decode=True)
        if problems:
            print(*problems, sep="\n")
            raise InputError(f"expected complete data, got {len(problems)} problems (above); fix them, check again")
        print(f"all data of {', '.join([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])} is there")
        return
    with launch_errors():
        launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))


@contextmanager
def launch_errors() -> Iterator[None]:
    """Report an InputError of one of several processes as one."""
    try:
        yield
    except torch.multiprocessing.ProcessRaisedException as error:
        if "disalign.errors.InputError: " not in str(error):
            raise
        raise InputError(sentence_of(error)) from None


if __name__ == "__main__":
    sys.exit(main())
