"""The pictures of a report, each for a light and a dark page.

A function here draws what the method of :class:`.results.Results` of the same name found.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from disalign.report import shown

from .results import Data, numbers

#: Background, ink, lines behind; then C0, stage one; C1, the method; and others: after Okabe and Ito's colours for all
#: readers, lighter where the page is dark.
THEMES: dict[str, tuple[str, str, str, list[str]]] = {
    "light": ("#ffffff", "#222222", "#d8d8d8", ["#5f6b76", "#d55e00", "#0072b2", "#009e73", "#a6578a"]),
    "dark": ("#15181b", "#e4e4e4", "#3a4046", ["#a9b4be", "#f08a3c", "#56b4e9", "#2fbf95", "#d995bb"]),
}
#: With the colours, for those who see none.
MARKERS, LINES = "osD^v", ("--", "-", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")
#: Up to here each class has its own place and name; up to the next its own dot.
NAMED, DOTTED = 20, 1000
WIDTH = 7.2


def style(theme: str) -> Any:
    """For ``rc_context``."""
    background, ink, line, colors = THEMES[theme]
    return {
        "font.size": 11.5,
        "text.parse_math": False,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.facecolor": background,
        "savefig.facecolor": background,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": line,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11.5,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=colors),
    }


def render(draw: Callable[..., None], height: float, *data: Any) -> dict[str, bytes]:
    """Theme -> PNG of what ``draw(figure, *data)`` draws; ``height`` in inches."""
    found = {}
    for theme in THEMES:
        with rc_context(style(theme)), warnings.catch_warnings():
            # A name in a script that the font lacks: the page says it too.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            draw(figure, *data)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=144)
            found[theme] = file.getvalue()
    return found


def per_class(figure: Figure, data: Data, titles: dict[str, str]) -> None:
    """Of the methods in ``titles``: dots by class, or by training count with a rolling mean."""
    shown = {name: numbers(data["mean"][name]) for name in titles if name in data["mean"]}
    count = numbers(data["count"]) if "count" in data else None
    if len(data["class"]) <= NAMED or count is None:
        _by_class(figure.subplots(), data, titles, shown, count)
        return
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    size = {"s": 12, "alpha": 0.45} if len(count) <= DOTTED else {"s": 3, "alpha": 0.05}
    for number, (name, values) in enumerate(shown.items()):
        upper.scatter(count, values, marker=MARKERS[number], color=f"C{number}", linewidths=0, **size)
        upper.plot(*rolling(count, values), LINES[number], color=f"C{number}", lw=2, label=printable(titles[name], 40))
    upper.set_ylabel(f"{data['score']}, %")
    upper.set_ylim(-2, 102)
    _legend(upper)
    if len(shown) == 2:
        before, after = shown.values()
        lower.scatter(count, after - before, marker=MARKERS[1], color="C1", linewidths=0, **size)
        lower.plot(*rolling(count, after - before), color="C1", lw=2)
        lower.axhline(0, color="C0", ls="--", lw=1.2)
        lower.set_ylabel("change, points")
    else:
        lower.remove()
    _counts_axis(upper if len(shown) != 2 else lower, count)


def _by_class(axes: Axes, data: Data, titles: dict[str, str], shown: dict[str, np.ndarray], count: Any) -> None:
    order = np.arange(len(data["class"])) if count is None else np.argsort(-count, kind="stable")
    x = np.arange(len(order))
    for number, (name, values) in enumerate(shown.items()):
        place = x + 0.16 * (2 * number - len(shown) + 1)
        axes.vlines(place, 0, values[order], color=f"C{number}", lw=4, alpha=0.25)
        spread = numbers(data["sd"][name])[order] if name in data["sd"] else None
        axes.errorbar(
            place,
            values[order],
            spread,
            fmt=MARKERS[number],
            color=f"C{number}",
            lw=1.2,
            label=printable(titles[name], 40),
        )
    labels = [printable(data["class"][label]) + ("" if count is None else f" ({count[label]:,.0f})") for label in order]
    axes.set_xticks(x, labels, rotation=90 if max(map(len, labels)) > 5 else 0)
    axes.set_xlabel("class" if count is None else "class (training count)")
    axes.set_ylabel(f"{data['score']}, %")
    axes.set_ylim(-1.5, 102)
    axes.grid(visible=False, axis="x")
    _legend(axes)


def rolling(count: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training counts, and the mean over the tenth of the classes around each, by training count.

    What is NaN is left out. Classes of equal count share a mean, so that their order has no influence.
    """
    known = ~np.isnan(values)
    order = np.argsort(count[known], kind="stable")
    count, values = count[known][order], values[known][order]
    half = max(len(values) // 20, 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    unique, which, number = np.unique(count, return_inverse=True, return_counts=True)
    return unique, np.bincount(which, (sums[high] - sums[low]) / (high - low)) / number


def groups(figure: Figure, data: Data) -> None:
    axes = figure.subplots()
    labels = list(next(iter(data.values())))
    width = 0.8 / len(data)
    for number, (title, figures) in enumerate(data.items()):
        # Logit adjustment stands between, in the third colour.
        color = "C1" if number == len(data) - 1 and number else "C2" if number else "C0"
        means, spread = (numbers([figures[label][key] for label in labels]) for key in ("mean", "sd"))
        place = np.arange(len(labels)) + width * (number - (len(data) - 1) / 2)
        bars = axes.bar(
            place,
            np.nan_to_num(means),
            width * 0.94,
            yerr=np.nan_to_num(spread),
            color=color,
            label=printable(title, 30),
            hatch=("", "//", "..")[number],
            edgecolor=axes.get_facecolor(),
            error_kw={"ecolor": _ink(axes), "lw": 1},
        )
        axes.bar_label(bars, ["" if np.isnan(mean) else f"{mean:.1f}" for mean in means], padding=2, fontsize=9)
    axes.set_xticks(range(len(labels)), [printable(label) for label in labels])
    axes.set_ylabel("%")
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.08)
    _legend(axes)


