"""Folders of images, single images and label masks. Pillow is imported only where a file is opened."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..errors import InputError, some
from .files import refuse_special

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

#: More classes than any benchmark has: a label beyond is a mistake.
MOST_CLASSES = 1_000_000


def files_below(folder: str, hidden_folders: bool = False) -> Iterator[str]:
    """All files below a folder, in no particular order; names that begin with a dot are left out.

    Links to files and to folders are followed, as the data loaders of the frameworks do. A broken link is listed:
    whoever opens it says so. A folder that can't be read, or a link to a folder that contains it, is refused.
    """
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        folders[:] = [name for name in folders if hidden_folders or not name.startswith(".")]
        for path in (os.path.join(place, name) for name in folders):
            if os.path.islink(path) and Path(place).resolve().is_relative_to(Path(path).resolve()):
                raise InputError(f"expected folders without end below {folder!r}, but {path!r} links back; remove it")
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def _refuse_folder(error: OSError) -> NoReturn:
    raise InputError(f"expected a folder that can be read at {error.filename!r}, but: {error.strerror}") from None


def image_files(folder: str) -> list[str]:
    """The images in a folder and in all below it, in alphabetical order folder by folder; hidden ones are left out."""
    return sorted((path for path in files_below(folder) if path.lower().endswith(IMAGE_SUFFIXES)), key=os.path.split)


def image_tree(folder: str, classes: Sequence[str] | None = None) -> tuple[list[str], list[tuple[str, int]]]:
    """The names of the classes, and path and label of each image, of a folder with one folder per class.

    Hidden folders are left out. ``classes`` names the folders in the order of the labels, some perhaps missing; by
    default those found are the classes, in alphabetical order.
    """
    if not os.path.isdir(folder):
        raise InputError(f"expected a folder with one folder per class at {folder!r}, but there is none")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise InputError(f"expected one folder per class in {folder!r}, got none")
    names = found if classes is None else list(classes)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise InputError(f"expected only folders named in classes in {folder!r}, got {some(unknown)}")
    labelled = [(os.path.join(folder, name), label) for label, name in enumerate(names) if name in found]
    return names, [(path, label) for place, label in labelled for path in image_files(place)]


def mask_files(folder: str, suffix: str = ".png") -> list[str]:
    """The label masks below a folder, at least one, sorted: those in hidden folders too, but no hidden files."""
    if not os.path.isdir(folder):
        raise InputError(f"expected a folder of label images at {folder!r}, but there is none")
    paths = [path for path in files_below(folder, hidden_folders=True) if path.endswith(suffix)]
    if not paths:
        raise InputError(
            f"expected label images {'*' + suffix!r} in {folder!r}, got none; name the end of their names with --suffix"
        )
    return sorted(paths, key=lambda path: path.replace(os.sep, "/"))


def open_image(path: str, mode: str = "RGB") -> "Image":
    """An image, decoded to its end, upright (EXIF) and converted to one of Pillow's modes; of 16 bits the upper 8."""
    from PIL import Image, ImageOps

    refuse_special(path, "an image")
    try:
        with Image.open(path) as image:
            # Old versions of Pillow give a PNG of 16 bits 32.
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                upright: Image.Image = ImageOps.exif_transpose(image)
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert(mode)
            if image.mode not in ("I", "F"):
                return ImageOps.exif_transpose(image).convert(mode)
            kind = image.mode
    except Exception as error:  # a broken file can break a decoder anywhere
        raise InputError(f"expected a whole image at {path!r}, but: {error}; fetch it again, or leave it out") from None
    raise InputError(
        f"expected an image of 8 or 16 bits per channel at {path!r}, got one of 32 (mode {kind}), whose range is not "
        "known; save it with 8"
    )


def read_mask(path: str, content: bytes | None = None) -> np.ndarray:
    """The (height, width) labels of a mask, bool or whole numbers; a palette's index is the label.

    ``content`` is the file's, if it has been read already. A broken file raises what Pillow does.
    """
    from PIL import Image

    if content is None:
        refuse_special(path, "a label mask")
    with Image.open(path if content is None else io.BytesIO(content)) as image:
        labels, mode = np.asarray(image), image.mode
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise InputError(
            f"expected one whole label per pixel in {path!r}, got an image of mode {mode}; save the labels as a "
            "grey-scale or palette image (photographs: give a folder with one folder per class)"
        )
    return labels


def require_labels(labels: np.ndarray, num_classes: int | None, ignore_index: int, path: str, note: str = "") -> None:
    """Refuse labels outside [0, K) that are not to be ignored: which, how many pixels of each, and where the first is.

    K is by default :data:`MOST_CLASSES`. ``path`` is the file, and ``note`` what was done to its labels.
    """
    num_classes = MOST_CLASSES if num_classes is None else num_classes
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        values, pixels = np.unique(labels[wrong], return_counts=True)
        rows, columns = wrong.nonzero()
        named = some(f"{pixel} are {value}" for value, pixel in zip(values, pixels, strict=True))
        raise InputError(
            f"expected labels 0..{num_classes - 1}, or {ignore_index} for ignored pixels, in {path!r}, but {len(rows)} "
            f"pixels are not: {named}{note}, the first at x {columns[0]}, y {rows[0]}; correct the annotation, or the "
            "classes"
        )


def count_labels(labels: np.ndarray, ignore_index: int, num_classes: int = 0) -> np.ndarray:
    """(K,) int64 pixels of each label that is not ignored; K is the largest one + 1, and at least ``num_classes``."""
    return np.bincount(labels[labels != ignore_index].astype(np.int64), minlength=num_classes)
