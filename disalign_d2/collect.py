"""The training set's features that are the input of a frozen detector's box predictors, for disalign.fit."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from disalign import Features, InputError
from disalign.collecting import batched, run_pass, trunk_digest
from disalign.hand_over import require_finite
from disalign.io import names_wherever
from disalign.sampling import draw_images, seed_of
from disalign.stage_two import trained_parts

from .datasets import CheckedMapper

#: Most images that a killed pass loses.
BLOCK = 128
#: Approximate number of foreground RoIs of an image, to estimate the disk space.
FOREGROUND = 16
#: LVIS's threshold of repeat factors, if the config does not set one.
THRESHOLD = 1e-3


def collect_features(
    model: nn.Module,
    cfg: CfgNode,
    background: int = 16,
    images: int | None = None,
    out: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    batch_size: int = 8,
) -> Iterator[Features]:
    """Run a stage-two detector once over ``DATASETS.TRAIN``: the features of its sampled RoIs, for each cascade stage.

    Proposals are drawn and labelled as in training (``label_and_sample_proposals``), the network is in eval mode and
    sees every image once, with the evaluation's transforms. Of an image's sampled RoIs, each cascade stage keeps all
    foreground ones and ``background`` of its N others with weight N / ``background``: given the sampled RoIs, the
    expectation of a weighted sum is the sum over all of them. A row takes d numbers.

    Args:
        model: frozen, see :func:`disalign_d2.freeze`, with stage one's weights; its device is used.
        cfg: for its datasets, transforms and workers.
        background: number of background RoIs to keep of each image.
        images: draw this many images, each with probability min(1, c r), r its repeat factor, and weight its rows by
            the inverse; ``None`` for all.
        out, dtype: see :func:`disalign.collect`.
        seed: for drawing images and RoIs.
        batch_size: images per forward pass; padding to one size lets them affect each other's proposals.

    Yields:
        Features of a stage, with a background and the class counts of the loss.

    Raises:
        InputError: ``background`` or ``batch_size`` below 1; a model without a calibration; images that can't be read;
            features that are not finite; features of another model or other data in ``out``.
    """
    if background < 1 or batch_size < 1:
        raise InputError(
            f"expected 1 or more RoIs of the background, and images in a batch, got {background} and {batch_size}"
        )
    records = _records(cfg)
    threshold = cfg.DATALOADER.REPEAT_THRESHOLD or THRESHOLD
    if images is not None and images >= len(records):
        images = None
    shown = [{one["category_id"] for one in record["annotations"]} for record in records]
    chosen, probabilities = draw_images(shown, len(records) if images is None else images, threshold, seed)
    drawn = chosen.tolist()
    heads: Any = model.roi_heads
    predictors = heads.box_predictors()
    for predictor in predictors:
        predictor.resolve_class_counts()
    stages, num_classes = len(predictors), predictors[0].num_classes
    device = next(model.parameters()).device
    data = MapDataset(DatasetFromList(records), _mapper(cfg))

    @torch.no_grad()
    def run(chosen: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        batches = [[drawn[item] for item in batch] for batch in batched(chosen, batch_size, BLOCK)]
        loader = DataLoader(
            data,
            batch_sampler=batches,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
            generator=torch.Generator(),  # its own, so that the global random state does not change
        )
        for batch, inputs in zip(batches, loader, strict=True):
            with _seeded(seed, batch[0], device), torch.autocast(device.type, enabled=cfg.SOLVER.AMP.ENABLED):
                model(inputs)
                rows = [
                    kept(image, stage, *_thinned(x, y, num_classes, background))
                    for stage, boxes in enumerate(seen)
                    for image, x, y in zip(batch, *boxes, strict=True)
                ]
            yield len(batch), {name: torch.cat([one[name] for one in rows]) for name in rows[0]}

    def kept(image: int, stage: int, x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Tensor]:
        x = x.to("cpu", dtype)
        require_finite({records[image]["file_name"]: x}, " as features of images", "use float32, or other weights")
        # A row's group says both its image and its cascade stage.
        groups = torch.full((len(y),), image * stages + stage)
        return {"x": x, "y": y.cpu(), "weights": weights.double().cpu() / probabilities[image], "groups": groups}

    rois = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    rows = min(rois, background + FOREGROUND)
    width = predictors[0].cls_score.in_features
    source = {
        "trunk": trunk_digest(model, *trained_parts(model)),
        "data": _describe(records, cfg),
        "sample": [background, images, seed, threshold if images else None, batch_size],
        "arrays": [str(dtype), width, stages],
    }
    with _recorded(model) as seen:
        features = run_pass(
            len(drawn),
            run,
            source,
            out,
            size=len(drawn) * stages * rows * (width * dtype.itemsize + 24),
            exact=False,
            block=BLOCK,
            class_counts=predictors[0].loss.class_counts,
            background=True,
        )
    for stage in range(stages):
        yield features if stages == 1 else features.part(cast(Tensor, features.groups) % stages == stage)


def _records(cfg: CfgNode) -> list[dict]:
    """Detectron2's dataset dicts of the training images, with those parts of their annotations that the pass needs."""
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    unused = ("segmentation", "keypoints")
    return [
        record
        | {
            "annotations": [
                {key: value for key, value in one.items() if key not in unused} for one in record.get("annotations", ())
            ]
        }
        for record in records
    ]


