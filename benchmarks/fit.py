"""The cost of one pass and of the solver, and the effect of the penalty; one table each.

    python benchmarks/fit.py pass [--images 2000]        # a ResNet-50 at 224 pixels, random weights
    python benchmarks/fit.py solver                      # 10,847 x 64, K = 100, one thread
    python benchmarks/fit.py large [--rows 300000]       # x 1024, K = 1203 and a background, mapped from a file
    python benchmarks/fit.py imagenet [--classes 1000] [--width 2048]  # ImageNet-LT's counts, on a GPU if there is one
    python benchmarks/fit.py classes [--classes 100000]  # a whole fit of many classes, mapped from a folder
    python benchmarks/fit.py penalty                     # lambda, on long-tailed digits

Compared steps are timed in turns in one process; ratios are medians over the turns (least to most).
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import DEVICE, line, quotient, ran_on, ratio, turns
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import disalign
from disalign import Features, fitting, probes, solver
from disalign.cli import command
from disalign.io import write_json
from disalign.modules import plain_classifier
from disalign.report import text_table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

SGD = dict(lr=0.1, momentum=0.9)


def profile(classes: int, most: int, factor: float) -> Tensor:
    """(K,) counts that fall exponentially from ``most`` to ``most / factor`` (CIFAR-LT's)."""
    return (most * factor ** -(torch.arange(classes) / (classes - 1))).long()


def gaussians(counts: Tensor, width: int, spread: float, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(counts)), counts)
    centres = torch.randn(len(counts), width, generator=torch.Generator().manual_seed(99))
    return Features.from_arrays(centres[y] + spread * torch.randn(len(y), width, generator=generator), y)


def one_pass(args: argparse.Namespace) -> None:
    """Pass and fit against one inference pass and ten uncached epochs; each turn takes a fifth of the images."""
    import timm

    classes, rounds = 100, 5
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=classes).eval()
    share = args.images // rounds
    images = torch.randn(share, 3, 224, 224)
    labels = torch.arange(share) % classes
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    wrapped, loss = disalign.wrap_classifier(timm.create_model("resnet50", num_classes=classes), [10] * classes)
    learnt = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learnt, **SGD)
    collected: list[Features] = []

    def inference() -> None:
        with torch.inference_mode():
            for x, _ in loader:
                model(x)

    def collect() -> None:
        collected.append(disalign.collect(model, loader, "fc"))

    def uncached() -> None:
        for x, y in loader:
            optimizer.zero_grad()
            loss(wrapped(x), y).backward()
            optimizer.step()

    inference()
    found = turns(rounds, dict(inference=inference, collect=collect, uncached=uncached))
    x, y = torch.cat([part.x for part in collected]), torch.cat([part.y for part in collected])
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disalign.fit(Features.from_arrays(x, y), model.fc, 1.2)
    fitted = time.perf_counter() - begun
    both = [seconds + fitted / rounds for seconds in found["collect"]]
    print(f"{len(x)} images, {torch.get_num_threads()} thread(s); seconds per {share} images (median)")
    print(
        f"inference {statistics.median(found['inference']):.1f}, collect {statistics.median(found['collect']):.1f}, "
        f"an uncached epoch {statistics.median(found['uncached']):.1f}; fit {fitted:.2f} in all"
    )
    print(f"pass and fit / inference: {ratio(both, found['inference'])}")
    print(f"10 uncached epochs / pass and fit: {ratio([10 * one for one in found['uncached']], both)}")


