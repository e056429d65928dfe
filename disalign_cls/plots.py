"""The demo's two pictures: accuracy per class before and after, and what the calibration learned."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

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


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=160)
    plt.close(figure)


def footnote(figure: Any, text: str) -> None:
    figure.supxlabel(text, x=0.99, ha="right", fontsize=9, color="#666666")


def plot_accuracy(path: str | os.PathLike[str], counts: Sequence[int], before: Any, after: Any) -> None:
    """Accuracy per class, ordered by training images, before and after (the paper's Fig. 1).

    Args:
        path: PNG to write.
        counts: (K,) training images, from many to few.
        before, after: title of a panel -> (runs, K) accuracies in percent, classes in counts' order.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(before), figsize=(5.6 * len(before), 4.0), sharey=True, layout="constrained", squeeze=False
        )
        x = np.arange(len(counts))
        for panel, title in zip(panels[0], before, strict=True):
            for values, color, label, shift in (
                (before[title], BEFORE, "stage one", -0.2),
                (after[title], AFTER, "DisAlign", 0.2),
            ):
                values = np.asarray(values)
                spread = values.std(0, ddof=1) if len(values) > 1 else 0
                panel.bar(x + shift, values.mean(0), 0.38, color=color, label=f"{label}, mean {values.mean():.1f} %")
                panel.errorbar(x + shift, values.mean(0), spread, fmt="none", ecolor="#444444", elinewidth=0.8)
            panel.set_title(title, pad=26)
            panel.set_xticks(x, [str(count) for count in counts])
            panel.set_xlabel("training images of the class")
            panel.set_ylim(0, 100)
            panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, fontsize=10, columnspacing=1.2)
        panels[0][0].set_ylabel("test accuracy, %")
        footnote(figure, "bars: mean over seeds, whiskers: standard deviation")
        save(figure, path)


def plot_calibration(path: str | os.PathLike[str], counts: Sequence[int], magnitude: Any, margin: Any) -> None:
    """Learned magnitude and margin against training images (the paper's Fig. 6).

    Args:
        path: PNG to write.
        counts: (K,) training images, from many to few.
        magnitude, margin: title of a panel -> (runs, K) values in counts' order.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            2,
            len(magnitude),
            figsize=(5.6 * len(magnitude), 5.6),
            sharex=True,
            sharey="row",
            layout="constrained",
            squeeze=False,
        )
        x = np.arange(len(counts))
        for column, title in enumerate(magnitude):
            for row, (values, color, start, name) in enumerate(
                ((magnitude[title], AFTER, 1.0, "magnitude"), (margin[title], MARGIN, 0.0, "margin"))
            ):
                panel, values = panels[row][column], np.asarray(values)
                panel.axhline(start, color="#888888", linewidth=0.9, linestyle="--")
                panel.plot(np.tile(x, (len(values), 1)).T, values.T, "o", color=color, alpha=0.3, markersize=4)
                panel.plot(x, values.mean(0), color=color, linewidth=2)
                if column == 0:
                    panel.set_ylabel(name)
            panels[0][column].set_title(title)
            panels[1][column].set_xticks(x, [str(count) for count in counts])
            panels[1][column].set_xlabel("training images of the class")
        footnote(figure, "dots: seeds, line: mean, dashed: the identity that stage two starts from")
        save(figure, path)
