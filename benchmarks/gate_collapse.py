"""How often the confidence collapses, with and without gradient clipping.

    python benchmarks/gate_collapse.py CONFIG STAGE_ONE [--rho 1.2 1.5 2.0] [--seeds 6]

CONFIG is a stage-two config of images of one size (CIFAR's). The trunk is frozen and the images are not augmented, so
features and scores are computed once; then stage two runs on them as configured (SGD, cosine by epoch), with and
without clipping, for three starts of the confidence layer: zeros (disalign), uniform (torch) and weights of 0.1 (the
official release's classification). Collapsed: at the end the mean confidence over the training set is below 0.05.
Prints a table; --out writes JSON.
"""

import sys

import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from disalign import AdaptiveCalibration, GRWCrossEntropyLoss, load_stage_one
from disalign.cli import command
from disalign.io import write_json
from disalign_mmengine.checkpoints import load_checkpoint
from disalign_mmengine.cli import load_config, parser

THRESHOLD = 0.05
STARTS = {
    "zeros": lambda layer: None,
    "uniform": lambda layer: layer.reset_parameters(),
    "0.1": lambda layer: nn.init.constant_(layer.weight, 0.1),
}


@torch.no_grad()
def cached(config, stage_one):
    """Features, stage-one scores and labels of the whole training set, and its class counts."""
    model = MODELS.build(config.model).eval()
    load_stage_one(model, load_checkpoint(stage_one), name=stage_one)
    dataset = DATASETS.build(dict(config.train_dataloader.dataset, transforms=[]))
    features, logits, labels = [], [], []
    for batch in tqdm(DataLoader(dataset, batch_size=500), desc="features", file=sys.stderr):
        batch = model.data_preprocessor(batch)
        features.append(model.backbone(batch["inputs"]))
        logits.append(model.classifier.scores(features[-1])[0])
        labels.append(batch["data_samples"])
    return torch.cat(features), torch.cat(logits), torch.cat(labels), dataset.class_counts


def final_confidence(data, config, rho, seed, clip, start) -> float:
    """Mean confidence over the training set after stage two."""
    features, logits, labels, counts = data
    torch.manual_seed(seed)
    calibration = AdaptiveCalibration(logits.shape[1], features.shape[1])
    STARTS[start](calibration.confidence)
    loss = GRWCrossEntropyLoss(counts, rho)
    options = {key: value for key, value in config.optim_wrapper.items() if clip or key != "clip_grad"}
    optimizer = build_optim_wrapper(nn.ModuleDict({"calibration": calibration}), options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, config.train_cfg.max_epochs)
    for _ in range(config.train_cfg.max_epochs):
        for index in torch.randperm(len(labels)).split(config.train_dataloader.batch_size):
            optimizer.update_params(loss(calibration(logits[index], features[index]), labels[index]))
        schedule.step()
    with torch.no_grad():
        return float(calibration.confidence_score(features).mean())


@command
def main(argv=None):
    arguments = parser(__doc__, stage_one="checkpoint")
    arguments.add_argument("--rho", type=float, nargs="+", default=[1.2, 1.5, 2.0])
    arguments.add_argument("--seeds", type=int, default=6)
    arguments.add_argument("--out", help="JSON")
    args = arguments.parse_args(argv)
    config = load_config(args.config, args.cfg_options)
    torch.set_num_threads(1)
    MMLogger.get_instance("gate_collapse", log_level="ERROR")  # otherwise prints a line for each optimizer
    data = cached(config, args.stage_one)
    rows = []
    for start in STARTS:
        for rho in args.rho:
            for clip in (False, True):
                means = [final_confidence(data, config, rho, seed, clip, start) for seed in range(args.seeds)]
                collapsed = sum(mean < THRESHOLD for mean in means)
                rows.append({"start": start, "rho": rho, "clip": clip, "confidence": means})
                shown = " ".join(f"{mean:.2f}" for mean in means)
                clipped = "clipped" if clip else "not clipped"
                print(f"start {start:<7} rho {rho:<4} {clipped:<12} {collapsed}/{args.seeds}   {shown}")
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    sys.exit(main())