def weights(figure: Figure, data: Data) -> None:
    axes = figure.subplots()
    for number, (rho, values) in enumerate(data["weight"].items()):
        used = rho == f"{data['rho']:g}"
        color = "C1" if used else ("C0", "C2")[min(number, 1)]
        axes.plot(
            data["count"],
            values,
            LINES[number],
            color=color,
            lw=2.6 if used else 1.6,
            label=f"rho {rho}{', the one used' if used else ''}",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("weight in the loss, mean 1")
    _legend(axes)
    _counts_axis(axes, numbers(data["count"]))


def curves(figure: Figure, data: Data) -> None:
    row = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
    looks = list(zip((1, 0, 2, 3, 4), MARKERS, LINES, strict=True))
    for axes, (setting, one) in zip(row, data.items(), strict=True):
        for number, (label, line) in enumerate(one["figures"].items()):
            color, marker, dashes = looks[number % len(looks)]
            mean, sd = (numbers(line[key]) for key in ("mean", "sd"))
            look: Any = {"color": f"C{color}", "marker": marker, "ls": dashes, "ms": 5, "lw": 1.6 if number else 2.4}
            axes.plot(one["value"], mean, label=printable(label), **look)
            axes.fill_between(one["value"], mean - sd, mean + sd, color=f"C{color}", alpha=0.2, lw=0)
            if one["stage one"][label] is not None:
                axes.axhline(one["stage one"][label], color=f"C{color}", ls=":", lw=1)
        if one["used"] is not None:
            axes.axvline(one["used"], color=_ink(axes), lw=1, alpha=0.6)
        axes.set_xlabel(setting)
    row[0].set_ylabel("%")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper left", ncols=5, columnspacing=1.2)


def calibration(figure: Figure, data: Data) -> None:
    upper, lower = figure.subplots(2, sharex=True)
    count = numbers(data["count"])
    size = 5 if len(count) <= NAMED else 3 if len(count) <= DOTTED else 1.5
    for axes, key, identity in ((upper, "magnitude", 1), (lower, "margin", 0)):
        spread = numbers(data[key]["sd"])
        axes.errorbar(
            count,
            numbers(data[key]["mean"]),
            None if np.isnan(spread).all() or len(count) > NAMED else spread,
            fmt="o",
            ms=size,
            mew=0,
            color="C1",
            alpha=0.85 if len(count) <= DOTTED else 0.35,
            label="learnt",
        )
        axes.axhline(identity, color="C0", ls="--", lw=1.4, label="stage one")
        axes.set_ylabel(key)
    order = np.argsort(count)
    lower.plot(count[order], numbers(data["reference"])[order], "-.", color="C2", label="-ln r, of equal mean")
    handles, names = lower.get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], loc="outside upper left", ncols=3, columnspacing=1.2, markerscale=max(1, 4 / size)
    )
    _counts_axis(lower, count)


