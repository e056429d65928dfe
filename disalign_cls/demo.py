"""DisAlign on real images in a minute: python -m disalign_cls.demo

scikit-learn's handwritten digits, made long-tailed (100 images of one digit down to 1 of another), a small network
trained on them, DisAlign on top, and related methods on the same features: five seeds, linear and cosine classifier,
through the shipped configs configs/cls/digits. Prints tables; writes results.json, two pictures, and comparison.json of
each classifier for `disalign report`.
"""

import argparse
import os
import sys
import tempfile
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

from disalign import InputError, compare, many_medium_few
from disalign.cli import as_typed, command, usable_cpus
from disalign.comparison import chosen_methods, merged, table
from disalign.io import require_folder, write_json
from disalign_mmengine.cli import load_config

from .collect import collect_features
from .datasets import DigitsLT
from .plots import plot_accuracy, plot_calibration

SEEDS = (0, 1, 2, 3, 4)
CLASSIFIERS = {"linear": "", "cosine": "-cosine"}
COLUMNS = {"average": "average", "many": "many > 30", "medium": "medium 6-30", "few": "few <= 5", "ece": "ECE"}


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", default="demo_results", help="folder for results.json and the pictures")
    arguments.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments.add_argument("--methods", nargs="+", help="of disalign.compare, or all; default: those that need seconds")
    args = arguments.parse_args(argv)
    chosen_methods(args.methods, "classification", cosine=False)
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        raise InputError(
            f"expected --seeds from 0 to {2**32 - 1}, each once, got {' '.join(map(str, args.seeds))}; give others"
        )
    require_folder(args.out)

    tasks = [(seed, classifier) for seed in args.seeds for classifier in CLASSIFIERS]
    per_class = ", ".join(map(str, DigitsLT.profile))
    print(
        f"digits, {sum(DigitsLT.profile)} training images ({per_class} per class): "
        f"stage one and DisAlign with {len(CLASSIFIERS)} classifiers, seeds {' '.join(map(str, args.seeds))}"
    )
    # Several single-threaded processes: torch's own threads only slow down so small a network.
    workers = min(len(tasks), usable_cpus(), 8)
    # On the CPU everywhere, so that the figures do not depend on the machine's GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        found = pool.map(run, tasks, [folder] * len(tasks), [args.methods] * len(tasks))
        runs = list(tqdm(found, total=len(tasks), unit="run", desc="training", file=sys.stderr))

    out = Path(args.out)
    for classifier in CLASSIFIERS:
        content = merged([one["comparison"] for one in runs if one["classifier"] == classifier])
        content |= {"columns": COLUMNS, "command": as_typed(run, argv)}
        print(f"\n{classifier} classifier, test accuracy in %\n\n{table(content)}")
        write_json(out / classifier / "comparison.json", content)
    kept = [{key: value for key, value in one.items() if key != "comparison"} for one in runs]
    write_json(out / "results.json", {"profile": DigitsLT.profile, "torch": torch.__version__, "runs": kept})
    pictures(runs, out)
    print(f"\nwritten to {out}: results.json, accuracy_per_class.png, calibration.png, */comparison.json")
    print(f"to view it as a page: disalign report {out / 'linear'}")


def run(task: tuple[int, str], folder: str, methods: Sequence[str] | None = None) -> dict:
    """Train stage one and DisAlign for one seed and classifier, and compare, all on the same test images."""
    seed, classifier = task
    config = f"{CLASSIFIERS[classifier]}_cnn_1xb64-60e_digits-lt"
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
    bound = load_config("cls/digits/bound_cnn_digits-lt.py", {"train_dataloader.dataset.seed": seed})
    train_set, test_set, balanced = (
        collect_features(model, of, split)[0]
        for of, split in ((runner.cfg, "train"), (runner.cfg, "test"), (bound, "train"))
    )
    sensible = chosen_methods(["all"], "classification", cosine=classifier == "cosine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the networks have memorised their training set
        compared = compare(
            train_set,
            test_set,
            model.classifier,
            [name for name in chosen_methods(methods, "classification", cosine=False) if name in sensible],
            rho=model.loss.rho,
            groups=many_medium_few(train_set.class_counts, many=30, few=6),
            balanced=balanced,
            others={"DisAlign, 60 epochs": model.classifier},
            sweep=(0.0, 0.5, 1.0, 1.5, 2.0),
            seed=seed,
            dataset="digits-lt",
            split="test",
            classes=[f"rank {rank}" for rank in range(1, 11)],
        )
    return found | {"comparison": by_rank(compared)}


def by_rank(content: dict) -> dict:
    """Classes from many training images to few: which digit is rare changes with the seed."""
    order = sorted(range(10), key=lambda label: -content["class_counts"][label])

    def sort(values: list) -> list:
        return [values[label] for label in order]

    for method in (method for run in content["runs"] for method in run["methods"].values()):
        method["per_class"] = {name: sort(values) for name, values in method["per_class"].items()}
        method |= {name: sort(method[name]) for name in ("magnitude", "margin") if name in method}
    return content | {name: sort(content[name]) for name in ("class_counts", "group_of")}


def train(config: str, seed: int, work_dir: str, **options: Any) -> Runner:
    """One run of a shipped config, quietly."""
    split_seeds = {f"{split}_dataloader.dataset.seed": seed for split in ("train", "val", "test")}
    quiet = {"log_level": "ERROR", "default_hooks.checkpoint.interval": 60, "visualizer.vis_backends": []}
    place = {"work_dir": work_dir, "experiment_name": work_dir}
    runner = RUNNERS.build(load_config(config, {"randomness.seed": seed, **split_seeds, **quiet, **place, **options}))
    runner.train()
    return runner


def pictures(runs: list[dict], out: Path) -> None:
    """Accuracy per class before and after, and the learned calibration, one panel per classifier."""

    def panels(pick):
        """Title -> for each run, the picked values of its classes, from many training images to few."""
        result = {f"long-tailed digits, {classifier} classifier": [] for classifier in CLASSIFIERS}
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