def one_thread(args: argparse.Namespace) -> None:
    """The solver alone."""
    torch.set_num_threads(1)
    features = gaussians(profile(100, 500, 100.0), 64, 1.5)
    classifier = probes.new_classifier("linear", features)
    probes.train_classifier(classifier, features, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = turns(
            3,
            dict(
                plain=lambda: disalign.fit(features, classifier, 1.0),
                folds=lambda: disalign.fit(features, "linear", 1.0, C=1.0),
                chosen=lambda: disalign.fit(features, "linear", 1.0),
            ),
        )
    titles = {"plain": "fit", "folds": "fit, cross_fit=5, C given", "chosen": "fit, cross_fit=5, C chosen by the folds"}
    rows = [["", "s (median)", "least", "most"]]
    for name, title in titles.items():
        seconds = found[name]
        rows.append([title, *(f"{one:.2f}" for one in (statistics.median(seconds), min(seconds), max(seconds)))])
    print(f"{features!r}, one thread\n\n{text_table(rows)}")


def large(args: argparse.Namespace) -> None:
    """Evaluations over mapped features: time relative to the bare matrix product."""
    width, classes = 1024, 1203
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.npy"
        x = np.lib.format.open_memmap(path, "w+", np.float32, (args.rows, width))
        for start in range(0, args.rows, 10_000):
            x[start : start + 10_000] = random.standard_normal((len(x[start : start + 10_000]), width), np.float32)
        x.flush()
        del x
        mapped = np.load(path, mmap_mode="c")
        counts = random.integers(1, 2000, classes)
        features = Features.from_arrays(
            mapped, random.integers(classes + 1, size=args.rows), class_counts=counts, background=True
        )
        torch.manual_seed(0)
        classifier = nn.Linear(width, classes + 1)
        seconds: dict[str, list[float]] = {"bare": [], "evaluation": []}

        def bare() -> None:
            with torch.no_grad():
                for chunk in solver.Part(classifier, features).chunks():
                    classifier(chunk.x)

        def measured(parameters, evaluate, penalty, *options):
            found = turns(args.turns, dict(bare=bare, evaluation=evaluate))
            seconds.update(found)
            return solver.Solution(0.0, 0.0, args.turns, False)

        keep, fitting.minimise = fitting.minimise, measured
        disalign.fit(features, classifier, 0.8, confidence=args.confidence)
        fitting.minimise = keep
    print(f"{features!r}, {torch.get_num_threads()} thread(s), confidence {args.confidence}")
    print(
        f"an evaluation {statistics.median(seconds['evaluation']):.1f} s, / its bare product: "
        f"{ratio(seconds['evaluation'], seconds['bare'])}"
    )


def imagenet(args: argparse.Namespace) -> None:
    """The plain fit on as many features as ImageNet-LT has images, kept in several ways."""
    counts = disalign.load_class_counts("imagenet_lt").sort(descending=True).values
    counts = counts[torch.linspace(0, len(counts) - 1, args.classes).long()]
    # At the full size four of five are then classified right.
    spread = args.width**0.5 / 4
    features = gaussians(counts, args.width, spread)
    # The optimum for these features: by Bayes' rule, with the training set's prior.
    centres = torch.randn(args.classes, args.width, generator=torch.Generator().manual_seed(99)) / spread
    classifier = nn.Linear(args.width, args.classes)
    with torch.no_grad():
        classifier.weight.copy_(centres / spread)
        classifier.bias.copy_(counts.log() - centres.square().sum(1) / 2)
    classifier.to(DEVICE)
    on_device = replace(features, x=features.x.to(DEVICE))
    kept = {
        "float32": on_device,
        "float16": replace(features, x=on_device.x.half()),
        "autocast": on_device,
        "host": features,  # collect leaves them there; on a CPU the same as float32
    }
    fitted: dict[str, nn.Module] = {}

    def fit(how: str) -> None:
        with torch.autocast(DEVICE, enabled=how == "autocast"):
            fitted[how] = disalign.fit(kept[how], classifier, 1.2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = turns(args.turns, {how: partial(fit, how) for how in args.kept}, 1)
    facts = ran_on(DEVICE, False, args.turns)
    rows, written = [["features", "s (median)", "least", "most", f"/ {args.kept[0]}", "evaluations"]], []
    for how in args.kept:
        report, seconds = fitted[how].fit_report, found[how]
        row = {"features": how, "turns": seconds, "evaluations": report.solution.evaluations}
        written.append(row | quotient(seconds, found[args.kept[0]]))
        shown = [f"{one:.2f}" for one in (statistics.median(seconds), min(seconds), max(seconds))]
        rows.append([how, *shown, ratio(seconds, found[args.kept[0]]), row["evaluations"]])
    about = f"{features!r}, stage one's accuracy on them {report.train_accuracy:.1f} %"
    print(f"{about}; {line(facts)}\n\n{text_table(rows)}")
    if args.out:
        write_json(args.out, {"about": about, **facts, "rows": written})


def anonymous() -> int:
    """Resident memory, in KiB, that is not backed by a file."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The peak of :func:`anonymous` within the block, above its start."""
    before, peak, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def classes(args: argparse.Namespace) -> None:
    """A whole fit: Gaussian classes, their best classifier as stage one, rows drawn from a long-tailed set."""
    torch.manual_seed(0)
    counts, spread = profile(args.classes, 1000, 1000.0), 0.2 * args.width**0.5
    with tempfile.TemporaryDirectory() as folder, watched_memory() as peak:
        out = Path(args.out or folder)
        stage_one: nn.Module = nn.Linear(args.width, args.classes)
        centres, bias = (parameter.requires_grad_(False) for parameter in stage_one.parameters())
        torch.add(counts.log(), centres.normal_().square().sum(1), alpha=-0.5 / spread**2, out=bias)
        y = torch.multinomial(counts.float(), args.rows, replacement=True)
        x = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float16, (args.rows, args.width))
        for start in range(0, args.rows, 1000):
            drawn = centres[y[start : start + 1000]]
            x[start : start + 1000] = (drawn + spread * torch.randn_like(drawn)).div_(spread**2).numpy()
        Features.from_arrays(x, y, class_counts=counts).save(out / "features")
        features = Features.open(out / "features")
        if args.cosine:
            stage_one = disalign.ZeroShotClassifier(centres, 0.5 * args.width / spread**2)
        options = dict(anchor="logit_adjust") if args.confidence == "one" else {}
        begun = time.process_time()
        found = disalign.fit(features, stage_one.to(DEVICE), 1.0, confidence=args.confidence, **options)
        cpu = time.process_time() - begun
        if args.out:
            torch.save({"state": found.state_dict(), "report": found.fit_report.record()}, out / "fit.pth")
    seconds, evaluations = found.fit_report.seconds, found.fit_report.solution.evaluations
    print(f"{features!r}, {torch.get_num_threads()} thread(s), {DEVICE}, confidence {args.confidence}")
    print(f"fit {seconds:.1f} s, {cpu:.1f} s of CPU, {evaluations} evaluations")
    if DEVICE == "cpu":
        seconds = cpu  # other work on the machine does not count
    print(f"a score in an evaluation: {seconds / evaluations / args.rows / args.classes * 1e9:.2f} ns")
    print(f"memory above the mapped features: {peak[0] / 2**10:.0f} MiB")
    if DEVICE != "cpu":
        print(f"of the device: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def accuracy(scores: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Percent of each class."""
    best = scores.argmax(1)
    return [100 * float((best[labels == label] == label).double().mean()) for label in range(classes)]


PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@torch.no_grad()
def scored(classifier: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([classifier(part) for part in x.float().split(4096)])


def penalty(args: argparse.Namespace) -> None:
    """Balanced test accuracy against lambda: digits, a jointly trained network and probes on their pixels."""
    from plain_loop import COUNTS, long_tailed_digits, network, stage_one

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [["balanced test accuracy, %", "stage one", *map(str, PENALTIES)]]
    kinds = {
        "network, plain fit, confidence learnt": ("network", dict(cross_fit=0)),
        "network, plain fit, anchored": ("network", dict(cross_fit=0, confidence="one", anchor="logit_adjust")),
        "probe, cross-fitted": ("probe", dict(confidence="one", C=10.0)),
        "probe, cross-fitted, anchored": ("probe", dict(confidence="one", anchor="logit_adjust", C=10.0)),
    }
    for title, (kind, options) in kinds.items():
        found = []
        for seed in args.seeds:
            (images, labels), (test, truth) = long_tailed_digits(seed)
            classifier: nn.Module | str = "linear"
            trunk: nn.Module = nn.Flatten()
            if kind == "network":
                torch.manual_seed(seed)
                model = stage_one(network(), (images, labels), 60).eval()
                trunk, classifier = model[:-1], model[-1]
            with torch.no_grad():
                features, x = Features.from_arrays(trunk(images), labels, class_counts=COUNTS), trunk(test)
            fitted = [disalign.fit(features, classifier, 1.0, penalty=one, **options) for one in PENALTIES]
            models = [plain_classifier(fitted[0]), *fitted]
            found.append([statistics.mean(accuracy(scored(one, x), truth, len(COUNTS))) for one in models])
        rows.append([title, *(f"{statistics.mean(column):.1f}" for column in zip(*found, strict=True))])
    print(text_table(rows))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(required=True)
    for run in (one_pass, one_thread, large, imagenet, classes, penalty):
        table = tables.add_parser({"one_pass": "pass", "one_thread": "solver"}.get(run.__name__, run.__name__))
        table.set_defaults(run=run)
        if run is one_pass:
            table.add_argument("--images", type=int, default=2000)
        if run is large:
            table.add_argument("--rows", type=int, default=300_000)
            table.add_argument("--turns", type=int, default=3)
            table.add_argument("--confidence", choices=("one", "learnt"), default="learnt")
        if run is imagenet:
            table.add_argument("--classes", type=int, default=1000)
            table.add_argument("--width", type=int, default=2048)
            table.add_argument(
                "--kept",
                nargs="+",
                choices=("float32", "float16", "autocast", "host"),
                default=["float32", "float16", "autocast"],
                help="features: in this dtype on the device, float32 under autocast, float32 in the CPU's memory",
            )
            table.add_argument("--turns", type=int, default=10)
            table.add_argument("--out", help="also write the table, and the seconds of each turn, to this JSON")
        if run is classes:
            table.add_argument("--classes", type=int, default=100_000)
            table.add_argument("--rows", type=int, default=1000)
            table.add_argument("--width", type=int, default=256)
            table.add_argument("--confidence", choices=("one", "learnt"), default="one")
            table.add_argument("--cosine", action="store_true", help="a cosine classifier as stage one")
            table.add_argument("--out", help="folder to keep features and fit in")
        if run is penalty:
            table.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
