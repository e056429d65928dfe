"""Find what is missing or wrong in a dataset before training rather than after hours of it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.fileio import list_dir_or_file
from mmseg.registry import DATASETS
from PIL import Image
from tqdm import tqdm

from disalign.cli import config_errors
from disalign.errors import InputError, some
from disalign.io import missing_files
from disalign.io.images import read_mask, require_labels

from .annotations import Guarded, class_names, loader_of, plain_datasets
from .pixel_counts import read

#: Masks whose labels are read before training, spread over the dataset; :func:`~.annotations.guard` watches the rest.
SAMPLE = 200

ORIENTATION = 0x0112  # EXIF's tag; from 5 on height and width change places


def build_dataset(config: dict) -> Any:
    """Build a dataset from its config, with one-sentence errors."""
    with config_errors(str(config.get("type")), (Exception,)):
        try:
            return DATASETS.build(config)
        except Exception as error:
            if reason := _unbuildable(config):
                raise InputError(reason) from error
            raise


def _unbuildable(config) -> str | None:
    if "dataset" in config or "datasets" in config:
        return next(filter(None, map(_unbuildable, config.get("datasets") or [config["dataset"]])), None)
    with suppress(Exception):
        return _no_images(DATASETS.build(dict(config, lazy_init=True)))
    return None


def _no_images(dataset) -> str | None:
    """Why a dataset has no images, in terms of its config; None if it may have some."""
    name, listed = type(dataset).__name__, getattr(dataset, "ann_file", "")
    if listed:
        if os.path.exists(listed) and os.path.getsize(listed):
            return None
        return f"expected the list of images of {name} in {listed!r}, but it is missing or empty; check ann_file"
    folder, suffix = (getattr(dataset, "data_prefix", None) or {}).get("img_path"), getattr(dataset, "img_suffix", "")
    there = folder and os.path.isdir(folder)
    if not folder or (there and any(list_dir_or_file(folder, list_dir=False, suffix=suffix, recursive=True))):
        return None
    got = "got none" if there else "but there is no such folder"
    return f"expected images (*{suffix}) of {name} in {folder!r}, {got}; check data_root and img_suffix"


def check_dataset(dataset: Any, num_classes: int, ignore_index: int = 255) -> None:
    """Refuse a dataset that would stop or spoil training: the first of :func:`dataset_problems`, and how many more."""
    problems = dataset_problems(dataset, num_classes, ignore_index)
    if problems:
        more = f" (and {len(problems) - 1} more, see python -m disalign_mmseg.check)" if problems[1:] else ""
        raise InputError(problems[0] + more)


def dataset_problems(
    dataset: Any, num_classes: int, ignore_index: int = 255, labels: int | None = SAMPLE, workers: int | None = None
) -> list[str]:
    """A sentence for each problem with the number of classes, missing files, sizes of annotations, and labels.

    Sizes come from the files' headers; files that look wrong there are loaded by the dataset's own transforms, which
    decide. ``labels`` is the number of annotations that are read, spread over the dataset, and the limit for loading
    files that look wrong; ``None``: all. For ``workers`` see :func:`~disalign_mmseg.pixel_counts.read`.
    """
    problems: list[str] = []
    plains = plain_datasets(dataset)
    for plain in plains:
        names, records = class_names(plain), [plain.get_data_info(index) for index in range(len(plain))]
        if names and len(names) != num_classes:
            problems.append(
                f"expected num_classes={len(names)} in the decode head, the number of classes of "
                f"{type(plain).__name__}, got {num_classes}"
            )
        missing = list(_missing(plain, records))
        # One sentence for all missing files: the rest of the check would report each of them.
        problems += missing or _broken(plain, records, num_classes, ignore_index, labels)
    if problems or not any(loader_of(plain, LoadAnnotations) for plain in plains):
        return problems
    counted, problems = read(dataset, num_classes, ignore_index, labels, workers)
    if counted and not problems:
        pixels = np.sum([counts for counts, _ in counted], axis=0)
        # In a sample of the masks, only a lack of all classes is a problem.
        needed = min(2, num_classes) if len(counted) == sum(map(len, plains)) else 1
        if np.count_nonzero(pixels) < needed:
            ignored = sum(size for _, size in counted) - pixels.sum()
            problems.append(
                f"expected pixels of {needed} or more of {num_classes} classes in {len(counted)} annotations, got "
                f"{some(np.flatnonzero(pixels)) or 'none'} and {ignored} pixels of {ignore_index}, which is ignored; "
                "if that is the foreground, save it as 1"
            )
    return problems


def _missing(dataset, records) -> Iterator[str]:
    name = type(dataset).__name__
    if not records:
        yield _no_images(dataset) or f"expected images of {name}, got none; check data_root"
    files = {"img_path": "image"} | ({"seg_map_path": "annotation"} if loader_of(dataset, LoadAnnotations) else {})
    for key, what in files.items():
        paths = [record.get(key) or f"(no {key})" for record in records]
        absent = missing_files([path for path in paths if "://" not in path])
        if absent:
            yield f"expected {len(paths)} {what}s of {name}, but {len(absent)} are missing: {some(absent, 3)}"


def _broken(dataset, records, num_classes, ignore_index, limit) -> Iterator[str]:
    """Problems that the files' headers show, confirmed by loading the files."""
    loaders = [loader_of(dataset, kind) for kind in (LoadImageFromFile, LoadAnnotations)]
    if None in loaders:
        return  # files of another kind, which only their own loader understands
    local = [one for one in records if "://" not in one["img_path"] + one["seg_map_path"]]
    with ThreadPoolExecutor() as pool:
        looks = pool.map(_look_right, local, chunksize=64)
        bar = tqdm(looks, total=len(local), desc="checking files", unit="file", mininterval=1, delay=5)
        suspects = [record for record, right in zip(local, bar, strict=True) if not right]
    for record in suspects[:limit]:
        try:
            for loader in loaders:
                Guarded(loader, num_classes, ignore_index)(record)
            _refuse_wrapped_labels(record)
        except InputError as error:
            yield str(error)


def _look_right(record) -> bool:
    """Whether the headers show an image and an 8-bit annotation of one size."""
    try:
        with Image.open(record["img_path"]) as image, Image.open(record["seg_map_path"]) as annotation:
            width, height = image.size
            # For a PNG Pillow would read the whole image.
            if image.format == "JPEG" and image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
            return (width, height) == annotation.size and annotation.mode in ("1", "L", "P")
    except Exception:  # a broken file can raise anything in a reader
        return False


def _refuse_wrapped_labels(record) -> None:
    """MMSegmentation reads labels into 8 bits: 300 would silently become 44."""
    path = record["seg_map_path"]
    if record["gt_seg_map"].dtype == np.uint8:
        with suppress(OSError):  # a format that Pillow does not know; its own loader has just read it
            require_labels(read_mask(path), 256, 255, path, " (MMSegmentation reads 8 bits)")
