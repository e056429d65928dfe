"""Which method for which stage one: gains in balanced accuracy against stage one's accuracy on its training set.

    python benchmarks/which_method.py probes OUT/imagenet FEATURES [--c 0.01 1] [--methods all]
    python benchmarks/which_method.py digits OUT/digits
    disalign compare CONFIG --stage-one FILE ... --rho 1 --methods METHOD ... --features DIR --out OUT/NAME
    python benchmarks/which_method.py draw OUT

`probes` trains linear classifiers on FEATURES/train and FEATURES/test (benchmarks/frozen_features.py), from a strong to
a weak penalty. Each seed deals the images of every class out anew to training and test set, as many as before, and has
folds of its own. `digits` trains the network of examples/plain_loop.py for few to many epochs. Comparisons are kept in
OUT/FAMILY; what is there is not done again. `draw` reads them all, and writes which_method.json and which_method.png.
"""

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure

import disalign
from disalign import Features
from disalign.cli import command
from disalign.comparison import merged, table
from disalign.fitting import MEMORISED
from disalign.io import atomic_file, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = {
    "digits": "trained with its trunk: digits, a CNN, 5 to 240 epochs",
    "cifar100-lt": "trained with its trunk: CIFAR-100-LT, 10 to 200 epochs",
    "imagenet": "probe: CIFAR-100-LT on an ImageNet trunk",
    "halves": "probe: half of CIFAR-100-LT on a trunk of the other half",
}
METHODS = {
    "disalign": ("DisAlign", "#0072b2", "o"),
    "disalign_anchor": ("DisAlign, anchored", "#56b4e9", "s"),
    "disalign_cross_fit": ("DisAlign, cross-fitted", "#d55e00", "^"),
    "logit_adjust": ("logit adjustment", "#000000", "x"),
}


def compared(place, args, make, *setting):
    """The comparison kept in a file, else made and kept; ``make`` returns the options of disalign.compare."""
    if not place.exists():
        warnings.simplefilter("ignore")  # of stage ones that have memorised their training set: the subject
        content = disalign.compare(**make(*setting), methods=args.methods, rho=1.0, dial=(), stage_one=place.stem)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, content)
    return json.loads(place.read_text())


def dealt_out_anew(train, test, seed):
    """Features of the same classes and counts; each class's rows of both sets are shuffled and dealt out again."""
    x, y = torch.cat([train.x, test.x]), torch.cat([train.y, test.y])
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows = [shuffled[y[shuffled] == label] for label in range(len(train.class_counts))]
    parts = zip(*((own[:count], own[count:]) for own, count in zip(rows, train.class_counts, strict=True)), strict=True)
    return [Features.from_arrays(x[part], y[part]) for part in map(torch.cat, parts)]


def probes(args):
    train, test = (Features.open(Path(args.features, split)) for split in ("train", "test"))

    def make(c, seed):
        learnt, seen = dealt_out_anew(train, test, seed)
        return dict(train=learnt, test=seen, C=c, seed=seed)

    for c in args.c:
        runs = [compared(args.out / f"C_{c:g}_seed_{seed}.json", args, make, c, seed) for seed in args.seeds]
        print(f"C {c:g}\n\n{table(merged(runs))}\n", flush=True)


def digits(args):
    from plain_loop import COUNTS, long_tailed_digits, network, stage_one

    def make(epochs, decay, seed):
        torch.manual_seed(seed)
        data, test = long_tailed_digits(seed)
        model = stage_one(network(), data, epochs, decay).eval()
        with torch.no_grad():
            sets = [Features.from_arrays(model[:-1](x), y, class_counts=COUNTS) for x, y in (data, test)]
        groups = disalign.many_medium_few(COUNTS, many=30, few=6)
        return dict(train=sets[0], test=sets[1], classifier=model[-1], groups=groups, seed=seed)

    for decay in (5e-3, 5e-4):
        for epochs in (5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 120, 240):
            for seed in args.seeds:
                place = args.out / f"epochs_{epochs}_decay_{decay:g}_seed_{seed}.json"
                compared(place, args, make, epochs, decay, seed)


def points(family):
    """Of each stage one in a folder of comparisons: its accuracy, and what each method gains, in percent."""
    for place in sorted(family.glob("*.json")):
        for run in json.loads(place.read_text())["runs"]:
            reached = {name: method["figures"]["balanced"] for name, method in run["methods"].items()}
            gains = {name: round(value - reached["stage_one"], 2) for name, value in reached.items()}
            train = {name: round(run["train"][name], 2) for name in ("average", "balanced", "few", "nll")}
            name = Path(run["stage_one"]).name.removesuffix(".pth")
            yield dict(family=family.name, stage_one=name, train=train, test=round(reached["stage_one"], 2), gain=gains)


def draw(args):
    place = DOCS / "results" / "which_method.json"
    new = [point for family in sorted(args.out.iterdir()) for point in points(family)]
    kept = json.loads(place.read_text()) if place.exists() else []
    again = {(point["family"], point["stage_one"]) for point in new}
    found = [one for one in kept if (one["family"], one["stage_one"]) not in again] + new
    with atomic_file(place, "w") as file:
        file.write("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    for panel, (family, title) in zip(figure.subplots(2, 2, sharex=True).flatten(), FAMILIES.items(), strict=True):
        settings = {}
        for point in found:
            if point["family"] == family:
                settings.setdefault(point["stage_one"].split("_seed")[0], []).append(point)
        for name, (label, color, marker) in METHODS.items():
            lines = {}
            for setting, seeds in settings.items():
                at, gain = ([p["train"]["balanced"] for p in seeds], [p["gain"][name] for p in seeds])
                line = lines.setdefault(setting.partition("_decay")[2], [])
                line.append((statistics.mean(at), statistics.mean(gain)))
            for line in lines.values():
                x, y = zip(*sorted(line), strict=True)
                panel.plot(x, y, marker, color=color, label=label, ls="-", lw=0.6, ms=6, mfc="none")
        panel.axhline(0, color="#999999", linewidth=0.8)
        for between in (75, MEMORISED):  # the advice of docs/which_method.md
            panel.axvline(between, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("stage one's accuracy on its training set, averaged over the classes, %", fontsize=10)
    figure.supylabel("gain in balanced test accuracy, points", fontsize=10)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with atomic_file(DOCS / "images" / "which_method.png") as file:
        figure.savefig(file, format="png", dpi=160)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for run in (probes, digits, draw):
        verb = verbs.add_parser(run.__name__)
        verb.set_defaults(run=run)
        verb.add_argument("out", type=Path)
        if run is probes:
            verb.add_argument("features", help="folder with train and test")
            verb.add_argument("--c", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1, 1])
        if run is not draw:
            verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            verb.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
