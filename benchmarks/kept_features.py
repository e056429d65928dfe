"""Every method on the kept features of a trained network: in seconds, without its images and without a GPU.

    python benchmarks/kept_features.py benchmarks/cifar100_lt_resnet32_60e.npz [--methods all] [--rho 1.2]
    disalign compare CONFIG --stage-one CHECKPOINT --methods ncm --features DIR --dtype float16
    python benchmarks/kept_features.py FILE --make CHECKPOINT DIR    # keeps the features that the line above collected

A file holds features in fp16 and labels of the training and the test set, and the weights of the linear classifier.
"""

import argparse
import sys

import numpy as np
import torch
from torch import nn

import disalign
from disalign import Features
from disalign.cli import command
from disalign.comparison import table
from disalign.io import atomic_file, load_file, write_json

SPLITS = ("train", "test")


def make(place, checkpoint, folder):
    state = load_file(checkpoint)["state_dict"]
    arrays = {name: state[f"classifier.{name}"].numpy() for name in ("weight", "bias")}
    for split in SPLITS:
        features = Features.open(f"{folder}/{split}")
        arrays |= {f"{split}_x": features.x.half().numpy(), f"{split}_y": features.y.numpy().astype(np.uint16)}
    with atomic_file(place) as file:
        np.savez_compressed(file, **arrays)


def opened(place):
    """Features of the training and the test set, and the classifier."""
    with np.load(place) as arrays:
        sets = [Features.from_arrays(arrays[f"{name}_x"], arrays[f"{name}_y"].astype(np.int64)) for name in SPLITS]
        weight, bias = (nn.Parameter(torch.from_numpy(arrays[name])) for name in ("weight", "bias"))
    classifier = nn.Linear(weight.shape[1], len(weight))
    classifier.weight, classifier.bias = weight, bias
    return *sets, classifier


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--make", nargs=2, metavar=("CHECKPOINT", "DIR"), help="write the file")
    parser.add_argument("--methods", nargs="+", default=["all"], help="default: all")
    parser.add_argument("--rho", type=float, default=1.2, help="default: %(default)s")
    parser.add_argument("--out", help="also write the comparison, for benchmarks/results.py and disalign report")
    args = parser.parse_args(argv)
    if args.make:
        make(args.file, *args.make)
    content = disalign.compare(*opened(args.file), args.methods, rho=args.rho, stage_one=args.file)
    if args.out:
        write_json(args.out, content)
    print(table(content))


if __name__ == "__main__":
    sys.exit(main())
