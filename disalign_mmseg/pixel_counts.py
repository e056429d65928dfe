"""r of eq. 11 for segmentation: training pixels per class, counted from the dataset's own annotations."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations
from mmengine.dist import broadcast_object_list, is_main_process
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from disalign.cli import usable_cpus
from disalign.errors import InputError
from disalign.io import read_json, write_json
from disalign.io.images import count_labels

from .annotations import Guarded, class_names, loader_of, plain_datasets

#: The file below a run's folder that caches the counts.
CACHE = "class_counts.json"


def on_main_process(function: Callable, *args: Any) -> Any:
    """Call a function in the main process only; all processes get its result, or raise its :class:`InputError`."""
    outcome: list = [None]
    if is_main_process():
        try:
            outcome = [function(*args)]
        except InputError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def class_counts_of(dataset: Any, num_classes: int, ignore_index: int, folder: str | os.PathLike[str]) -> dict:
    """:func:`count_pixels` for a run, cached in its folder as long as the data is the same."""
    path = os.path.join(folder, CACHE)
    with suppress(InputError):  # no such file, or a broken one
        record = read_json(path, "class counts")
        # The checksum covers the data and K; the length check is for an edited file.
        same = isinstance(record, dict) and record.get("checksum") == checksum(dataset, num_classes, ignore_index)
        if same and len(record.get("train_counts", ())) == num_classes:
            return record
    record = count_pixels(dataset, num_classes, ignore_index)
    write_json(path, record)
    return record


def count_pixels(dataset: Any, num_classes: int, ignore_index: int = 255, workers: int | None = None) -> dict:
    """Count pixels and images per class, in the annotations as the dataset's own ``LoadAnnotations`` gives them.

    So ``label_map``, ``reduce_zero_label`` and the reading backend are those of training; nothing is augmented.
    A wrapper's repetitions (``RepeatDataset``, ``ClassBalancedDataset``) do not count: each annotation of each dataset
    listed does, once.

    The label ``ignore_index`` is left out, even if a class has the same number.

    Returns:
        A record for JSON, readable by :func:`disalign.load_class_counts`: ``train_counts`` (pixels) and
        ``image_counts`` of the K classes, ``total_pixels`` (ignored ones too) for shares of all pixels, ``files``,
        ``dataset``, ``class_names``, ``unit``, ``source``, and :func:`checksum`.
    """
    before = checksum(dataset, num_classes, ignore_index)  # before reading
    counted, problems = read(dataset, num_classes, ignore_index, workers=workers)
    if problems:
        raise InputError(problems[0] + (f" (and {len(problems) - 1} more annotations)" if problems[1:] else ""))
    pixels = np.array([counts for counts, _ in counted], dtype=np.int64).reshape(-1, num_classes)
    name = " + ".join(dict.fromkeys(type(plain).__name__ for plain in plain_datasets(dataset)))
    return {
        "dataset": name,
        "unit": "pixels",
        "source": f"counted in {len(counted)} annotations as {name} loads them",
        "files": len(counted),
        "total_pixels": sum(size for _, size in counted),
        "checksum": before,
        "class_names": class_names(dataset),
        "train_counts": pixels.sum(0).tolist(),
        "image_counts": (pixels > 0).sum(0).tolist(),
    }


def checksum(dataset: Any, num_classes: int, ignore_index: int = 255) -> str:
    """SHA-256 of what the counts depend on, without reading a mask: how they are loaded, all names, sizes and times.

    A copy of the data with other file times has another checksum: its pixels are counted again.
    """
    digest = hashlib.sha256(f"{num_classes} {ignore_index}".encode())
    for plain in plain_datasets(dataset):
        loader = loader_of(plain, LoadAnnotations)
        how = f"{class_names(plain)} {type(loader).__qualname__} {getattr(loader, 'imdecode_backend', None)}"
        digest.update(f"{how}\n".encode())
        records = (plain.get_data_info(index) for index in range(len(plain)))
        for path, changes in sorted(
            (str(one.get("seg_map_path")), f"{one.get('reduce_zero_label')} {one.get('label_map')}") for one in records
        ):
            status = os.stat(path) if os.path.isfile(path) else None
            digest.update(f"{path} {changes} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


class Annotations(Dataset):
    """The annotations of a plain dataset: each as ((K,) int64 pixels per class, number of all pixels).

    For a bad annotation it is the error's sentence instead.
    """

    def __init__(self, plain: Any, num_classes: int, ignore_index: int) -> None:
        loader = loader_of(plain, LoadAnnotations)
        if loader is None:
            raise InputError(f"expected LoadAnnotations in the pipeline of {type(plain).__name__}, got none; add it")
        self.plain = plain
        self.loader = Guarded(loader, num_classes, ignore_index)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int] | str:
        results = self.plain.get_data_info(index)
        try:
            self.loader(results)
        except InputError as error:
            return str(error)
        labels = results["gt_seg_map"]
        return count_labels(labels, self.loader.ignore_index, self.loader.num_classes), labels.size


def read(
    dataset: Any, num_classes: int, ignore_index: int, most: int | None = None, workers: int | None = None
) -> tuple[list[tuple[np.ndarray, int]], list[str]]:
    """The :class:`Annotations` of all datasets within wrappers that can be counted, and what is wrong with the others.

    At ``most`` this many, spread over the dataset, are read by ``workers``, the number of processes: by default one per
    available CPU, 8 at most; 0 reads in this process.
    """
    parts = [Annotations(plain, num_classes, ignore_index) for plain in plain_datasets(dataset)]
    samples: ConcatDataset = ConcatDataset(parts)
    number = len(samples) if most is None else min(most, len(samples))
    workers = min(8, usable_cpus()) if workers is None else workers
    loader = DataLoader(
        samples,
        batch_size=8,
        sampler=np.linspace(0, len(samples) - 1, number).astype(int).tolist(),
        num_workers=0 if number < 50 else workers,  # not worth starting processes for a few
        collate_fn=list,
        # Its own, so that a run draws the same random numbers whether its counts were cached or counted.
        generator=torch.Generator(),
    )
    bar = tqdm(loader, "reading annotations", unit="file", unit_scale=8, mininterval=1, delay=5)
    outcomes = [outcome for batch in bar for outcome in batch]
    return [one for one in outcomes if not isinstance(one, str)], [one for one in outcomes if isinstance(one, str)]
