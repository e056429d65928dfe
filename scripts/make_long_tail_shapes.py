"""Make the long-tail shapes that configs/d2/shapes reads: python scripts/make_long_tail_shapes.py

An instance segmentation set in LVIS v1's format: ten shapes, solid or striped, overlapping, on noisy backgrounds.
Colours are random and independent of the class. The classes have from --most down to 2 training instances, in
geometric steps, in an order drawn from the seed. In the validation set all have the same number. The same seed gives
the same files.
"""

import argparse
import filecmp
import json
import os
import sys
import tempfile

import cv2
import numpy as np
from tqdm import tqdm

from disalign import InputError
from disalign.cli import command
from disalign.io import require_folder
from disalign.splits import frequent_common_rare

SIZE = 128  # of an image, in pixels
SCALE = 4  # shapes are drawn this much larger: smooth edges, and outlines that are exact to a fraction of a pixel
FEWEST = 2
CROWDED = 6  # shapes per image at most, on average
TEXTURES = ("solid", "striped")


def _around(radii, angles):
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular(corners):
    return _around(1, np.arange(corners) * 2 * np.pi / corners)


def _crescent():
    back = _around(1, np.linspace(np.pi / 2, 3 * np.pi / 2, 40))
    return np.array([*back, *back[::-1] * [0.2, 1]])


def _heart():
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1)


#: The corners of the outlines, (N, 2).
SHAPES = {
    "arrow": [[-10, -3], [0, -3], [0, -8], [10, 0], [0, 8], [0, 3], [-10, 3]],
    "circle": _regular(60),
    "crescent": _crescent(),
    "cross": [
        [1, 3],
        [1, 1],
        [3, 1],
        [3, -1],
        [1, -1],
        [1, -3],
        [-1, -3],
        [-1, -1],
        [-3, -1],
        [-3, 1],
        [-1, 1],
        [-1, 3],
    ],
    "heart": _heart(),
    "pentagon": _regular(5),
    "square": _regular(4),
    "star": _around(np.tile([1, 0.42], 5), np.arange(10) * np.pi / 5),
    "tee": [[-3, -3], [3, -3], [3, -1], [1, -1], [1, 3], [-1, 3], [-1, -1], [-3, -1]],
    "triangle": _regular(3),
}
SHAPES = {name: corners / np.linalg.norm(corners, axis=1).max() for name, corners in SHAPES.items()}  # radius 1
CLASSES = [(shape, texture) for shape in SHAPES for texture in TEXTURES]


def _colour(rng, *others):
    """A random colour, clearly different from the others."""
    while True:
        colour = rng.integers(0, 256, 3)
        if all(np.linalg.norm(colour - other) > 100 for other in others):
            return colour


def draw(rng, labels):
    """Draw one image with a shape for each label, later ones in front, at least 60 % of each visible.

    Args:
        rng: a numpy generator.
        labels: indices into ``CLASSES``.

    Returns:
        (SIZE, SIZE, 3) uint8 BGR image, and for each label the polygons of its visible part, in pixels.
    """
    large = SIZE * SCALE
    base = _colour(rng)
    canvas = base + cv2.resize(rng.normal(0, 25, (6, 6, 3)).astype(np.float32), (large, large))
    owner = np.zeros((large, large), dtype=np.uint8)  # 1 + the index of the shape that is seen there
    areas, seen = np.array([large**2]), np.array([large**2])
    for number, label in enumerate(labels, start=1):
        shape, texture = CLASSES[label]
        while True:
            angle, radius = rng.uniform(-0.5, 0.5), rng.uniform(9, 22)
            rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            corners = SHAPES[shape] @ rotation * radius + rng.uniform(radius, SIZE - radius, 2)
            mask = cv2.fillPoly(np.zeros_like(owner), [np.round(corners * SCALE).astype(np.int32)], 1)
            rows, columns = np.nonzero(mask)
            left = seen - np.bincount(owner[rows, columns], minlength=number)
            if (left[1:] >= 0.6 * areas[1:]).all():
                break
        owner[rows, columns] = number
        areas, seen = np.append(areas, len(rows)), np.append(left, len(rows))
        canvas[rows, columns] = colour = _colour(rng, base)
        if texture == "striped":
            direction, period = rng.uniform(0, np.pi), rng.uniform(5, 8) * SCALE
            across = columns * np.cos(direction) + rows * np.sin(direction)
            stripes = across % period < period / 2
            canvas[rows[stripes], columns[stripes]] = _colour(rng, base, colour)
    image = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA) + rng.normal(0, 12, (SIZE, SIZE, 3))
    image = np.clip(image, 0, 255).astype(np.uint8)
    return image, [_polygons(owner == number) for number in range(1, len(labels) + 1)]


