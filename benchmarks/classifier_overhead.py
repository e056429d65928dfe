"""What the calibration adds to a linear classifier: microseconds a call, and ratios calibrated / plain.

    python benchmarks/classifier_overhead.py [--rows 256 16384] [--calls 100] [--repeats 10] [--compile]
    python benchmarks/classifier_overhead.py --rows 256 --width 256 --classes 100     # for a CPU

nn.Linear(2048, 1000) and its calibrated form on the same features: scores without gradients; and a training step, that
of the plain classifier's own weights by cross-entropy beside that of the calibration alone by the re-weighted loss,
each with SGD. In float32 and by autocast. A turn is --calls calls, waited for at its end, so that it shows the launches
where these take longer than the work; the cases take turns, ratios are medians over them (least to most).
"""

import argparse
import statistics
import sys
from functools import partial

import torch
import torch.nn.functional as F
from timing import DEVICE, line, quotient, ran_on, train, turns
from torch import nn

import disalign
from disalign.cli import command
from disalign.io import write_json


def scores(classifier, x, amp):
    with torch.no_grad(), torch.autocast(DEVICE, enabled=amp):
        return classifier(x)


def cases(rows, args, amp):
    """Name -> a call: inference and training, plain and calibrated."""
    torch.manual_seed(0)
    x = torch.randn(rows, args.width, device=DEVICE)
    labels = torch.arange(rows, device=DEVICE) % args.classes
    # Training changes no value: the learning rate is 0. Any counts cost the same.
    counts = list(range(1, args.classes + 1))
    calibrated, loss = disalign.wrap_classifier(nn.Linear(args.width, args.classes), counts, check=False)
    torch.compiler.reset()  # it compiles one function a few times only
    found = {}
    for kind, model, objective in (
        ("plain", nn.Linear(args.width, args.classes), F.cross_entropy),
        ("calibrated", calibrated, loss.to(DEVICE)),
    ):
        model.to(DEVICE)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, scaler = torch.optim.SGD(trained, 0.0), torch.amp.GradScaler(DEVICE, enabled=amp)
        if args.compile:
            model = torch.compile(model, dynamic=False)
        found["scores", kind] = partial(scores, model, x, amp)
        found["training step", kind] = partial(train, model, objective, optimizer, scaler, x, labels)
    return found


def repeated(call, times):
    for _ in range(times):
        call()


@command
def main(argv=None):
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, nargs="+", default=[256, 16384], help="features a call")
    arguments.add_argument("--width", type=int, default=2048, help="d")
    arguments.add_argument("--classes", type=int, default=1000, help="K")
    arguments.add_argument("--calls", type=int, default=100, help="a turn")
    arguments.add_argument("--repeats", type=int, default=10, help="turns")
    arguments.add_argument("--compile", action="store_true", help="both classifiers by torch.compile")
    arguments.add_argument("--out", help="also write the table, and the seconds of a call in each turn, to this JSON")
    args = arguments.parse_args(argv)
    how = {"compiled": args.compile, "calls": args.calls, "width": args.width, "classes": args.classes}
    facts = {amp: ran_on(DEVICE, amp, args.repeats) for amp in (False, True)}
    print(
        f"Linear({args.width}, {args.classes}){', compiled' * args.compile}, {args.calls} calls a turn; "
        f"{line(facts[False])}\n\n| rows, dtype | call | plain us | calibrated us | calibrated / plain |\n"
        "|---|---|---|---|---|"
    )
    written = []
    for rows in args.rows:
        for amp in (False, True):
            calls = cases(rows, args, amp)
            found = turns(args.repeats, {name: partial(repeated, call, args.calls) for name, call in calls.items()}, 1)
            seconds = {name: [turn / args.calls for turn in turned] for name, turned in found.items()}
            for what in ("scores", "training step"):
                plain, calibrated = seconds[what, "plain"], seconds[what, "calibrated"]
                row = {"rows": rows, **facts[amp], "call": what, "plain": plain, "calibrated": calibrated}
                row |= quotient(calibrated, plain)
                written.append(row)
                micro = [1e6 * statistics.median(row[kind]) for kind in ("plain", "calibrated")]
                cells = "| {rows}, {dtype} | {call} | {:.4g} | {:.4g} | {ratio:.2f} ({least:.2f}-{most:.2f}) |"
                print(cells.format(*micro, **row), flush=True)
    if args.out:
        write_json(args.out, {**how, "rows": written})


if __name__ == "__main__":
    sys.exit(main())
