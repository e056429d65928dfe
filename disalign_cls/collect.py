"""Features of a config's images: the input of a trained model's classifier."""

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from disalign import Features, InputError, collect
from disalign.cli import config_errors
from disalign.io import names_wherever
from disalign.stage_two import require_same_classes


def collect_features(
    model: nn.Module,
    config: Config,
    split: str = "train",
    views: int = 0,
    out: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    classes: Sequence[str] | None = None,
) -> tuple[Features, Any]:
    """Run a config's model once over one of its data sets, on the model's device.

    Args:
        model: an :class:`disalign_cls.classifiers.ImageClassifier` with its weights.
        config: defines the data sets.
        split: ``"train"``, ``"val"`` or ``"test"``.
        views: 0: every image once, with the evaluation's transforms; otherwise the number of random views of each
            image, with the split's own transforms; their weights sum to 1 and they stay in one fold.
        out, dtype: see :func:`disalign.collect`.
        classes: class names that the data set must have, in this order; ``None`` if unknown.

    Returns:
        The features, and the data set (without views) for its classes and counts.

    Raises:
        InputError: a data set that can't be built, or as in :func:`disalign.collect`.
    """
    if views < 0:
        raise InputError(f"expected 0 views (each image once) or more, got {views}")
    with config_errors(config.filename):
        loading = config[f"{split}_dataloader"]
        description = dict(loading.dataset)
        if not views:
            description["transforms"] = config.test_dataloader.dataset.get("transforms", ())
        dataset = DATASETS.build(description)
        require_same_classes(classes, dataset.metainfo["classes"], f"the {dataset.metainfo['split']} set")
        batch_size, workers = loading.batch_size, loading.get("num_workers", 0)
    images, copies = len(dataset), max(views, 1)
    rows = ConcatDataset([dataset] * copies) if views else dataset

    def step(model: Any, batch: Any) -> tuple[Tensor, Any]:
        batch = model.data_preprocessor(batch)
        return batch["data_samples"], model(batch["inputs"])

    features = collect(
        model,
        DataLoader(rows, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available()),
        "classifier",
        out=out,
        dtype=dtype,
        class_counts=dataset.class_counts,
        weights=[1 / copies] * (images * copies) if views else None,
        groups=list(range(images)) * copies if views else None,
        step=step,
        data=_describe(dataset, description, copies),
        random=views > 0,
    )
    return features, dataset


def _describe(dataset: Any, description: dict, copies: int) -> str:
    """Identify the images and labels, independent of their location, and the transforms."""
    digest = hashlib.sha256(dataset.labels.numpy().tobytes())
    if isinstance(dataset.images, np.ndarray):
        digest.update(np.ascontiguousarray(dataset.images).data)
    else:
        digest.update(json.dumps(names_wherever(dataset.images)).encode())
    return f"{len(dataset)} images in {copies} views, {digest.hexdigest()}, transforms {description['transforms']}"
