"""Make a tiny synthetic set in ADE20K's layout: python scripts/make_tiny_ade.py OUT

For tests and quick trials. images/{training,validation}/*.jpg show patches, each in its class's colour with noise;
annotations/{training,validation}/*.png hold their labels: 1..K in descending frequency, a long tail in which every
class occurs in both splits, and 0 for the unlabelled pixels that every image has. The same seed gives the same pixels.
"""

import argparse
import colorsys
import io
import os
import sys
import tempfile

import numpy as np
from PIL import Image

from disalign import InputError
from disalign.cli import command
from disalign.io import require_folder

MOST_CLASSES = 150
FEWEST_PATCHES = 6  # per image
FOLDERS = {"training": "train", "validation": "val"}


def colours(num_classes: int) -> np.ndarray:
    """(num_classes + 1, 3) uint8: grey for unlabelled pixels, then distant hues at varying brightness."""
    hues = [(label * 0.618034) % 1 for label in range(num_classes)]  # the golden ratio: neighbours differ most
    rgb = [colorsys.hsv_to_rgb(hue, (1, 0.6)[label % 2], (1, 0.75, 0.5)[label % 3]) for label, hue in enumerate(hues)]
    return np.round(255 * np.array([(0.5, 0.5, 0.5), *rgb])).astype(np.uint8)


def draw_labels(rng, height: int, width: int, labels) -> np.ndarray:
    """(height, width) uint8: a patch for each label and one of 0, each pixel the nearest centre's."""
    labels = np.append(labels, 0)
    centres = rng.choice(height * width, len(labels), replace=False)
    rows, columns = np.divmod(np.arange(height * width)[:, None], width)
    distances = (rows - centres // width) ** 2 + (columns - centres % width) ** 2
    return labels[distances.argmin(axis=1)].reshape(height, width).astype(np.uint8)


def make_split(rng, folder: str, split: str, num_images: int, size: int, num_classes: int) -> None:
    """Write a split's images and annotations."""
    for kind in ("images", "annotations"):
        os.makedirs(os.path.join(folder, kind, split))
    patches = patches_per_image(num_images, num_classes)
    shares = 1 / np.arange(1, num_classes + 1)
    drawn = rng.choice(num_classes, num_images * patches - num_classes, p=shares / shares.sum())
    labels = rng.permutation(np.append(drawn, np.arange(num_classes))) + 1
    palette = colours(num_classes)
    for number, present in enumerate(labels.reshape(num_images, patches), start=1):
        height, width = (
            rng.integers(size, size * 5 // 4, endpoint=True),
            rng.integers(size, size * 3 // 2, endpoint=True),
        )
        annotation = draw_labels(rng, height, width, present)
        image = np.clip(palette[annotation] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
        name = f"ADE_{FOLDERS[split]}_{number:08d}"
        save(image, os.path.join(folder, "images", split, f"{name}.jpg"), "JPEG", quality=95)
        save(annotation, os.path.join(folder, "annotations", split, f"{name}.png"), "PNG")


def save(pixels: np.ndarray, path: str, form: str, **options) -> None:
    """Write an image; on a full disk, Pillow's own writer truncates a JPEG without an error."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form, **options)
    with open(path, "wb") as file:
        file.write(content.getvalue())


def patches_per_image(num_images: int, num_classes: int) -> int:
    """Enough patches that at most half of a split's serve to make every tail class occur."""
    return max(FEWEST_PATCHES, -(-2 * num_classes // num_images))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--train", type=int, default=16, help="training images; default: %(default)s")
    parser.add_argument("--val", type=int, default=8, help="validation images; default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="least height and width; default: %(default)s")
    parser.add_argument("--classes", type=int, default=MOST_CLASSES, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if min(args.train, args.val, args.size) < 1 or args.seed < 0:
        raise InputError(
            f"expected at least 1 as --train, --val and --size and 0 as --seed, got {args.train}, {args.val}, "
            f"{args.size} and {args.seed}"
        )
    if not 1 <= args.classes <= MOST_CLASSES:
        raise InputError(f"expected 1 to {MOST_CLASSES} --classes, got {args.classes}")
    patches = max(patches_per_image(number, args.classes) for number in (args.train, args.val))
    if args.size**2 < 8 * patches:
        raise InputError(f"expected 8 pixels or more for each of an image's {patches} patches, got --size {args.size}")
    out = os.path.abspath(args.out)
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise InputError(f"expected a new or an empty folder, but {args.out!r} holds something; name another")
    require_folder(args.out)
    rng = np.random.default_rng(args.seed)
    try:
        os.makedirs(os.path.dirname(out), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(out), prefix=".") as temporary:
            new = os.path.join(temporary, "new")
            for split, number in (("training", args.train), ("validation", args.val)):
                make_split(rng, new, split, number, args.size, args.classes)
            os.rename(new, out)
    except OSError as error:
        raise InputError(
            f"expected a place to write {args.out!r}, but: {error.strerror or error}; free it, or give another"
        ) from None
    print(f"{args.out}: {args.train} training and {args.val} validation images of {args.classes} classes")


if __name__ == "__main__":
    sys.exit(main())