def _polygons(mask):
    """Outlines of a mask that is SCALE times larger; as in LVIS, they have no holes, and specks are left out."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contours = [cv2.approxPolyDP(contour, SCALE / 4, True)[:, 0] for contour in contours]
    return [(contour + 0.5) / SCALE for contour in contours if cv2.contourArea(contour) >= 4 * SCALE**2]


def make_split(rng, folder, split, counts, num_images, first_id):
    """Write the images of a split and return LVIS's lists of images and annotations."""
    os.makedirs(os.path.join(folder, split))
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), counts))
    images, annotations = [], []
    for image_id, present in enumerate(tqdm(np.array_split(labels, num_images), desc=split), start=first_id):
        picture, outlines = draw(rng, present)
        name = f"{image_id:06d}.png"
        with open(os.path.join(folder, split, name), "wb") as file:  # cv2's own writer reports no full disk
            file.write(cv2.imencode(".png", picture)[1])
        # Federated, as in LVIS: half of the absent classes are known to be absent, and occasionally one that is
        # present is not annotated exhaustively.
        absent = np.setdiff1d(np.arange(len(CLASSES)), present)
        images.append(
            {
                "id": image_id,
                "width": SIZE,
                "height": SIZE,
                "coco_url": f"long_tail_shapes/{split}/{name}",
                "neg_category_ids": (absent[rng.random(len(absent)) < 0.5] + 1).tolist(),
                "not_exhaustive_category_ids": [int(label) + 1 for label in np.unique(present) if rng.random() < 0.05],
            }
        )
        for label, polygons in zip(present, outlines, strict=True):
            points = np.concatenate(polygons)
            (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "segmentation": [polygon.ravel().tolist() for polygon in polygons],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(sum(cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons)),
                }
            )
    return images, annotations


def make_categories(annotations):
    """LVIS's list of categories; counts and r/c/f letters are the training set's."""
    pairs = [(annotation["category_id"] - 1, annotation["image_id"]) for annotation in annotations]
    instances = np.bincount([label for label, _ in pairs], minlength=len(CLASSES))
    images = np.bincount([label for label, _ in set(pairs)], minlength=len(CLASSES))
    groups = frequent_common_rare(images.tolist())
    return [
        {
            "id": label + 1,
            "name": f"{texture}_{shape}",
            "synset": f"{texture}_{shape}.n.01",
            "synonyms": [f"{texture}_{shape}"],
            "def": f"a {texture} {shape}",
            "instance_count": int(instances[label]),
            "image_count": int(images[label]),
            "frequency": next(letter for letter, members in groups.items() if members[label]),
        }
        for label, (shape, texture) in enumerate(CLASSES)
    ]


def make(folder, seed, num_images, counts, val_per_class):
    """Write both splits below ``folder``; see the module's docstring."""
    rng = np.random.default_rng(seed)
    counts = rng.permutation(counts)
    val_counts = np.full_like(counts, val_per_class)
    val_images = -(-val_counts.sum() * num_images // counts.sum())  # as crowded as the training images
    train = make_split(rng, folder, "train", counts, num_images, first_id=1)
    val = make_split(rng, folder, "val", val_counts, val_images, first_id=num_images + 1)
    categories = make_categories(train[1])
    for split, (images, annotations) in {"train": train, "val": val}.items():
        content = {
            "info": {"description": f"long-tail shapes, {split}, seed {seed}"},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        with open(os.path.join(folder, f"{split}.json"), "w") as file:
            json.dump(content, file)


def same(one, other):
    """Whether two folders hold the same files, byte for byte."""
    found = filecmp.dircmp(one, other)
    if found.left_only or found.right_only or found.common_funny:
        return False
    _, different, unreadable = filecmp.cmpfiles(one, other, found.common_files, shallow=False)
    return not different + unreadable and all(
        same(os.path.join(one, name), os.path.join(other, name)) for name in found.common_dirs
    )


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="datasets/long_tail_shapes", help="the folder to write; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=700, help="training images; default: %(default)s")
    parser.add_argument("--most", type=int, default=600, help="instances of the largest class; default: %(default)s")
    parser.add_argument("--val-per-class", type=int, default=40, help="validation instances; default: %(default)s")
    args = parser.parse_args(argv)
    if args.seed < 0 or args.most < FEWEST or args.val_per_class < 1:
        raise InputError(
            f"expected 0 or more as --seed, {FEWEST} as --most and 1 as --val-per-class, got {args.seed}, {args.most} "
            f"and {args.val_per_class}"
        )
    counts = np.round(np.geomspace(args.most, FEWEST, len(CLASSES))).astype(int)
    fewest_images = -(-counts.sum() // CROWDED)
    if not fewest_images <= args.images <= counts.sum():
        raise InputError(
            f"expected {fewest_images} to {counts.sum()} --images for {counts.sum()} instances, got {args.images}"
        )
    require_folder(args.out)
    out = os.path.abspath(args.out)
    try:
        os.makedirs(os.path.dirname(out), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(out), prefix=".") as temporary:
            new = os.path.join(temporary, "new")
            make(new, args.seed, args.images, counts, args.val_per_class)
            if not os.path.lexists(out):
                os.rename(new, out)
            elif not same(new, out):
                raise InputError(f"expected a new folder as --out, but {args.out!r} holds something else; name another")
    except OSError as error:
        raise InputError(
            f"expected a place to write {args.out!r}, but: {error.strerror or error}; free it, or give another"
        ) from None
    print(f"{args.out}: {args.images} training images, {len(CLASSES)} classes from {args.most} to {FEWEST} instances")


if __name__ == "__main__":
    sys.exit(main())
