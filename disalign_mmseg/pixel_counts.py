"""r of eq. 11 for segmentation: training pixels per class, counted from the dataset's own annotations."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations
from mmengine.dist import broadcast_object_list, is_main_process
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from disalign.cli import usable_cpus
from disalign.errors import InputError, some
from disalign.io import read_json, write_json
from disalign.io.images import count_labels

from .annotations import Guarded, class_names, loader_of, plain_datasets

#: The file below a run's folder that keeps the counts.
CACHE = "class_counts.json"


def class_counts_of(
    dataset: Any,
    num_classes: int,
    ignore_index: int = 255,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    accept: Callable[[list[int]], None] | None = None,
) -> dict:
    """:func:`count_pixels` for a run: the main process counts, all get the result, and ``folder`` keeps it.

    All processes must call it.

    Args:
        dataset, num_classes, ignore_index, workers: :func:`count_pixels`'s.
        folder: where ``class_counts.json`` lies or is written; it is used again only for the same data.
        accept: called with the K counts; what it refuses is not kept.

    Returns:
        :func:`count_pixels`'s record.

    Raises:
        InputError: :func:`count_pixels`'s or ``accept``'s, in all processes.
    """
    return on_main_process(_kept_or_counted, dataset, num_classes, ignore_index, folder, workers, accept)


def on_main_process(function: Any, *args: Any) -> Any:
    """Call a function in the main process alone; all get its result, or raise its :class:`InputError`."""
    outcome: list = [None, None]
    if is_main_process():
        try:
            outcome[0] = function(*args)
        except InputError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def _kept_or_counted(dataset, num_classes, ignore_index, folder, workers, accept):
    record = _kept(dataset, num_classes, ignore_index, folder)
    if record is None:
        record = count_pixels(dataset, num_classes, ignore_index, workers)
        if accept is not None:
            accept(record["train_counts"])
        if folder is not None:
            write_json(os.path.join(folder, CACHE), record)
    return record


def _kept(dataset, num_classes, ignore_index, folder):
    path = os.path.join(folder, CACHE) if folder is not None else ""
    if not os.path.isfile(path):
        return None
    try:
        record = read_json(path, "class counts")
    except InputError:
        return None
    # The checksum knows the data and K; the length is for a file that someone changed.
    same = isinstance(record, dict) and record.get("checksum") == checksum(dataset, num_classes, ignore_index)
    return record if same and len(record.get("train_counts", ())) == num_classes else None


def count_pixels(dataset: Any, num_classes: int, ignore_index: int = 255, workers: int | None = None) -> dict:
    """Count pixels and images per class, in the annotations as the dataset's own ``LoadAnnotations`` gives them.

    So ``label_map``, ``reduce_zero_label`` and the reading backend are the training's; no augmentation takes place.
    A wrapper's repetitions (``RepeatDataset``, ``ClassBalancedDataset``) do not count: each annotation of each dataset
    listed does, once.

    Args:
        dataset: mmsegmentation's, perhaps wrapped.
        num_classes: K.
        ignore_index: the label that is left out; it wins over a class of the same number.
        workers: processes that read; default: one per CPU that this process may use, 8 at most. 0: none of its own.

    Returns:
        A record for JSON, readable by :func:`disalign.load_class_counts`: ``train_counts`` (pixels) and
        ``image_counts`` of the K classes, ``total_pixels`` (ignored ones too) for shares of all pixels, ``files``,
        ``dataset``, ``class_names``, ``unit``, ``source``, and :func:`checksum`.

    Raises:
        InputError: no ``LoadAnnotations`` in the pipeline, an annotation that is missing or can't be read, or labels
            outside [0, K) that are not ``ignore_index``: the first problem, and how many there are.
    """
    before = checksum(dataset, num_classes, ignore_index)  # of what is about to be read
    samples = Annotations(dataset, num_classes, ignore_index)
    pixels = np.zeros(num_classes, dtype=np.int64)
    images = np.zeros(num_classes, dtype=np.int64)
    total, problems = 0, []
    for outcome in read(samples, workers=workers, progress="counting pixels"):
        if isinstance(outcome, str):
            problems.append(outcome)
        else:
            counts, size = outcome
            pixels += counts
            images += counts > 0
            total += size
    if problems:
        raise InputError(problems[0] + (f" (and {len(problems) - 1} more annotations)" if problems[1:] else ""))
    names = class_names(dataset)
    dataset_name = " + ".join(dict.fromkeys(type(plain).__name__ for plain in plain_datasets(dataset)))
    return {
        "dataset": dataset_name,
        "unit": "pixels",
        "source": f"counted in {len(samples)} annotations as {dataset_name} loads them",
        "files": len(samples),
        "total_pixels": total,
        "checksum": before,
        "class_names": names,
        "train_counts": pixels.tolist(),
        "image_counts": images.tolist(),
    }


def checksum(dataset: Any, num_classes: int, ignore_index: int = 255) -> str:
    """SHA-256 of what the counts depend on, without reading a mask: how they are loaded, all names, sizes and times.

    A copy of the data with other times has another one: then the pixels are counted again.
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
    """The annotations of a dataset, each as its counts or as the sentence about what is wrong with it.

    An item is ``((K,) int64 pixels per class, number of all pixels)``, or a sentence.

    Raises:
        InputError: no ``LoadAnnotations`` in a pipeline.
    """

    def __init__(self, dataset: Any, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.parts = []
        for plain in plain_datasets(dataset):
            loader = loader_of(plain, LoadAnnotations)
            if loader is None:
                raise InputError(
                    f"expected LoadAnnotations in the pipeline of {type(plain).__name__}, got "
                    f"{some(type(getattr(one, 'loader', one)).__name__ for one in plain.pipeline.transforms) or 'none'}"
                )
            self.parts.append((plain, Guarded(loader, num_classes, ignore_index)))
        self.places = [(part, index) for part, (plain, _) in enumerate(self.parts) for index in range(len(plain))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int):
        part, index = self.places[place]
        plain, loader = self.parts[part]
        results = plain.get_data_info(index)
        try:
            loader(results)
        except InputError as error:
            return str(error)
        labels = results["gt_seg_map"]
        return count_labels(labels, self.ignore_index, self.num_classes), labels.size


def read(
    samples: Annotations, chosen: Iterable[int] | None = None, workers: int | None = None, progress: str = ""
) -> Iterator:
    """The items of ``samples`` in order, read by ``workers`` processes, with a progress bar of this name."""
    chosen = range(len(samples)) if chosen is None else list(chosen)
    if workers is None:
        workers = min(8, usable_cpus())
    if len(chosen) < 50:
        workers = 0  # not worth their start
    # A generator of its own: a run draws the same random numbers whether its counts were kept or counted.
    generator = torch.Generator()
    loader = DataLoader(
        samples, batch_size=8, sampler=chosen, num_workers=workers, collate_fn=list, generator=generator
    )
    with tqdm(total=len(chosen), desc=progress, unit="file", disable=not progress, mininterval=1) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))
