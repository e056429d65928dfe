"""The cost of a stage-two step of segmentation, beside others of the same model on the same images.

    python benchmarks/segmentation_step.py [--crop 512 512] [--images 1] [--repeats 5] [--amp]
    python benchmarks/segmentation_step.py --images 4 --repeats 10    # for a GPU: ADE20K's batch on each of 4
    python benchmarks/segmentation_step.py --crop 64 96 --repeats 1 --classes 5   # a quick one

Ratios to the frozen forward alone (trunk, head and scores; no calibration, loss or gradient) and, in memory, to stage
two as the official code does it: frozen by requires_grad, with the auxiliary head's loss and the head's accuracy
computed for nothing, on upsampled logits.

Weights, images and labels (a tenth is 255) are random, the learning rate is 0. The steps take turns in one process
after some of each to warm up; ratios are medians over the turns (least to most). The peak memory is that of a step:
resident on a CPU, in a process of its own and above what the imports take; allocated on a GPU. Images are on the device
beforehand. In float32 a GPU convolves in TF32, torch's default; --amp is MMEngine's and needs a GPU.
"""

import argparse
import copy
import functools
import os
import sys

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from timing import DEVICE, amp_argument, measure, ran_on, report

from disalign import InputError
from disalign.cli import command
from disalign_mmseg import mmseg_config

STEPS = {
    "full": "full fine-tuning",
    "official": "stage two, official style",
    "plain": "stage two, plain loss",
    "exact": "stage two",
    "sampled": "stage two, sampled pixels",
    "forward": "frozen forward alone",
}


def settings(args) -> Config:
    """The model's config, for one process and images of the given size."""
    path = args.config if os.path.isfile(args.config) else mmseg_config(args.config)
    model = Config.fromfile(path).model
    model.pretrained = None
    model.data_preprocessor.size = tuple(args.crop)
    for head in (model.decode_head, model.auxiliary_head):
        head.num_classes = args.classes
    return model


def build(name, cfg, sampled_pixels, amp=False):
    """The model in training mode, and its optimizer or None."""
    cfg = copy.deepcopy(cfg)
    init_default_scope("mmseg")
    if name not in ("full", "forward"):
        cfg.decode_head.type = f"DisAlign{cfg.decode_head.type}"
    if name in ("plain", "exact", "sampled"):
        cfg.type = f"DisAlign{cfg.type}"
        counts = list(range(1, cfg.decode_head.num_classes + 1))  # any counts cost the same
        how = {"plain": dict(upsample="plain"), "sampled": dict(sampled_pixels=sampled_pixels)}.get(name, {})
        cfg.decode_head.loss_decode = dict(type="GRWCrossEntropyLoss", class_counts=counts, **how)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg)).train(name != "forward")
    if name == "official":
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(".calibration." in path)
    model.to(DEVICE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapper = AmpOptimWrapper if amp else OptimWrapper
    return model, None if name == "forward" else wrapper(optimizer=torch.optim.SGD(trained, lr=0.0))


def inputs(cfg, images) -> dict:
    """Random images and labels, a tenth of which is ignored."""
    torch.manual_seed(0)
    size = cfg.data_preprocessor.size
    batch = {"inputs": [], "data_samples": []}
    for _ in range(images):
        label = torch.randint(cfg.decode_head.num_classes, (1, *size))
        label[torch.rand(label.shape) < 0.1] = 255
        batch["inputs"].append(torch.randint(256, (3, *size), dtype=torch.uint8).to(DEVICE))
        batch["data_samples"].append(SegDataSample(gt_sem_seg=PixelData(data=label)))
    return batch


def step(model, optimizer, amp, batch) -> dict:
    """Its log."""
    batch = {"inputs": list(batch["inputs"]), "data_samples": [sample.clone() for sample in batch["data_samples"]]}
    if optimizer is not None:
        return model.train_step(batch, optimizer)
    with torch.no_grad(), torch.autocast(DEVICE, enabled=amp):
        model(model.data_preprocessor(batch, True)["inputs"], mode="tensor")
    return {}


def prepare(cfg, args, name):
    torch.backends.cudnn.benchmark = True  # as in the configs
    return functools.partial(step, *build(name, cfg, args.sampled_pixels, args.amp), args.amp, inputs(cfg, args.images))


@command
def main(argv=None):
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--config",
        default="fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py",
        help="of MMSegmentation's own, or a file; with a decode head that has a DisAlign form, and one auxiliary head",
    )
    arguments.add_argument("--crop", type=int, nargs=2, default=[512, 512], help="height and width")
    arguments.add_argument("--classes", type=int, default=150)
    arguments.add_argument("--images", type=int, default=1)
    arguments.add_argument("--sampled-pixels", type=int, default=4096, help="of each image")
    arguments.add_argument("--repeats", type=int, default=5, help="turns")
    amp_argument(arguments)
    arguments.add_argument("--out", help="also write the table, and the seconds of each turn, to this JSON")
    args = arguments.parse_args(argv)
    if args.amp and DEVICE == "cpu":
        raise InputError("expected a GPU for --amp, got none; leave it out")
    build_step = functools.partial(prepare, settings(args), args)
    memory, seconds, _ = measure(list(STEPS), build_step, args.repeats, DEVICE, "disalign_mmseg")

    facts = ran_on(DEVICE, args.amp, args.repeats)
    about = (
        f"{os.path.basename(args.config)}, {args.images} image(s) of {args.crop[0]}x{args.crop[1]}, "
        f"K = {args.classes}, {args.sampled_pixels} sampled pixels an image"
    )
    to_forward, to_official = lambda name: (name, "forward"), lambda name: (name, "official")
    report(about, facts, ("it / forward", "it / official"), args.out, STEPS, memory, seconds, to_forward, to_official)


if __name__ == "__main__":
    sys.exit(main())
