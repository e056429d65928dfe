"""Make the long-tailed CIFAR file that configs/cls/cifar_lt reads: python scripts/make_cifar_lt.py cifar100 OUT.npz

Class c of K keeps its first int(n_max * (1 / imbalance) ** (c / (K - 1))) training images in the dataset's own order;
nothing is drawn at random, so the same arguments give the same images anywhere. The test images are unchanged.
"""

import argparse
import math
import os
import sys

import numpy as np
from torchvision import datasets

from disalign import InputError
from disalign.cli import command
from disalign.errors import first_line
from disalign.io import atomic_file, require_place

DATASETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def long_tailed_indices(labels, imbalance: float) -> np.ndarray:
    """Select the images of a balanced dataset that form the long-tailed one.

    Args:
        labels: (N,) labels in [0, K), each occurring n_max times (if they differ, n_max is the rarest one's).
        imbalance: ratio of the first class's images to the last one's, in the exponential profile above.

    Returns:
        Indices into ``labels``, ascending.

    Raises:
        InputError: an imbalance below 1, or one that leaves the last class without any image.
    """
    labels = np.asarray(labels, dtype=np.int64)
    available = np.bincount(labels)
    n_max, last = int(available.min()), max(len(available) - 1, 1)
    if not 1 <= imbalance <= n_max:
        raise InputError(f"expected an imbalance from 1 to {n_max}, the images per class, got {imbalance:g}")
    counts = [int(n_max * (1 / imbalance) ** (label / last)) for label in range(len(available))]
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)]))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("out", help="the .npz file to write; the configs read data/DATASET_lt_if100.npz")
    parser.add_argument("--imbalance", type=float, default=100.0, help="largest class over smallest; default: 100")
    parser.add_argument("--root", default="data/cifar", help="where CIFAR is or is downloaded to; default: data/cifar")
    parser.add_argument("--no-download", action="store_true", help="only use the files in --root")
    parser.add_argument("--force", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    if not args.out.endswith(".npz") or os.path.isdir(args.out):
        raise InputError(f"expected the name of an .npz file to write, got {args.out!r}; name another")
    require_place(args.out, option="OUT", force=args.force)
    if not 1 <= args.imbalance < math.inf:
        raise InputError(f"expected an imbalance of at least 1, got {args.imbalance:g}; change --imbalance")
    of_name = getattr(datasets, DATASETS[args.dataset])
    try:
        train, test = (of_name(args.root, train=split, download=not args.no_download) for split in (True, False))
    except (OSError, RuntimeError) as error:
        hint = "leave out --no-download" if args.no_download else f"fetch {of_name.url} and unpack it there by hand"
        # The first sentence: torchvision's second one is advice for its callers.
        reason = first_line(error).split(". ")[0]
        raise InputError(f"expected {args.dataset} in {args.root!r}, but: {reason}; {hint}") from None
    labels = np.asarray(train.targets, dtype=np.int64)
    kept = long_tailed_indices(labels, args.imbalance)
    arrays = {
        "train_images": train.data[kept],
        "train_labels": labels[kept],
        "test_images": test.data,
        "test_labels": np.asarray(test.targets, dtype=np.int64),
        "class_names": np.array(train.classes),
    }
    with atomic_file(args.out) as file:
        np.savez(file, **arrays)
    counts = np.bincount(labels[kept])
    print(
        f"{args.out}: {len(kept)} training images of {len(counts)} classes, {counts.max()} down to {counts.min()}; "
        f"{len(test.data)} test images"
    )


if __name__ == "__main__":
    sys.exit(main())
