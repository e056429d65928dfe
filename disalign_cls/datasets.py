"""Datasets: list files, image folders, arrays, and the bundled digits."""

import os
import re
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from disalign.errors import InputError, first_line, some
from disalign.io import missing_files
from disalign.io.annotations import read_image_labels, read_list
from disalign.io.files import refuse_special
from disalign.io.images import MOST_CLASSES, image_tree, open_image


def build_transforms(steps: Sequence[dict]) -> v2.Compose:
    """torchvision transforms (v2), PIL image in, uint8 (C, H, W) tensor out; the model normalises.

    ``steps`` name them with their options, such as ``dict(type="RandomResizedCrop", size=224)``.
    """
    built = []
    for step in steps:
        options = dict(step)
        name = options.pop("type", None)
        try:
            built.append(getattr(v2, str(name))(**options))
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"expected torchvision.transforms.v2 and its options, got {dict(step)}: {error}") from None
    return v2.Compose([*built, v2.PILToTensor()])


class MissingFilesError(InputError):
    """Images that a list names but that do not exist; ``paths`` holds them all."""

    def __init__(self, sentence: str, paths: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.paths = list(paths)


class LongTailDataset(Dataset):
    """Base class of the datasets, which differ in where images and labels come from.

    Args:
        images: (N,) paths, whose existence is checked here, or (N, H, W, 3) or (N, H, W) uint8.
        labels: (N,), in [0, K).
        where: the source of both, for error messages.
        num_classes: K; default: the number of ``classes``, or else the largest label + 1.
        classes: names of the classes.
        transforms: see :func:`build_transforms`.
        name: of the dataset, for the log and the checkpoint.
        split: ``"train"``, ``"val"``, ``"test"`` ...; every metric is named after it.

    Raises:
        InputError: no images, missing images, a label outside [0, K), or a number of class names other than K.
    """

    def __init__(
        self,
        images: Sequence[str] | np.ndarray,
        labels: Any,
        where: str,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        transforms: Sequence[dict] = (),
        name: str = "",
        split: str = "train",
    ) -> None:
        self.images = images
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        if not len(self.labels):
            raise InputError(f"expected images in {where}, got none")
        if num_classes is None:
            num_classes = len(classes) if classes else min(int(self.labels.max()) + 1, MOST_CLASSES)
        paths = [] if isinstance(images, np.ndarray) else images
        wrong = ((self.labels < 0) | (self.labels >= num_classes)).nonzero().flatten().tolist()
        if wrong:
            named = [f"{int(self.labels[i])} of image {i}" + (f" ({paths[i]})" if paths else "") for i in wrong]
            raise InputError(
                f"expected labels in [0, {num_classes}) in {where}, but {len(wrong)} are not: {some(named)}"
            )
        if classes is not None and len(classes) != num_classes:
            raise InputError(f"expected {num_classes} class names in {where}, got {len(classes)}")
        absent = missing_files(paths)
        if absent:
            raise MissingFilesError(
                f"expected {len(paths)} images named in {where}, but {len(absent)} are missing: {some(absent, 3)}"
                "; check data_root (and rewrite, if the list uses another path style)",
                absent,
            )
        self.num_classes = num_classes
        self.transforms = build_transforms(transforms)
        self.metainfo = {"dataset": name, "split": split, "classes": list(classes) if classes else None}

    @property
    def class_counts(self) -> Tensor:
        """(K,) int64 images per class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """The image as passed to the transforms."""
        image = self.images[index]
        return open_image(image) if isinstance(image, str) else Image.fromarray(image)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": self.transforms(self.open(index)), "data_samples": self.labels[index]}


@DATASETS.register_module()
class ListDataset(LongTailDataset):
    """Images named in a ``path label`` list file, the format of ImageNet-LT, Places-LT and iNaturalist-2018.

    Args:
        ann_file: the list.
        data_root: what its paths are relative to.
        rewrite: ``[pattern, replacement, pattern, replacement, ...]`` for ``re.sub`` on each path, one pair after the
            other, for lists in another style than the folders (docs/datasets.md, Places-LT).
        options: :class:`LongTailDataset`'s.
    """

    def __init__(self, ann_file: str, data_root: str = "", rewrite: Sequence[str] = (), **options: Any) -> None:
        names, labels = read_list(ann_file, data_root)
        try:
            if isinstance(rewrite, str):
                raise TypeError("it is not a list")
            for pattern, replacement in zip(rewrite[::2], rewrite[1::2], strict=True):
                names = [re.sub(pattern, replacement, name) for name in names]
        except (re.error, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"expected pairs of a pattern and a replacement for re.sub in rewrite, got {rewrite!r}: {error}"
            ) from None
        super().__init__([os.path.join(data_root, name) for name in names], labels, where=repr(ann_file), **options)


@DATASETS.register_module()
class JsonDataset(LongTailDataset):
    """Images and their classes in a COCO-style JSON without boxes, as iNaturalist ships them (``train2018.json``).

    Args:
        ann_file: ``images`` with a ``file_name``, ``annotations`` with ``image_id`` and ``category_id``, one of each
            image, and ``categories``, which give the labels in the order of their ids.
        data_root: what the file names are relative to.
        options: :class:`LongTailDataset`'s.
    """

    def __init__(self, ann_file: str, data_root: str = "", **options: Any) -> None:
        names, labels, classes = read_image_labels(ann_file)
        options.setdefault("classes", classes)
        super().__init__([os.path.join(data_root, name) for name in names], labels, where=repr(ann_file), **options)


@DATASETS.register_module()
class FolderDataset(LongTailDataset):
    """One folder per class.

    Args:
        data_root: the folder that holds them.
        classes: the folders' names in the order of the labels; default: those found, in alphabetical order.
        options: :class:`LongTailDataset`'s.

    Raises:
        InputError: no such folder, or a folder that ``classes`` does not name.
    """

    def __init__(self, data_root: str, classes: Sequence[str] | None = None, **options: Any) -> None:
        classes, found = image_tree(data_root, classes)
        paths, labels = [path for path, _ in found], [label for _, label in found]
        super().__init__(paths, labels, where=repr(data_root), classes=classes, **options)


@DATASETS.register_module()
class ArrayDataset(LongTailDataset):
    """Images from a CIFAR-like ``.npz`` file.

    Args:
        file: holds ``{split}_images`` (N, H, W, 3) or (N, H, W) uint8 and ``{split}_labels`` (N,), and perhaps
            ``class_names``.
        split: which of them.
        options: :class:`LongTailDataset`'s.
    """

    def __init__(self, file: str, split: str = "train", **options: Any) -> None:
        refuse_special(file, f"'{split}_images' and '{split}_labels'")
        try:
            _refuse_bomb(file)
            with np.load(file, allow_pickle=False) as arrays:
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
                if "class_names" in arrays:
                    options.setdefault("classes", [str(name) for name in arrays["class_names"]])
        except Exception as error:  # a broken file can raise anything in a reader
            raise InputError(
                f"expected '{split}_images' and '{split}_labels' in {file!r}, but: {first_line(error)}; make it again"
            ) from None
        shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        whole = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        if images.dtype != np.uint8 or not shaped or not whole:
            raise InputError(
                f"expected uint8 images (N, H, W, 3) or (N, H, W) and N whole labels in {file!r}, got {images.dtype} "
                f"{images.shape} and {labels.dtype} {labels.shape}"
            )
        super().__init__(images, labels, split=split, where=repr(file), **options)


def _refuse_bomb(file: str) -> None:
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            # No images, not even drawings, compress a hundredfold.
            if record.file_size > max(100 * record.compress_size, 1 << 28):
                raise ValueError(f"{record.filename} would unpack {record.compress_size} bytes to {record.file_size}")


@DATASETS.register_module()
class DigitsLT(LongTailDataset):
    """scikit-learn's bundled handwritten digits (8 x 8, real), made long-tailed: 242 training images, 100 down to 1.

    The test split is balanced, 50 images per class, and shares no image with training.

    Args:
        split: ``"train"``, ``"test"``, or ``"balanced"``: a training set without a long tail, 124 images of each digit,
            for the empirical bound (Sec. 3.1).
        seed: permutes which digit is rare, and which images are drawn.
        options: :class:`LongTailDataset`'s.
    """

    #: The exponential profile of imbalance 100: int(100 * 0.01 ** (j / 9)).
    profile = (100, 59, 35, 21, 12, 7, 4, 2, 1, 1)
    test_per_class = 50
    balanced_per_class = 124  # what the rarest digit has beside the test split

    def __init__(self, split: str = "train", seed: int = 0, **options: Any) -> None:
        from sklearn.datasets import load_digits

        if split not in ("train", "test", "balanced"):
            raise InputError(f"expected split 'train', 'test' or 'balanced' of the digits, got {split!r}")
        digits = load_digits()
        generator = np.random.default_rng(seed)
        rank = generator.permutation(10)
        per_digit = []
        for digit in range(10):
            indices = generator.permutation(np.flatnonzero(digits.target == digit))
            held_out, rest = np.split(indices, [self.test_per_class])
            size = self.balanced_per_class if split == "balanced" else self.profile[rank[digit]]
            per_digit.append(held_out if split == "test" else rest[:size])
        chosen = np.concatenate(per_digit)
        images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        options.setdefault("classes", [str(digit) for digit in range(10)])
        super().__init__(images, digits.target[chosen], split=split, where="scikit-learn's digits", **options)
