"""DisAlign on real images in a minute: python -m disalign_cls.demo

scikit-learn's handwritten digits, made long-tailed (100 images of one digit down to 1 of another), a small network
trained on them, and DisAlign on top: five seeds, linear and cosine classifier, through the shipped configs
configs/cls/digits. Prints a table; writes results.json and two pictures.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from tqdm import tqdm

from disalign import InputError, fit
from disalign.cli import command, usable_cpus
from disalign.io import require_folder, write_json
from disalign.report import text_table
from disalign_mmengine.cli import load_config

from .collect import collect_features
from .datasets import DigitsLT
from .fit import evaluate
from .plots import plot_accuracy, plot_calibration

SEEDS = (0, 1, 2, 3, 4)
METHODS = {"linear": "", "cosine": "-cosine"}
GROUPS = ("top1", "many", "medium", "few")


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", default="demo_results", help="folder for results.json and the pictures")
    arguments.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = arguments.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        raise InputError(
            f"expected --seeds from 0 to {2**32 - 1}, each once, got {' '.join(map(str, args.seeds))}; give others"
        )
    require_folder(args.out)

    tasks = [(seed, classifier) for seed in args.seeds for classifier in METHODS]
    per_class = ", ".join(map(str, DigitsLT.profile))
    print(
        f"digits, {sum(DigitsLT.profile)} training images ({per_class} per class): "
        f"{len(args.seeds)} seeds x {len(METHODS)} classifiers, stage one and DisAlign"
    )
    # Several processes of one thread: torch's own threads only slow so small a network.
    workers = min(len(tasks), usable_cpus(), 8)
    # On the CPU everywhere, so that the figures do not depend on the machine's GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        found = pool.map(run, tasks, [folder] * len(tasks))
        runs = list(tqdm(found, total=len(tasks), unit="run", desc="training", file=sys.stderr))

    print(table(runs))
    out = Path(args.out)
    write_json(out / "results.json", {"profile": DigitsLT.profile, "torch": torch.__version__, "runs": runs})
    pictures(runs, out)
    print(f"\nwritten to {out}: results.json, accuracy_per_class.png, calibration.png")


def run(task: tuple[int, str], folder: str) -> dict:
    """Train stage one and DisAlign for one seed and classifier; both figures are of the same test images."""
    seed, classifier = task
    config = f"{METHODS[classifier]}_cnn_1xb64-60e_digits-lt"
    work_dir = f"{folder}/{seed}/{classifier}"
    train(f"cls/digits/baseline{config}.py", seed, f"{work_dir}/one")
    runner = train(f"cls/digits/disalign{config}.py", seed, f"{work_dir}/two", stage_one=f"{work_dir}/one/epoch_60.pth")
    model = runner.model
    found = {
        "seed": seed,
        "classifier": classifier,
        "report": runner.val_evaluator.metrics[0].report,
        "magnitude": model.classifier.calibration.magnitude.tolist(),
        "margin": model.classifier.calibration.margin.tolist(),
    }
    begun = time.perf_counter()
    features, _ = collect_features(model, runner.cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a training set known by heart
        fitted = fit(features, model.classifier, model.loss.rho)
    seconds = time.perf_counter() - begun
    model.classifier.load_state_dict(fitted.state_dict())
    test, dataset = collect_features(model, runner.cfg, "test")
    return found | {"fit": evaluate(model, test, dataset, runner.cfg), "fit_seconds": seconds}


def train(config: str, seed: int, work_dir: str, **options: Any) -> Runner:
    """One run of a shipped config, quietly."""
    split_seeds = {f"{split}_dataloader.dataset.seed": seed for split in ("train", "val", "test")}
    quiet = {"log_level": "ERROR", "default_hooks.checkpoint.interval": 60, "visualizer.vis_backends": []}
    place = {"work_dir": work_dir, "experiment_name": work_dir}
    runner = RUNNERS.build(load_config(config, {"randomness.seed": seed, **split_seeds, **quiet, **place, **options}))
    runner.train()
    return runner


def table(runs: list[dict]) -> str:
    """Mean and spread over the seeds, and the gain of each seed."""
    rows, gains = [["test accuracy, %", "average", "many > 30", "medium 6-30", "few <= 5"]], []
    for classifier in METHODS:
        reports = [one["report"] for one in runs if one["classifier"] == classifier]
        star = "*" if classifier == "cosine" else ""
        before = [report["stage_one"]["figures"] for report in reports]
        after = [report["figures"] for report in reports]
        fitted = [one["fit"]["figures"] for one in runs if one["classifier"] == classifier]
        for stage, figures in (("Baseline", before), ("DisAlign", after), ("DisAlign by fit", fitted)):
            cells = [mean_and_spread([one[group] for one in figures]) for group in GROUPS]
            rows.append([f"{stage}{star}, {classifier}" if stage != "DisAlign by fit" else f"{stage}{star}", *cells])
        gain = [two["top1"] - one["top1"] for one, two in zip(before, after, strict=True)]
        each = " ".join(f"{value:+.1f}" for value in gain)
        gains.append(f"gain of DisAlign{star}: {statistics.mean(gain):+.1f}   seeds: {each}")
    seconds = statistics.median(one["fit_seconds"] for one in runs)
    gains.append(f"by fit: one pass over the training images and the solver, {seconds:.1f} s (median)")
    return "\n".join(["", text_table(rows), "", *gains])


def mean_and_spread(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def pictures(runs: list[dict], out: Path) -> None:
    """Accuracy per class before and after, and the learned calibration, one panel per classifier."""

    def panels(pick):
        """Title -> per run the picked values of its classes, from many training images to few."""
        result = {f"long-tailed digits, {classifier} classifier": [] for classifier in METHODS}
        for one in runs:
            classes = sorted(zip(one["report"]["class_counts"], pick(one), strict=True), key=lambda pair: -pair[0])
            result[f"long-tailed digits, {one['classifier']} classifier"].append([value for _, value in classes])
        return result

    before = panels(lambda one: one["report"]["stage_one"]["per_class"]["accuracy"])
    after = panels(lambda one: one["report"]["per_class"]["accuracy"])
    plot_accuracy(out / "accuracy_per_class.png", DigitsLT.profile, before, after)
    magnitude, margin = panels(lambda one: one["magnitude"]), panels(lambda one: one["margin"])
    plot_calibration(out / "calibration.png", DigitsLT.profile, magnitude, margin)


if __name__ == "__main__":
    sys.exit(main())
