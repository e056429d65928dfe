"""A detector's gain from balanced classes, and from another weight of the background: {rho 0, RHO} x {stage
one's ratio of foreground and background, the one that a background of weight 1 has at RHO}.

    python benchmarks/background.py CONFIG --stage-one FILE ... --data FOLDER ... [--rho 0.8] [--out FILE]

CONFIG is a stage two's, with a training and a test set of LVIS's format (disalign_d2); each stage-one file has its own
FOLDER with train.json, val.json and the images (scripts/make_long_tail_shapes.py --out FOLDER --seed SEED). For each,
disalign.fit learns the four from one pass over the training set; means +- standard deviations in percent of boxes' AP,
and of the accuracy of the K foreground scores on ground-truth boxes, which the background does not affect.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset

import disalign
from disalign.cli import command
from disalign.errors import InputError
from disalign.functional import class_weights
from disalign.io import require_place, write_json
from disalign.report import text_table
from disalign.stage_two import at_identity
from disalign_d2 import build_model
from disalign_d2.checkpoint import DisAlignCheckpointer
from disalign_d2.collect import collect_features
from disalign_d2.datasets import CheckedMapper
from disalign_d2.lvis_evaluation import DisAlignLVISEvaluator
from disalign_d2.train_net import Trainer, setup

COLUMNS = ("foreground acc.", "AP", "APr", "APc", "APf", "fixed AP", "fixed APr")


def study(config: str, stage_one: str, folder: str, number: int, rho: float) -> dict[str, dict[str, float]]:
    """Figures of stage one and of the four fits."""
    own = [[f"{split}_{number}", f"{folder}/{split}.json", folder] for split in ("train", "val")]
    datasets = ["DATASETS.OWN", own, "DATASETS.TRAIN", (own[0][0],), "DATASETS.TEST", (own[1][0],)]
    detections = ["TEST.FIXED_AP", True, "TEST.DETECTIONS_PER_IMAGE", 2000]
    settings = [*datasets, *detections, "MODEL.WEIGHTS", stage_one]
    cfg = setup(argparse.Namespace(config_file=config, opts=settings, num_gpus=1))
    model: Any = build_model(cfg)
    DisAlignCheckpointer(model, training=True).resume_or_load(stage_one, resume=False)
    model.eval()
    predictors = model.roi_heads.box_predictors()
    if len(predictors) != 1:
        raise InputError(f"expected a detector with one box predictor, got {len(predictors)}; give another config")
    classifier = predictors[0].cls_score
    (features,) = collect_features(model, cfg)
    balanced = float(class_weights(features.class_counts, rho, background_weight="balanced")[-1])
    weights = {
        f"rho {rho:g}, fixed ratio": (rho, 1.0),
        f"rho {rho:g}, stage one's ratio": (rho, "balanced"),
        "rho 0, stage one's ratio": (0.0, 1.0),
        "rho 0, fixed ratio": (0.0, 1 / balanced),
    }
    with at_identity(model):
        found = {"stage one": evaluate(model, cfg)}
    for name, (one, background) in weights.items():
        fitted = disalign.fit(features, classifier, one, background_weight=background)
        classifier.load_state_dict(fitted.state_dict())
        found[name] = evaluate(model, cfg)
    print(f"{stage_one}: balanced background {balanced:.3f}, fixed ratio at rho 0 {1 / balanced:.2f}")
    return found


def evaluate(model: Any, cfg: CfgNode) -> dict[str, float]:
    """Percent: boxes' AP and the foreground's accuracy, on the test set."""
    (name,) = cfg.DATASETS.TEST
    model.roi_heads.mask_on = False
    evaluator = DisAlignLVISEvaluator(name, tasks=("bbox",), fixed_ap=True)
    figures = inference_on_dataset(model, Trainer.build_test_loader(cfg, name), evaluator)["bbox"]
    named = {"AP": "AP", "APr": "APr", "APc": "APc", "APf": "APf", "fixed AP": "AP-fixed", "fixed APr": "APr-fixed"}
    found = {column: float(figures[key]) for column, key in named.items()}
    return {"foreground acc.": foreground_accuracy(model, cfg, name), **found}


@torch.no_grad()
def foreground_accuracy(model: Any, cfg: CfgNode, name: str) -> float:
    """Percent of ground-truth boxes whose highest foreground score is their class's, mean over the classes."""
    options = CheckedMapper.from_config(cfg, False) | {"is_train": True, "use_instance_mask": False}
    mapper, heads = CheckedMapper(**options), model.roi_heads
    classes = len(MetadataCatalog.get(name).thing_classes)
    right, all_of_them = np.zeros(classes), np.zeros(classes)
    for record in DatasetCatalog.get(name):
        inputs = [mapper(record)]
        truth = inputs[0]["instances"].to(model.device)
        maps = model.backbone(model.preprocess_image(inputs).tensor)
        pooled = heads.box_pooler([maps[level] for level in heads.box_in_features], [truth.gt_boxes])
        scores, _ = heads.box_predictor(heads.box_head(pooled))
        labels = truth.gt_classes.tolist()
        np.add.at(all_of_them, labels, 1)
        np.add.at(right, labels, (scores[:, :-1].argmax(1) == truth.gt_classes).cpu().numpy())
    return 100 * float(np.mean(right[all_of_them > 0] / all_of_them[all_of_them > 0]))


def table(studies: Sequence[dict[str, dict[str, float]]]) -> str:
    rows = [["percent", *COLUMNS]]
    for name in studies[0]:
        found = {column: np.array([one[name][column] for one in studies]) for column in COLUMNS}
        spread = [f" +- {values.std(ddof=1):.1f}" if len(values) > 1 else "" for values in found.values()]
        rows.append([name, *(f"{values.mean():.1f}{end}" for values, end in zip(found.values(), spread, strict=True))])
    return text_table(rows)


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config")
    arguments.add_argument("--stage-one", nargs="+", required=True)
    arguments.add_argument("--data", nargs="+", required=True, help="a folder for each stage one")
    arguments.add_argument("--rho", type=float, default=0.8)
    arguments.add_argument("--out", help="JSON of all figures")
    args = arguments.parse_args(argv)
    if len(args.data) != len(args.stage_one):
        raise InputError(f"expected a folder for each of {len(args.stage_one)} stage ones, got {len(args.data)}")
    if args.out:
        require_place(args.out, args.stage_one, force=True)
    pairs = enumerate(zip(args.stage_one, args.data, strict=True))
    studies = [study(args.config, file, folder, number, args.rho) for number, (file, folder) in pairs]
    print(table(studies))
    if args.out:
        write_json(args.out, dict(zip(args.stage_one, studies, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
