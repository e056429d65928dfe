"""What is missing or wrong in a dataset, said before training rather than after hours of it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.fileio import list_dir_or_file
from mmseg.registry import DATASETS
from PIL import Image
from tqdm import tqdm

from disalign.errors import InputError, first_line, in_user_code, some
from disalign.io import missing_files
from disalign.io.images import read_mask, require_labels

from .annotations import Guarded, class_names, loader_of, plain_datasets
from .pixel_counts import Annotations, read

#: Masks whose labels are read before training, spread over the dataset; :func:`~.annotations.guard` watches the rest.
SAMPLE = 200

ORIENTATION = 0x0112  # EXIF's tag; from 5 on height and width change places


def build_dataset(config: dict) -> Any:
    """Build a dataset from its config.

    Raises:
        InputError: no folder of images, no images in it, no list of them, or a config that can't be built.
    """
    try:
        return DATASETS.build(config)
    except InputError:
        raise
    except Exception as error:
        reason = next(_unbuildable(config), None)
        if reason is None and in_user_code(error):
            raise
        raise InputError(
            reason or f"expected a dataset that can be built from {config.get('type')!r}, but: {first_line(error)}"
        ) from error


def _unbuildable(config) -> Iterator[str]:
    """What keeps a dataset from being built, in the words of its config."""
    if "dataset" in config or "datasets" in config:
        for part in config.get("datasets") or [config["dataset"]]:
            yield from _unbuildable(part)
        return
    try:
        dataset = DATASETS.build(dict(config, lazy_init=True))
    except Exception:
        return
    name = config["type"] if isinstance(config["type"], str) else config["type"].__name__
    folder, suffix = (dataset.data_prefix or {}).get("img_path"), getattr(dataset, "img_suffix", None)
    if dataset.ann_file:
        if not os.path.exists(dataset.ann_file):
            yield f"expected the list of images of {name} at {dataset.ann_file!r}, but there is no such file"
        elif os.path.isfile(dataset.ann_file) and not os.path.getsize(dataset.ann_file):
            yield f"expected the names of the images of {name} in {dataset.ann_file!r}, but it is empty"
    elif folder and not os.path.isdir(folder):
        yield f"expected the images of {name} in {folder!r}, but there is no such folder; check data_root"
    elif folder and not any(list_dir_or_file(folder, list_dir=False, suffix=suffix, recursive=True)):
        yield f"expected images (*{suffix or ''}) of {name} in {folder!r}, got none; check data_root and img_suffix"


def check_dataset(
    dataset: Any, num_classes: int, ignore_index: int = 255, labels: int | None = SAMPLE, workers: int | None = None
) -> None:
    """Refuse a dataset that would stop or spoil training.

    Args:
        dataset, num_classes, ignore_index, labels, workers: :func:`dataset_problems`'s.

    Raises:
        InputError: the first problem of :func:`dataset_problems`, and how many there are.
    """
    problems = dataset_problems(dataset, num_classes, ignore_index, labels, workers)
    if problems:
        more = f" (and {len(problems) - 1} more, see python -m disalign_mmseg.check)" if problems[1:] else ""
        raise InputError(problems[0] + more)


def dataset_problems(
    dataset: Any, num_classes: int, ignore_index: int = 255, labels: int | None = SAMPLE, workers: int | None = None
) -> list[str]:
    """Check the number of classes, that all files are there, all images' and annotations' sizes, and some labels.

    Sizes come from the files' headers; only what looks wrong there is loaded, by the dataset's own transforms, which
    decide.

    Args:
        dataset: mmsegmentation's, perhaps wrapped.
        num_classes: of the model.
        ignore_index: the label that is left out.
        labels: how many masks to read for their labels, spread over the dataset, and how many of those that look wrong
            to load at most; ``None``: all.
        workers: processes that read them, see :func:`~disalign_mmseg.pixel_counts.count_pixels`.

    Returns:
        A sentence for each problem; empty if all is well.
    """
    problems: list[str] = []
    for plain in plain_datasets(dataset):
        records = [plain.get_data_info(index) for index in range(len(plain))]
        problems += _other_classes(plain, num_classes)
        missing = list(_missing(plain, records))
        # One sentence for many missing files: the rest of the check would repeat it for each.
        problems += missing or _broken(plain, records, num_classes, ignore_index, labels)
    if not problems and any(loader_of(plain, LoadAnnotations) for plain in plain_datasets(dataset)):
        samples = Annotations(dataset, num_classes, ignore_index)
        count = len(samples) if labels is None else min(labels, len(samples))
        chosen = np.linspace(0, len(samples) - 1, count).astype(int).tolist()
        outcomes = list(read(samples, chosen, workers, progress="reading labels" if labels is None else ""))
        problems += [outcome for outcome in outcomes if isinstance(outcome, str)]
        if outcomes and not problems:
            problems += _too_few_classes(outcomes, num_classes, ignore_index, whole=count == len(samples))
    return problems


def _too_few_classes(outcomes, num_classes, ignore_index, whole: bool) -> Iterator[str]:
    """Labels from which nothing is learnt; of a part of the masks only the lack of any tells."""
    present = np.flatnonzero(sum(counts for counts, _ in outcomes)).tolist()
    ignored = sum(size for _, size in outcomes) - sum(int(counts.sum()) for counts, _ in outcomes)
    if not present:
        yield f"expected labelled pixels, but all of {len(outcomes)} annotations are {ignore_index}, which is ignored"
    elif whole and len(present) == 1 and num_classes > 1:
        yield (
            f"expected pixels of several of the {num_classes} classes, got class {present[0]} alone and {ignored} "
            f"ignored pixels; if {ignore_index} is the foreground, save it as 1, since {ignore_index} is ignored"
        )


def _other_classes(dataset, num_classes) -> Iterator[str]:
    names = class_names(dataset)
    if names and len(names) != num_classes:
        yield (
            f"expected num_classes={len(names)} in the decode head, the number of classes of {type(dataset).__name__}, "
            f"got {num_classes}"
        )


def _missing(dataset, records) -> Iterator[str]:
    name = type(dataset).__name__
    if not records and os.path.isfile(getattr(dataset, "ann_file", "")):
        yield f"expected the names of the images of {name} in {dataset.ann_file!r}, but it is empty; check ann_file"
    elif not records:
        yield f"expected images of {name}, got none; check data_root"
    for key, what in (("img_path", "image"), ("seg_map_path", "annotation")):
        if key == "seg_map_path" and loader_of(dataset, LoadAnnotations) is None:
            continue
        paths = [record.get(key) for record in records]
        if None in paths:
            yield f"expected an {what} for each of the {len(records)} images of {name}, but it names none; set {key}"
            continue
        absent = missing_files([path for path in paths if "://" not in path])
        if absent:
            yield f"expected {len(paths)} {what}s of {name}, but {len(absent)} are missing: {some(absent, 3)}"


def _broken(dataset, records, num_classes, ignore_index, limit) -> Iterator[str]:
    """What the headers of the files tell, confirmed by loading them."""
    image, annotation = loader_of(dataset, LoadImageFromFile), loader_of(dataset, LoadAnnotations)
    local = [one for one in records if "://" not in one["img_path"] + one.get("seg_map_path", "")]
    if image is None or annotation is None:
        return  # files of another kind, which only their own loader understands
    with ThreadPoolExecutor() as pool:
        looks = pool.map(_look_right, local, chunksize=64)
        bar = tqdm(looks, total=len(local), desc="checking files", unit="file", mininterval=1, delay=5)
        suspects = [record for record, right in zip(local, bar, strict=True) if not right]
    loaders = [Guarded(loader, num_classes, ignore_index) for loader in (image, annotation)]
    for record in suspects[:limit]:
        try:
            for loader in loaders:
                loader(record)
            _refuse_wrapped_labels(record)
        except InputError as error:
            yield str(error)


def _look_right(record) -> bool:
    """Whether the headers show an image and an 8-bit annotation of one size."""
    try:
        with Image.open(record["img_path"]) as image, Image.open(record["seg_map_path"]) as annotation:
            width, height = image.size
            # For a PNG Pillow would read the whole image to answer.
            if image.format == "JPEG" and image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
            return (width, height) == annotation.size and annotation.mode in ("1", "L", "P")
    except Exception:  # a broken file can break a reader anywhere
        return False


def _refuse_wrapped_labels(record) -> None:
    """MMSegmentation reads labels into 8 bits: 300 would silently become 44."""
    if record["gt_seg_map"].dtype != np.uint8:
        return
    try:
        labels = read_mask(record["seg_map_path"])
    except OSError:
        return  # a format that Pillow does not know; its own loader has just read it
    require_labels(labels, 256, 255, record["seg_map_path"], " (MMSegmentation reads 8 bits)")
