"""The cost of a stage-two step of segmentation, beside others of the same model on the same images.

    python benchmarks/segmentation_step.py [--crop 512 512] [--images 1] [--repeats 5]
    python benchmarks/segmentation_step.py --crop 64 96 --repeats 1 --classes 5   # a quick one

Ratios to the frozen forward alone (trunk, head and scores; no calibration, loss or gradient) and, in memory, to stage
two as the official code does it: frozen by requires_grad, with the auxiliary head's loss and the head's accuracy
computed for nothing, on upsampled logits.

Weights, images and labels (a tenth is 255) are random, the learning rate is 0. The steps take turns in one process
after one of each to warm up; ratios are medians over the turns (least to most). The peak memory is that of two steps in
a process of its own: resident on a CPU, above what the imports take; allocated on a GPU.
"""

import argparse
import copy
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from tqdm import tqdm

from disalign.cli import command
from disalign.io import write_json
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


def build(name, cfg, sampled_pixels):
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
    if torch.cuda.is_available():
        model.cuda()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, None if name == "forward" else OptimWrapper(torch.optim.SGD(trained, lr=0.0))


def inputs(cfg, images) -> dict:
    """Random images and labels, a tenth of which is ignored."""
    torch.manual_seed(0)
    size = cfg.data_preprocessor.size
    batch = {"inputs": [], "data_samples": []}
    for _ in range(images):
        label = torch.randint(cfg.decode_head.num_classes, (1, *size))
        label[torch.rand(label.shape) < 0.1] = 255
        batch["inputs"].append(torch.randint(256, (3, *size), dtype=torch.uint8))
        batch["data_samples"].append(SegDataSample(gt_sem_seg=PixelData(data=label)))
    return batch


def step(model, optimizer, batch) -> tuple[float, dict]:
    """Its seconds and its log."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    batch = {"inputs": list(batch["inputs"]), "data_samples": [sample.clone() for sample in batch["data_samples"]]}
    wait()
    start = time.perf_counter()
    if optimizer is not None:
        logged = model.train_step(batch, optimizer)
    else:
        with torch.no_grad():
            model(model.data_preprocessor(batch, True)["inputs"], mode="tensor")
        logged = {}
    wait()
    return time.perf_counter() - start, logged


def peak_memory(name, cfg, sampled_pixels, images) -> float:
    """MiB, in a fresh process; the optimizer's state comes with the first step only."""
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    built, batch = build(name, cfg, sampled_pixels), inputs(cfg, images)
    for _ in range(2):
        step(*built, batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imports) / 2**10


def measure(cfg, args) -> tuple[dict, dict]:
    """By step: peak memory in MiB, and the seconds of each turn."""
    # A forkserver imports once, and its processes are small at the start; CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["disalign_mmseg"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        peaks = {
            name: pool.submit(peak_memory, name, cfg, args.sampled_pixels, args.images).result()
            for name in tqdm(STEPS, "memory")
        }
    batch = inputs(cfg, args.images)
    built = {name: build(name, cfg, args.sampled_pixels) for name in STEPS}
    seconds = {name: [] for name in STEPS}
    for _ in tqdm(range(args.repeats + 1), "turns"):
        for name in STEPS:
            seconds[name].append(step(*built[name], batch)[0])
    return peaks, {name: turns[1:] for name, turns in seconds.items()}


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
    arguments.add_argument("--out", help="JSON")
    args = arguments.parse_args(argv)
    cfg = settings(args)
    memory, seconds = measure(cfg, args)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = (
        f"{os.path.basename(args.config)}, {args.images} image(s) of {args.crop[0]}x{args.crop[1]}, "
        f"K = {args.classes}, {args.sampled_pixels} sampled pixels an image, torch {torch.__version__}, {device}, "
        f"{torch.get_num_threads()} thread(s), {args.repeats} turn(s)"
    )
    print(f"{about}\n\n| step | s | it / forward | peak MiB | it / official |\n|---|---|---|---|---|")
    rows = []
    for name, title in STEPS.items():
        ratios = [own / forward for own, forward in zip(seconds[name], seconds["forward"], strict=True)]
        row = {"step": title, "seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios)}
        row |= {"least": min(ratios), "most": max(ratios)}
        row |= {"peak_mib": memory[name], "peak_ratio": memory[name] / memory["official"]}
        rows.append(row)
        cells = "| {step} | {seconds:.3f} | {ratio:.2f} ({least:.2f}-{most:.2f}) | {peak_mib:.0f} | {peak_ratio:.2f} |"
        print(cells.format(**row))
    if args.out:
        write_json(args.out, {"about": about, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
