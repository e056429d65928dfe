"""Is DisAlign better than the two-line fix? python -m disalign_d2.compare CONFIG --stage-one FILE [FILE ...]

One pass of each stage one over the training images, from which every method (disalign.compare) learns a calibration of
each box predictor; then one over the test images, in which backbone, proposals and box features are computed once for
all methods. CONFIG is a stage two's. Several stage ones give mean +- standard deviation. Nothing is tuned on the test
images: settings are fixed. Only boxes are compared, not masks or keypoints. LVIS's evaluation adds the fixed AP, from
1,000 detections per image. Prints a table and writes comparison.json, for `disalign report`.
"""

import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from torch import Tensor

from disalign import AdaptiveCalibration, Features, InputError, frequent_common_rare
from disalign.cli import as_typed, command, compare_arguments, compare_place, features_of, write_comparison
from disalign.comparison import (
    Candidate,
    Problem,
    candidates,
    chosen_methods,
    comparison,
    evaluated,
    group_names,
    run_record,
)
from disalign.errors import some
from disalign.fitting import require_options
from disalign.io import locked_folder, read_json

from .class_counts import class_counts_from_config, training_image_counts
from .cli import load_model, log_to, parser, stage_two_config, training_features
from .data_check import require_data
from .fast_rcnn import background_weight
from .replay import detector_of
from .train_net import Trainer

logger = logging.getLogger("disalign_d2")

#: Detections per image: those that LVIS's AP counts, and those for the fixed AP.
MAX_DETS, MAX_DETS_FIXED = 300, 1000
#: Type of the evaluator -> figures and their titles.
COLUMNS = {
    "lvis": {
        **{name: name for name in ("AP", "APr", "APc", "APf")},
        **{f"{name}-fixed": f"{name} fixed" for name in ("AP", "APr", "APc", "APf")},
    },
    "coco": {name: name for name in ("AP", "AP50", "AP75")},
}
#: LVIS's, by training images.
GROUPS = {"r": "at most 10 training images", "c": "11 to 100 training images", "f": "more than 100 training images"}


def run(args: Namespace) -> None:
    """Run the passes and the methods, and print the table."""
    cfg = stage_two_config(args)
    folder = Path(args.out or Path(cfg.OUTPUT_DIR, "compare"))
    paths = args.stage_one or [cfg.MODEL.WEIGHTS]
    rho = cfg.MODEL.DISALIGN.RHO if args.rho is None else args.rho
    place = compare_place(folder, [rho, *args.sweep], paths, args.force)
    require_options(background_weight=background_weight(cfg))
    cosine = cfg.MODEL.DISALIGN.CLASSIFIER == "cosine"
    chosen_methods(args.methods, "detection", cosine)
    if len(cfg.DATASETS.TEST) != 1:
        got = some(cfg.DATASETS.TEST) or "none"
        raise InputError(f"expected one dataset in DATASETS.TEST to compare on, got {got}; name one with --opts")
    require_data(cfg, training=True)
    image_counts = training_image_counts(cfg)
    names = chosen_methods(args.methods, "detection", cosine, {"images": image_counts})
    with locked_folder(folder, "--out"):
        boxes = BoxEvaluation(cfg, image_counts)
        log_to(folder / "evaluations", cfg, args)
        boxes.require_annotations(folder)
        # All are loaded before the first pass, which may take hours.
        models = [load_model(cfg, args, path)[0] for path in paths]
        runs = []
        for number, (path, model) in enumerate(zip(paths, models, strict=True)):
            logger.info("%s: %s", path, ", ".join(names))
            several = len(paths) > 1
            begun = time.perf_counter()
            features = training_features(model, cfg, args, features_of(args.features, number, several))
            found, calibrations, facts = learn(model, cfg, features, names, rho, image_counts, args)
            with detector_of(model, calibrations) as detect:
                detections = boxes.detections(detect)
            passed = time.perf_counter() - begun - sum(one.seconds for one in found)
            below = Path(cfg.OUTPUT_DIR, f"stage_one_{number}" if several else "")
            records = [
                boxes.record(one, [(images, outputs[place]) for images, outputs in detections], below)
                for place, one in enumerate(found)
            ]
            runs.append(run_record(records, stage_one=path, seed=args.seed, pass_seconds=passed, **facts))
        content = comparison(
            runs,
            COLUMNS[boxes.kind],
            task="detection",
            rho=rho,
            settings="defaults",
            dataset=boxes.dataset,
            split="test",
            classes=boxes.classes,
            class_counts=class_counts_from_config(cfg).tolist(),
            group_of=boxes.groups,
            groups_text=GROUPS,
            examples=boxes.images,
            command=args.command,
        )
        write_comparison(place, content)


