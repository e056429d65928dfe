"""Features of images by a pretrained trunk of timm: disalign features FOLDER_OR_LIST --model timm:NAME --out DIR

FOLDER_OR_LIST is a folder with one folder per class, or a list of "path label" lines. Every image is seen once, with
the transforms of the model's own evaluation. Continue with disalign.Features.open(DIR), disalign.fit and
disalign.sklearn.DisAlignClassifier. A killed pass resumes where it stopped.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from disalign import InputError, collect, load_file
from disalign.cli import command, log_to_stderr, usable_cpus
from disalign.errors import input_errors, some
from disalign.hand_over import require_tensors, state_dict_of
from disalign.io.annotations import read_list
from disalign.io.images import MOST_CLASSES, image_tree, open_image


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("images", help="a folder with one folder per class, or a list of 'path label' lines")
    arguments.add_argument("--data-root", default="", help="folder to which the list's paths are relative")
    arguments.add_argument("--model", required=True, help="timm:NAME")
    arguments.add_argument("--weights", help="its checkpoint; default: timm's pretrained one")
    arguments.add_argument("--out", required=True, help="folder for the features")
    arguments.add_argument("--fp16", action="store_true", help="keep them in half precision")
    arguments.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    arguments.add_argument("--workers", type=int, default=min(usable_cpus(), 8), help="default: %(default)s")
    arguments.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    args = arguments.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        raise InputError(f"expected --batch-size >= 1 and --workers >= 0, got {args.batch_size} and {args.workers}")

    log_to_stderr()
    trunk = load_trunk(args.model, args.weights)
    images = Images(args.images, args.data_root, transform_of(trunk))
    begun = time.perf_counter()
    with input_errors(f"expected a device that works as --device {args.device}", "give another"):
        trunk.to(args.device)
    features = collect(
        trunk,
        DataLoader(images, args.batch_size, num_workers=args.workers),
        out=args.out,
        dtype=torch.float16 if args.fp16 else torch.float32,
        data=repr(images),
    )
    seconds = time.perf_counter() - begun
    print(f"{args.out}: {features!r}, {seconds:.1f} s, {len(features) / seconds:.0f} images per second")


def load_trunk(model: str, weights: str | None) -> nn.Module:
    """A timm model without its classifier, in eval mode.

    Raises:
        InputError: no such model, weights that timm can't fetch, or a checkpoint without some of the trunk's tensors.
    """
    kind, _, name = model.partition(":")
    if kind != "timm" or not name:
        raise InputError(f"expected --model timm:NAME, got {model!r}; disalign.collect takes any other module")
    expected = f"expected a model of timm and its weights as --model {model}"
    with input_errors(expected, "see timm.list_models(pretrained=True), or give --weights FILE"):
        trunk: nn.Module = timm.create_model(name, pretrained=weights is None, num_classes=0)
    if weights is not None:
        target = trunk.state_dict()
        found = {key: tensor for key, tensor in state_dict_of(load_file(weights)).items() if key in target}
        require_tensors(found, target, f"tensors of {model}'s trunk", where=f" in {weights!r}")
        trunk.load_state_dict(found)
    return trunk.eval()


def transform_of(trunk: nn.Module) -> Any:
    """The transforms of the model's own evaluation: resizing, cropping, normalisation."""
    return create_transform(**resolve_model_data_config(trunk), is_training=False)


class Images(Dataset):
    """Images and labels of a folder with one folder per class, or of a list file."""

    def __init__(self, source: str, root: str, transform: Any) -> None:
        if os.path.isdir(source):
            _, labelled = image_tree(source)
            self.paths, self.labels = [path for path, _ in labelled], [label for _, label in labelled]
        else:
            paths, self.labels = read_list(source, root)
            self.paths = [os.path.join(root, path) for path in paths]
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing or not self.paths:
            raise InputError(
                f"expected images in {source!r}, but of {len(self.paths)} named there {len(missing)} are missing: "
                f"{some(missing, 3)}"
            )
        if not all(0 <= label < MOST_CLASSES for label in self.labels):
            raise InputError(f"expected labels from 0 on in {source!r}, got {min(self.labels)} to {max(self.labels)}")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(open_image(self.paths[index])), self.labels[index]

    def __repr__(self) -> str:
        content = hashlib.sha256(json.dumps([self.paths, self.labels]).encode()).hexdigest()
        return f"{len(self)} images, list {content}, {self.transform!r}"


if __name__ == "__main__":
    sys.exit(main())