def confidence(figure: Figure, data: Data) -> None:
    axes = figure.subplots()
    edges = np.linspace(0, 1, len(data["share"]) + 1)
    axes.stairs(data["share"], edges, fill=True, color="C1", alpha=0.8)
    axes.axvline(data["mean"], color=_ink(axes), ls="--", lw=1.4, label=f"mean {data['mean']:.2f}")
    axes.set_xlim(0, 1)
    axes.set_xlabel("confidence: 0 leaves stage one's scores, 1 calibrates in full")
    axes.set_ylabel("share, %")
    _legend(axes)


def confusion(figure: Figure, data: Data) -> None:
    panels = figure.subplots(1, len(data["percent"]), sharey=True, squeeze=False)[0]
    groups = [printable(group) for group in data["groups"]]
    for axes, (title, rows) in zip(panels, data["percent"].items(), strict=True):
        values = numbers(rows)
        for (row, column), value in np.ndenumerate(values):
            # Not a colour map: 0 is the colour of the page, whatever the theme.
            share = 0 if np.isnan(value) else value / 100
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, color="C2", alpha=0.75 * share, lw=0))
            axes.text(column, row, shown(value), ha="center", va="center")
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_yticks(range(len(groups)), groups)
        axes.set_xlabel("predicted")
        axes.set_title(printable(title, 40))
        axes.grid(visible=False)
        axes.tick_params(length=0)
    panels[0].set_ylabel("true")


def reliability(figure: Figure, data: Data) -> None:
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color=_ink(upper), lw=1, alpha=0.6)
    for number, (title, one) in enumerate(data.items()):
        ece = "" if one["ece"] is None else f", ECE {one['ece']:.1f} %"
        where = numbers(one["confidence"]), numbers(one["accuracy"])
        upper.plot(
            *where, marker=MARKERS[number], ls=LINES[number], color=f"C{number}", label=f"{printable(title, 40)}{ece}"
        )
        edges = np.linspace(0, 100, len(one["share"]) + 1)
        lower.stairs(numbers(one["share"]), edges, color=f"C{number}", ls=LINES[number], lw=1.6)
    upper.set_ylabel("accuracy, %")
    upper.set_ylim(0, 100)
    lower.set_ylabel("share, %")
    lower.set_xlabel("probability of the predicted class, %")
    lower.set_xlim(0, 100)
    _legend(upper)


def printable(text: str, limit: int = 22) -> str:
    """Text that a picture can hold: no control characters, not too long."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def _ink(axes: Axes) -> Any:
    return axes.xaxis.label.get_color()


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, columnspacing=1.2, borderpad=0.1)


def _counts_axis(axes: Axes, count: Sequence[float] | np.ndarray) -> None:
    """Training counts on a logarithmic axis; one of 0 has its place on it."""
    if np.min(count) < 1:
        axes.set_xscale("symlog", linthresh=1, linscale=0.3)
        axes.set_xlim(-0.2, 1.3 * np.max(count))
    else:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("training count of the class")


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"
