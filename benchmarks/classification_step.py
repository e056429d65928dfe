"""The cost of a stage-two step of classification, and of a pass that collects features, beside other steps.

    python benchmarks/classification_step.py [--images 256] [--repeats 10] [--amp]     # for a GPU
    python benchmarks/classification_step.py --images 8 --repeats 3                    # for a CPU

A ResNet-50 at 224 pixels with K = 1000, as in configs/cls/imagenet_lt, whose batch is 32 on each of 8 GPUs. Ratios to
the frozen forward alone; in memory, to full fine-tuning.

Weights, images and labels are random, the learning rate is 0. The steps take turns in one process after some of each to
warm up; ratios are medians over the turns (least to most). The peak memory is that of a step: resident on a CPU, in a
process of its own and above what the imports take; allocated on a GPU. Images are on the device beforehand. A turn of
disalign.collect passes over --batches batches and counts as one of them: its digest of the trunk and its first image
are a cost of the whole pass. In float32 a GPU convolves in TF32, torch's default.
"""

import argparse
import functools
import sys

import timm
import torch
import torch.nn.functional as F
from timing import DEVICE, amp_argument, measure, ran_on, report, train
from torch.utils.data import DataLoader, Dataset

import disalign
from disalign.cli import command

STEPS = {
    "full": "full fine-tuning",
    "stage_two": "stage two",
    "collect": "collect, a batch",
    "forward": "frozen forward alone",
}


class Batches(Dataset):
    """One batch over and over, taken as a whole."""

    def __init__(self, images, labels, number):
        self.images, self.labels, self.number = images, labels, number

    def __len__(self):
        return self.number * len(self.images)

    def __getitems__(self, rows):
        return self.images[: len(rows)], self.labels[: len(rows)]


def build(name, args):
    """The model and the loss of a step; all models have the same weights."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=args.classes)
    loss = F.cross_entropy
    if name == "stage_two":
        model, loss = disalign.wrap_classifier(model, list(range(1, args.classes + 1)))  # any counts cost the same
        loss.to(DEVICE)
    return model.to(DEVICE).train(name in ("full", "stage_two")), loss


def forward(model, amp, images):
    with torch.no_grad(), torch.autocast(DEVICE, enabled=amp):
        model(images)


def collect(model, amp, loader):
    with torch.autocast(DEVICE, enabled=amp):
        return disalign.collect(model, loader, "fc")


def prepare(args, name):
    """The step, without arguments."""
    torch.backends.cudnn.benchmark = True  # as in the configs
    model, loss = build(name, args)
    images = torch.randn(args.images, 3, args.size, args.size, device=DEVICE)
    labels = torch.arange(args.images, device=DEVICE) % args.classes
    if name == "forward":
        return functools.partial(forward, model, args.amp, images)
    if name == "collect":
        data = Batches(images, labels.cpu(), args.batches)
        loader = DataLoader(data, args.images, collate_fn=tuple)
        return functools.partial(collect, model, args.amp, loader)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler(DEVICE, enabled=args.amp)
    return functools.partial(train, model, loss, torch.optim.SGD(trained, 0.0, 0.9), scaler, images, labels)


@command
def main(argv=None):
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="resnet50", help="of timm, with a classifier named fc")
    arguments.add_argument("--size", type=int, default=224, help="height and width")
    arguments.add_argument("--classes", type=int, default=1000)
    arguments.add_argument("--images", type=int, default=256)
    arguments.add_argument("--batches", type=int, default=8, help="of a turn of collect")
    arguments.add_argument("--repeats", type=int, default=10, help="turns")
    amp_argument(arguments)
    arguments.add_argument("--out", help="also write the table, and the seconds of each turn, to this JSON")
    args = arguments.parse_args(argv)
    memory, seconds, _ = measure(list(STEPS), functools.partial(prepare, args), args.repeats, DEVICE, "timm")
    seconds["collect"] = [whole / args.batches for whole in seconds["collect"]]

    about = f"{args.model}, {args.images} image(s) of {args.size}x{args.size}, K = {args.classes}"
    facts = ran_on(DEVICE, args.amp, args.repeats)
    to_forward, to_full = lambda name: (name, "forward"), lambda name: (name, "full")
    report(about, facts, ("it / forward", "it / full"), args.out, STEPS, memory, seconds, to_forward, to_full)


if __name__ == "__main__":
    sys.exit(main())