def learn(
    model: Any,
    cfg: CfgNode,
    features: Iterable[Features],
    names: Sequence[str],
    rho: float,
    image_counts: Tensor | None,
    args: Namespace,
) -> tuple[list[Candidate], list[list[AdaptiveCalibration]], dict[str, Any]]:
    """What each method learns for each box predictor, from its features.

    Returns:
        The candidates (of a cascade's last stage, with the seconds of all stages); the calibrations of each, in the
        order of the box predictors; and ``notes``, the distinct warnings of the fits, and ``train``, what the (last)
        stage one reaches on its training set.
    """
    stages, notes = [], []
    for predictor, learns_from in zip(model.roi_heads.box_predictors(), features, strict=True):
        weight, zero_count = background_weight(cfg), predictor.loss.zero_count
        problem = Problem(learns_from, predictor.cls_score, rho, weight, image_counts, args.seed, zero_count)
        found, told = candidates(problem, names, dial=(), sweep=args.sweep)
        stages.append(found)
        notes += told
    device = next(model.parameters()).device
    together = list(zip(*stages, strict=True))
    # For a cascade the report shows magnitude and margin of the last stage, whose boxes are evaluated.
    last = [replace(each[-1], seconds=sum(one.seconds for one in each)) for each in together]
    calibrations = [[one.calibration.to(device).eval() for one in each] for each in together]
    for note in (notes := list(dict.fromkeys(notes))):
        logger.warning(note)
    return last, calibrations, {"notes": notes, "train": {"balanced": problem.train_accuracy}}


class BoxEvaluation:
    """The evaluation of boxes on a config's only test set.

    Args:
        cfg: changed in place, so that its models keep the detections for the fixed AP.
        image_counts: (K,) training images with each class, if known.
    """

    def __init__(self, cfg: CfgNode, image_counts: Tensor | None) -> None:
        (self.dataset,) = cfg.DATASETS.TEST
        metadata = MetadataCatalog.get(self.dataset)
        self.kind, self.classes = metadata.get("evaluator_type"), list(metadata.get("thing_classes", ()))
        self.images = 0
        self.groups = None if image_counts is None else group_names(frequent_common_rare(image_counts))
        # AP as in an evaluation with this config, though there are more detections.
        kept = cfg.TEST.DETECTIONS_PER_IMAGE
        self._max_dets = MAX_DETS if kept < 0 else min(kept, MAX_DETS)
        cfg.defrost()
        if self.kind == "lvis":
            cfg.TEST.FIXED_AP = True
            cfg.TEST.DETECTIONS_PER_IMAGE = kept if kept < 0 else max(kept, MAX_DETS_FIXED)
        cfg.freeze()
        self._cfg = cfg.clone()
        self._cfg.defrost()
        self._cfg.MODEL.MASK_ON = self._cfg.MODEL.KEYPOINT_ON = False

    def evaluator(self, folder: Path) -> Any:
        return Trainer.build_evaluator(self._cfg, self.dataset, str(folder), self._max_dets)

    def require_annotations(self, folder: Path) -> None:
        """Refuse, before the passes, a test set of a kind that can't be evaluated, or without annotations."""
        if not self.evaluator(folder)._do_evaluation:  # Detectron2's own, of both kinds
            raise InputError(
                f"expected annotations in {self.dataset!r} to compare on, got none; name another set in DATASETS.TEST"
            )

    def detections(self, detect: Callable) -> list[tuple[list[dict], list[list[dict]]]]:
        """For each batch the inputs, without their pixels, and the outputs of each candidate.

        They take 28 bytes a detection; an evaluator takes twenty times as much, so there is only one at a time.
        """
        found = []

        def run(inputs: list[dict]) -> None:
            found.append(([{key: one[key] for key in one if key != "image"} for one in inputs], detect(inputs)))

        loader = Trainer.build_test_loader(self._cfg, self.dataset)
        inference_on_dataset(run, loader, None)  # for its progress in the log
        self.images = sum(len(images) for images, _ in found)
        return found

    def record(self, candidate: Candidate, detections: Iterable[tuple[list[dict], list[dict]]], below: Path) -> dict:
        """A candidate's figures and the AP of each class, in percent; the evaluator writes to a folder of its own."""
        name = candidate.name if candidate.role == "method" else f"{candidate.name}_rho-{candidate.value:g}"
        logger.info("Evaluating %s", name)
        evaluator = self.evaluator(below / name)
        evaluator.reset()
        for images, outputs in detections:
            evaluator.process(images, outputs)
        figures = evaluator.evaluate()["bbox"]
        if self.kind == "lvis":
            per_class = read_json(below / name / "lvis_results.json", "results")["bbox"]["per_class"]
            self.groups, of_class = per_class["group"], per_class["AP"]
        else:  # a single class has no figure of its own
            of_class = [figures.pop(f"AP-{name}", figures["AP"]) for name in self.classes]
        return evaluated(candidate, figures, per_class={"AP": of_class})


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    compare_arguments(arguments, "float16")
    arguments.add_argument("--out", metavar="DIR", help="to write into; default: OUTPUT_DIR/compare")
    args = arguments.parse_args(argv)
    args.num_gpus, args.command = 1, as_typed(run, argv)
    run(args)


if __name__ == "__main__":
    sys.exit(main())