def _mapper(cfg: CfgNode) -> CheckedMapper:
    """The training mapper, for annotations, but with the evaluation's transforms and without masks and keypoints."""
    options = CheckedMapper.from_config(cfg, True)
    options.update(
        augmentations=build_augmentation(cfg, False), use_instance_mask=False, use_keypoint=False, recompute_boxes=False
    )
    return CheckedMapper(**options)


@contextmanager
def _seeded(seed: int, image: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, image))
        yield


@contextmanager
def _recorded(model: Any) -> Iterator[list[tuple[Sequence[Tensor], Sequence[Tensor]]]]:
    """Context in which the model runs in training mode, without a loss.

    Yields the input of each box predictor: features (R, d) and labels (R,) of each image.
    """
    predictors, training = model.roi_heads.box_predictors(), model.training
    seen: list[Any] = [None] * len(predictors)
    hooks = []
    for stage, predictor in enumerate(predictors):

        def keep(_: nn.Module, inputs: tuple[Tensor, Tensor], stage: int = stage) -> None:
            seen[stage] = inputs[1]

        def losses(_: Any, proposals: Sequence[Any], stage: int = stage) -> dict:
            labels = [one.gt_classes for one in proposals]
            seen[stage] = seen[stage].split([len(found) for found in labels]), labels
            return {}

        hooks.append(predictor.cls_score.calibration.register_forward_pre_hook(keep))
        predictor.losses = losses
    model.train()
    try:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()):
            raise InputError("expected a frozen model, got one whose BatchNorm trains; call disalign_d2.freeze first")
        with EventStorage(1):
            yield seen
    finally:
        model.train(training)
        for hook, predictor in zip(hooks, predictors, strict=True):
            hook.remove()
            del predictor.losses


def _thinned(x: Tensor, y: Tensor, num_classes: int, background: int) -> tuple[Tensor, Tensor, Tensor]:
    """All foreground rows, some of the background, and their weights."""
    foreground, others = (y != num_classes).nonzero().flatten(), (y == num_classes).nonzero().flatten()
    kept = others[torch.randperm(len(others))[:background].to(others.device)]
    weights = torch.ones(len(foreground) + len(kept), device=x.device)
    weights[len(foreground) :] = len(others) / max(len(kept), 1)
    rows = torch.cat([foreground, kept])
    return x[rows], y[rows], weights


def _describe(records: Sequence[dict], cfg: CfgNode) -> str:
    """Identify the images (by name and size, not folder), their boxes, and all that determines the proposals."""
    paths = [record["file_name"] for record in records]
    digest = hashlib.sha256()
    for path, name, record in zip(paths, names_wherever(paths), records, strict=True):
        size = os.path.getsize(path) if os.path.isfile(path) else None
        boxes = [[*map(float, one["bbox"]), one["category_id"], one.get("iscrowd", 0)] for one in record["annotations"]]
        digest.update(json.dumps([name, size, boxes]).encode())
        for given in ("proposal_boxes", "proposal_objectness_logits"):
            digest.update(np.ascontiguousarray(record.get(given, ())).tobytes())
    settings = [
        f"{key}: {value}" for key, value in sorted(cfg.INPUT.items()) if key.endswith("_TEST") or key == "FORMAT"
    ]
    settings += [str(cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN), str(cfg.SOLVER.AMP.ENABLED), *_settings(cfg.MODEL)]
    digest.update(json.dumps(settings).encode())
    return f"{len(records)} images, {digest.hexdigest()}"


#: The model settings that do not affect its proposals and their features.
UNRELATED = ("WEIGHTS", "DISALIGN", "DEVICE", "MASK_ON", "KEYPOINT_ON", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")


def _settings(node: CfgNode) -> list[str]:
    """``KEY: value`` of a node and those below it, without the unrelated ones and those of the evaluation."""
    lines = []
    for key, value in sorted(node.items()):
        if key in UNRELATED or key.endswith("_TEST"):
            continue
        below = _settings(value) if isinstance(value, CfgNode) else None
        lines += [f"{key}: {value}"] if below is None else [f"{key}.{line}" for line in below]
    return lines
