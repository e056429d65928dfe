"""Features of a training set's pixels: the input of a trained segmentor's classifier."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from disalign import Features, InputError, load_class_counts
from disalign.cli import config_errors
from disalign.collecting import evaluating, run_pass, spread, trunk_digest
from disalign.counts import ClassCounts
from disalign.errors import some
from disalign.features import DTYPES
from disalign.io import names_wherever
from disalign.sampling import draw_images, seed_of
from disalign.stage_two import trained_parts

from .annotations import guard, plain_datasets
from .data_check import build_dataset
from .pixel_counts import count_pixels, on_main_process, read
from .segmentors import DisAlignEncoderDecoder
from .upsampling import cells_at, sample_pixels

#: Most images that a killed pass loses, on each rank.
BLOCK = 32
#: Number of images that a pass into a folder compares with the rows already there.
COMPARED = 4


def training_set(config: Config) -> Any:
    """A config's training set with the evaluation's transforms (``test_dataloader.dataset.pipeline``).

    Raises:
        InputError: a data set that can't be built.
    """
    with config_errors(config.filename):
        description, evaluated = config.train_dataloader.dataset, config.test_dataloader.dataset
        while "pipeline" not in evaluated:  # a wrapper of one or several
            evaluated = evaluated["dataset"] if "dataset" in evaluated else evaluated["datasets"][0]
        pipeline = evaluated.pipeline
    dataset = build_dataset(description)
    with config_errors(config.filename):
        for plain in plain_datasets(dataset):
            plain.pipeline = Compose(pipeline)
    return dataset


def require_sample(pixels: int, images: int | None = None) -> None:
    """Refuse a sample without pixels or images.

    Raises:
        InputError: a number below 1.
    """
    for what, number in (("pixels of each image", pixels), ("images", images)):
        if number is not None and number < 1:
            raise InputError(f"expected 1 or more {what}, got {number}; give more, or leave it out")


def collect_features(
    model: DisAlignEncoderDecoder,
    dataset: Any,
    pixels: int = 64,
    images: int | None = None,
    out: str | PathLike[str] | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    class_counts: ClassCounts | None = None,
    totals: Sequence[float] | None = None,
    threshold: float = 0.01,
    seed: int = 0,
    workers: int = 0,
) -> Features:
    """Run stage one once over a training set and keep its classifier's input for a few pixels of every image.

    A row is a pixel that the sampled loss (:func:`.upsampling.sampled_cross_entropy`) would draw: the features of the
    four cells of the head's grid that its scores are interpolated from, and a weight of valid pixels / ``pixels``. The
    expectation of the rows' weighted re-weighted loss is then that of all pixels. Every image is seen once, alone and
    whole (without a sliding window), on the model's device, with random numbers of its own: a row depends neither on
    the batch, nor on where a killed pass resumed, nor on the number of ranks.

    Args:
        model: stage two's, with stage one's weights.
        dataset: such as :func:`training_set`'s; each annotation of each dataset within wrappers counts once.
        pixels: number to keep of every image.
        images: use only this many, drawn by repeat factors (:func:`disalign.sampling.repeat_factors`), with weights
            that undo it; the annotations are then read once more, beforehand. Default: all.
        out, dtype: see :func:`disalign.collect`.
        class_counts, totals: see :class:`disalign.Features`; by default both are the pixels of ``dataset``, counted.
        threshold: share of images below which a class is rare; for ``images``.
        seed: for both samples.
        workers: processes that load images.

    Returns:
        Rows with (N, 4, d) ``x``, (N, 4) fp32 ``bilinear``, and the number of their image in ``groups``. An image
        without a valid pixel has none.

    Raises:
        InputError: a broken file or label; label maps that are not of the original size; a head that does not classify
            by ``conv_seg``, once per image; features that are not finite; or as in :func:`disalign.collect`.
    """
    require_sample(pixels, images)
    if dtype not in DTYPES:
        raise InputError(f"expected to keep features as one of {some(DTYPES)}, got {dtype}")
    head = model.calibrated_head
    labels = head.num_classes, head.ignore_index
    plains = plain_datasets(dataset)
    guard(dataset, *labels)
    if class_counts is None:
        class_counts = totals = on_main_process(count_pixels, dataset, *labels)["train_counts"]
    counts = load_class_counts(class_counts)
    if len(counts) != head.num_classes:
        raise InputError(f"expected class counts of the model's {head.num_classes} classes, got {len(counts)}")
    whole: ConcatDataset = ConcatDataset(plains)
    if images is None or images >= len(whole):
        chosen, probabilities = torch.arange(len(whole)), torch.ones(len(whole), dtype=torch.float64)
    else:
        chosen, probabilities = on_main_process(_draw_images, dataset, *labels, images, threshold, seed)

    def run(items: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        numbers = chosen[list(items)].tolist()
        loader = DataLoader(
            whole,
            batch_size=1,
            sampler=numbers,
            num_workers=workers if len(numbers) > 1 else 0,
            collate_fn=pseudo_collate,
            generator=torch.Generator(),  # its own, so that no global random number is drawn
        )
        for number, batch in zip(numbers, loader, strict=True):
            rows = pixel_rows(model, batch, pixels, seed_of(seed, number))
            x = rows["x"].to("cpu", dtype)
            if not x.isfinite().all():
                raise InputError(
                    f"expected finite features of {batch['data_samples'][0].metainfo.get('img_path')!r}, got NaN or "
                    f"infinity in {dtype}; keep them in a wider dtype, or leave the image out"
                )
            own = {"weights": rows["weights"] / probabilities[number], "groups": torch.full_like(rows["y"], number)}
            yield 1, rows | own | {"x": x}

    source = {
        "trunk": trunk_digest(model, *trained_parts(model)),
        "images or annotations": _files(plains),
        # LoadAnnotations shows this setting of the data set only after it has loaded something.
        "pipeline": [re.sub(r"reduce_zero_label=\w+, | at 0x[0-9a-f]+", "", repr(one.pipeline)) for one in plains],
        "padding": str(getattr(model.data_preprocessor, "test_cfg", None)),
        "align_corners": head.align_corners,
        "pixels": pixels,
        "images": None if len(chosen) == len(whole) else [images, threshold],
        "seed": seed,
        "dtype": str(dtype),
    }
    row = 4 * head.conv_seg.in_channels * dtype.itemsize + 4 * 4 + 3 * 8
    with evaluating(model):
        return run_pass(
            len(chosen),
            run,
            source,
            out,
            size=len(chosen) * pixels * row,
            block=BLOCK,
            compared=spread(len(chosen), COMPARED),
            group_of=lambda item: int(chosen[item]),
            class_counts=counts,
            totals=None if totals is None else torch.as_tensor(totals, dtype=torch.float64),
        )


@torch.no_grad()
def pixel_rows(model: DisAlignEncoderDecoder, batch: Mapping[str, Any], pixels: int, seed: int) -> dict[str, Tensor]:
    """Draw pixels of one image, a batch of the evaluation's loader, and return the classifier's input for them.

    Returns:
        (n, 4, d) ``x`` on the model's device; on the CPU (n, 4) fp32 ``bilinear``, (n,) int64 ``y``, (n,) fp64
        ``weights``; n = ``pixels``, or 0 if no pixel is valid.
    """
    head, samples = model.calibrated_head, batch["data_samples"]
    label = _label_map(samples)
    size = batch["inputs"][0].shape[-2:]
    seen: list[Any] = []
    hook = head.calibration.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        ready = model.data_preprocessor(batch, training=False)
        model(**ready, mode="tensor")
    finally:
        hook.remove()
    if len(seen) != 1:
        raise InputError(
            f"expected {type(head).__name__} to classify once per image, but it did so {len(seen)} times; calibrate "
            "another head"
        )
    logits, features = seen[0]
    label = _padded(label, size, ready["inputs"].shape[-2:], head.ignore_index)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        positions, valid = sample_pixels(label[None], pixels, head.ignore_index)
    drawn = positions[0] if valid else positions[0, :0]
    index, bilinear = cells_at(drawn, features.shape[-2:], label.shape, head.align_corners)
    cells = index.flatten().to(features.device)
    x, scores = (values[0].flatten(1)[:, cells].T for values in (features, logits))
    _require_linear(head, x, scores)
    return {
        "x": x.unflatten(0, index.shape),
        "y": label.flatten()[drawn],
        "weights": torch.full((len(drawn),), valid.item() / pixels, dtype=torch.float64),
        "bilinear": bilinear.float(),
    }


def _label_map(samples: Any) -> Tensor:
    """(H, W) int64 labels of the only sample."""
    found = getattr(samples[0], "gt_sem_seg", None)  # test-time augmentation has a list here
    expected = None if found is None else tuple(samples[0].metainfo.get("ori_shape", found.shape)[:2])
    if found is None or tuple(found.data.shape[-2:]) != expected:
        got = "none" if found is None else f"{tuple(found.data.shape[-2:])} where it is {expected}"
        raise InputError(
            f"expected a label map of the image's original size from the evaluation's pipeline, got {got}; put "
            "LoadAnnotations after Resize in test_dataloader.dataset.pipeline, without TestTimeAug"
        )
    return found.data[0]


def _padded(label: Tensor, size: Sequence[int], padded: Sequence[int], ignore_index: int) -> Tensor:
    """A label map with pixels to ignore at the bottom and right, in proportion to those of its image."""
    more = [round(old * new / side) - old for old, new, side in zip(label.shape, padded, size, strict=True)]
    return F.pad(label, (0, more[1], 0, more[0]), value=ignore_index)


def _require_linear(head: Any, x: Tensor, scores: Tensor) -> None:
    """Refuse a head whose scores are not ``conv_seg``'s of the features, up to mixed precision's rounding."""
    kernel = head.conv_seg.weight
    off = torch.ones(())
    if kernel.shape == (scores.shape[1], x.shape[1], 1, 1):
        expected = F.linear(x.to(kernel), kernel.flatten(1), head.conv_seg.bias)
        off = (expected - scores).abs().sum() - 0.05 * expected.abs().sum()
    if off > 0:
        raise InputError(
            f"expected {type(head).__name__} to classify by conv_seg, a 1x1 convolution, but its scores are others; "
            "train stage two instead"
        )


def _draw_images(
    dataset: Any, num_classes: int, ignore_index: int, images: int, threshold: float, seed: int
) -> tuple[Tensor, Tensor]:
    """(n,) images drawn, and the (N,) probabilities of all."""
    counted, problems = read(dataset, num_classes, ignore_index)
    if problems:
        raise InputError(problems[0])
    return draw_images([np.flatnonzero(pixels).tolist() for pixels, _ in counted], images, threshold, seed)


def _files(plains: Sequence[Any]) -> str:
    """SHA-256 of names and sizes of all images and annotations, without their folder, and of how labels are mapped."""
    records = [plain.get_data_info(index) for plain in plains for index in range(len(plain))]
    paths = [str(record.get(key)) for record in records for key in ("img_path", "seg_map_path")]
    digest = hashlib.sha256()
    for path, name in zip(paths, names_wherever(paths), strict=True):
        digest.update(f"{name} {os.path.getsize(path) if os.path.isfile(path) else None}\n".encode())
    for record in records:
        digest.update(f"{record.get('reduce_zero_label')} {record.get('label_map')}\n".encode())
    return digest.hexdigest()
