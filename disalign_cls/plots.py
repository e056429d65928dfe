"""The demo's two pictures: accuracy per class before and after, and what the calibration learned."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from disalign.io import atomic_file

BEFORE, AFTER, MARGIN = "#9aa5b1", "#c0392b", "#2c6fbb"
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@contextmanager
def picture(
    path: str | os.PathLike[str], counts: Sequence[int], columns: int, rows: int, height: float, note: str
) -> Iterator[Any]:
    """Panels over the classes (rows, columns) to draw on; then writes a PNG, completely or not at all."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6 * columns, height), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
        yield panels
        for panel in panels[-1]:
            panel.set_xticks(range(len(counts)), [str(count) for count in counts])
            panel.set_xlabel("training images of the class")
        figure.supxlabel(note, x=0.99, ha="right", fontsize=9, color="#666666")
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=160)


def plot_accuracy(path: str | os.PathLike[str], counts: Sequence[int], before: Any, after: Any) -> None:
    """Accuracy per class before and after (the paper's Fig. 1).

    ``counts`` are the (K,) training images, from many to few; ``before`` and ``after`` map the title of a panel to its
    (runs, K) accuracies in percent, in the same order.
    """
    x = np.arange(len(counts))
    note = "bars: mean over seeds, whiskers: standard deviation"
    with picture(path, counts, len(before), 1, 4.0, note) as (panels,):
        panels[0].set_ylabel("test accuracy, %")
        for panel, title in zip(panels, before, strict=True):
            for stage, color, label, shift in ((before, BEFORE, "stage one", -0.2), (after, AFTER, "DisAlign", 0.2)):
                values = np.asarray(stage[title])
                spread = values.std(0, ddof=1) if len(values) > 1 else 0
                panel.bar(x + shift, values.mean(0), 0.38, color=color, label=f"{label}, mean {values.mean():.1f} %")
                panel.errorbar(x + shift, values.mean(0), spread, fmt="none", ecolor="#444444", elinewidth=0.8)
            panel.set_title(title, pad=26)
            panel.set_ylim(0, 100)
            panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, fontsize=10, columnspacing=1.2)


def plot_calibration(path: str | os.PathLike[str], counts: Sequence[int], magnitude: Any, margin: Any) -> None:
    """Learned magnitude and margin against training images (the paper's Fig. 6); as in :func:`plot_accuracy`."""
    note = "dots: seeds, line: mean, dashed: the identity that stage two starts from"
    rows = ((magnitude, AFTER, 1.0, "magnitude"), (margin, MARGIN, 0.0, "margin"))
    with picture(path, counts, len(magnitude), len(rows), 5.6, note) as panels:
        for row, (learned, color, identity, name) in zip(panels, rows, strict=True):
            row[0].set_ylabel(name)
            for panel, title in zip(row, learned, strict=True):
                values = np.asarray(learned[title])
                panel.axhline(identity, color="#888888", linewidth=0.9, linestyle="--")
                panel.plot(values.T, "o", color=color, alpha=0.3, markersize=4)
                panel.plot(values.mean(0), color=color, linewidth=2)
        for panel, title in zip(panels[0], magnitude, strict=True):
            panel.set_title(title)
