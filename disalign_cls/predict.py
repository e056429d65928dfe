"""Classify images: python -m disalign_cls.predict CONFIG CHECKPOINT IMAGE [IMAGE ...]

Prints JSON: for each image the five best classes and their softmax scores.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from tqdm import tqdm

from disalign import InputError
from disalign.cli import command, config_errors
from disalign.errors import some
from disalign.io import require_place, write_json
from disalign.io.images import image_files, open_image
from disalign_mmengine.checkpoints import class_names
from disalign_mmengine.cli import load_config, parser

from .cli import load_model
from .datasets import build_transforms


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__, checkpoint="of the config's model")
    arguments.add_argument("images", nargs="+", help="image files, or folders of them")
    arguments.add_argument("--out", help="write the JSON to this file, not to the screen")
    arguments.add_argument("--force", action="store_true", help="replace an existing --out")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    paths = find_images(args.images)
    if args.out:
        require_place(args.out, [config.filename, args.checkpoint, *paths], force=args.force)
    model, checkpoint = load_model(config, args.checkpoint)
    predictions = predict(model.to(get_device()), paths, config, class_names(checkpoint))
    if args.out:
        write_json(args.out, predictions)
    else:
        print(json.dumps(predictions, indent=2))


def find_images(given: list[str]) -> list[str]:
    """The files named, and the images below the folders named (:func:`disalign.io.images.image_files`)."""
    paths = []
    for path in map(Path, given):
        if not path.exists():
            raise InputError(f"expected image files or folders, but there is no {str(path)!r}")
        paths += image_files(str(path)) if path.is_dir() else [str(path)]
    if not paths:
        raise InputError(f"expected images in {some(given)}, got none")
    return paths


@torch.inference_mode()
def predict(model: Any, paths: list[str], config: Config, classes: list[str] | None) -> list[dict]:
    """For each image its path and the five best classes with their scores."""
    with config_errors(config.filename):
        transforms = build_transforms(config.test_dataloader.dataset.get("transforms", ()))
        mode = "L" if config.model.backbone.get("in_chans", 3) == 1 else "RGB"
    predictions = []
    for path in tqdm(paths, unit="image", disable=not sys.stderr.isatty()):
        pixels = transforms(open_image(path, mode))
        inputs = model.data_preprocessor({"inputs": pixels[None], "data_samples": None})["inputs"]
        scores, labels = model(inputs).softmax(1)[0].topk(min(5, model.num_classes))
        top = [
            {"label": label, "name": classes[label] if classes else None, "score": score}
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
        predictions.append({"image": path, "top5": top})
    return predictions


if __name__ == "__main__":
    sys.exit(main())
