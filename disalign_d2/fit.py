"""Stage two by one pass and a solver: python -m disalign_d2.fit CONFIG --stage-one FILE

One pass of stage one over the training images, then a solver without a learning rate learns the 2K + d + 1 numbers of
each box predictor (disalign.fit). CONFIG is a stage two's: its rho, counts and background apply, its schedule
does not. Writes a checkpoint to evaluate with CONFIG as any other, and prints stage one's figures beside its own.
"""

import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm

from disalign import AdaptiveCalibration, fit
from disalign.cli import command, fit_arguments, fit_places, results_of, warnings_to_stderr
from disalign.fitting import require_options
from disalign.io import locked_folder, require_folder

from .cli import load_model, log_to, parser, stage_two_config, training_features
from .data_check import require_data
from .fast_rcnn import background_weight
from .train_net import Trainer, launch_errors, refuse_other_stage

logger = logging.getLogger("disalign_d2")


def run(args: Namespace) -> None:
    """Run in each process."""
    cfg = stage_two_config(args)
    disalign = cfg.MODEL.DISALIGN
    folder = Path(cfg.OUTPUT_DIR)
    require_folder(folder)
    refuse_other_stage(cfg)
    rhos = args.rho or [disalign.RHO]
    places = fit_places(folder, rhos, cfg.MODEL.WEIGHTS, args.force)
    options = {
        "anchor": args.anchor,
        "penalty": args.penalty,
        "background_weight": background_weight(cfg),
        "confidence": disalign.CONFIDENCE,
        "learn_magnitude": disalign.MAGNITUDE,
        "learn_margin": disalign.MARGIN,
    }
    require_options(**options)
    if comm.is_main_process():
        require_data(cfg, training=True)
    comm.synchronize()
    with locked_folder(folder, "OUTPUT_DIR") if comm.is_main_process() else nullcontext():
        log_to(folder / "fit", cfg, args)
        model, checkpointer = load_model(cfg, args, cfg.MODEL.WEIGHTS, str(folder))
        checkpointer.tag_last_checkpoint = lambda name: None  # a fit can't be resumed
        found = learn(model, cfg, args, [*places], options)
        predictors = model.roi_heads.box_predictors()
        for rho, path in places.items():
            for predictor, classifiers in zip(predictors, found, strict=True):
                set_calibration(predictor, classifiers[rho].calibration, rho)
            if comm.is_main_process():
                reports = [classifiers[rho].fit_report.record() for classifiers in found]
                checkpointer.save(path.stem, disalign={"fit": reports})
            if cfg.DATASETS.TEST and (len(places) == 1 or args.test):
                logger.info("rho %g", rho)
                Trainer.test(cfg, model)
                if comm.is_main_process():
                    os.replace(Path(cfg.OUTPUT_DIR, "results.json"), results_of(path))
            else:
                logger.info("rho %g: evaluate %s with disalign_d2.train_net --eval-only", rho, path)


def learn(model: Any, cfg: CfgNode, args: Namespace, rhos: Sequence[float], options: dict) -> list[dict]:
    """One pass, and a fit for each box predictor: rho -> its calibrated classifier."""
    begun = time.perf_counter()
    features = training_features(model, cfg, args, args.features)
    found, rows, fitted = [], 0, 0.0
    for predictor, learns_from in zip(model.roi_heads.box_predictors(), features, strict=True):
        started = time.perf_counter()
        with warnings_to_stderr():
            found.append(fit(learns_from, predictor.cls_score, rhos, **options))
        fitted += time.perf_counter() - started
        logger.info(found[-1][rhos[0]].fit_report.on_training_set())
        rows += len(learns_from)
    passed = time.perf_counter() - begun - fitted
    logger.info("pass over %d rows %.1f s, fit %.1f s", rows, passed, fitted)
    return found


def set_calibration(predictor: Any, calibration: AdaptiveCalibration, rho: float) -> None:
    """Set a box predictor's learnt calibration, and the rho that it was learnt with."""
    predictor.cls_score.calibration.load_state_dict(calibration.state_dict())
    predictor.loss.rho = rho
    predictor.loss.set_class_counts(predictor.loss.class_counts)


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    fit_arguments(arguments, "float16")
    arguments.add_argument("--seed", type=int, default=0, help="of the images and RoIs drawn (%(default)s)")
    arguments.add_argument("--test", action="store_true", help="evaluate each of several rho")
    arguments.add_argument("--num-gpus", type=int, default=1, help="processes (%(default)s)")
    args = arguments.parse_args(argv)
    if args.stage_one:
        args.opts += ["MODEL.WEIGHTS", args.stage_one]
    with launch_errors():
        launch(run, args.num_gpus, dist_url="auto", args=(args,))


if __name__ == "__main__":
    sys.exit(main())
