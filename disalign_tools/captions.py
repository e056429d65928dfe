"""What a report shows in pictures, and what it says of each: heading, caption, and the key numbers as text."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from disalign.report import shown

from . import pictures
from .results import COLLAPSED, Data, Results


@dataclass(frozen=True)
class Picture:
    """``draw(figure, *data)`` draws it, ``height`` in inches; ``warning`` is shown below."""

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[..., None]
    data: tuple[Any, ...]
    height: float = 4.0
    warning: str = ""

    def render(self) -> dict[str, bytes]:
        """Theme -> PNG."""
        return pictures.render(self.draw, self.height, *self.data)


def all_pictures(results: Results, figures: Data) -> Iterator[Picture]:
    """Those that there are figures for (:meth:`.results.Results.figures`), in the order of the page."""
    for name, described in PICTURES.items():
        # Many classes have no place of their own, nor one by training count where there is none.
        if name in figures and (name != "per_class" or _by_name(results) or results.counts is not None):
            yield described(results, figures[name])


def lead(results: Results) -> str:
    """The key numbers in a sentence."""
    titles = [results.titles[name] for name in results.shown]
    values = {
        label: " → ".join(shown(results.figure(name, key)["mean"]) for name in results.shown)
        for label, key in results.keys.items()
    }
    whose = f"from {titles[0]} to {titles[1]}" if len(titles) > 1 else titles[0]
    return f"{whose}, in percent: " + ", ".join(f"{label} {told}" for label, told in values.items())


def _by_name(results: Results) -> bool:
    return results.num_classes <= pictures.NAMED


def _per_class(results: Results, data: Data) -> Picture:
    titles = {name: results.titles[name] for name in results.shown}
    order = ", from many to few in training" if _by_name(results) else " by its training count"
    caption = f"The {data['score']} of each class{'' if results.counts is None else order}"
    if len(titles) == 2:
        before, after = titles.values()
        where = (
            "a square lies above its circle"
            if _by_name(results)
            else "the solid line, a rolling mean, lies above the dashed one"
        )
        caption += (
            f": where {where}, {after} is better than {before}; look for what the rare classes gain, and what that "
            "costs the frequent ones"
        )
    return Picture(
        "per_class",
        "Every class, before and after" if len(titles) == 2 else "Every class",
        f"{caption}.",
        f"{data['score']} of {results.num_classes:,} classes; {lead(results)}",
        pictures.per_class,
        (data, titles),
        5.2,
    )


def _groups(results: Results, data: Data) -> Picture:
    trade = ": what the last group gains against what the first one pays" if len(data) > 1 else ""
    if trade and "logit_adjust" in results.titles:
        trade += ", and whether logit adjustment, which learns nothing, does the same"
    whiskers = "; whiskers: standard deviation over stage ones" if len(results.runs) > 1 else ""
    told = (
        f"{title}: " + ", ".join(f"{label} {shown(one['mean'])}" for label, one in values.items())
        for title, values in data.items()
    )
    return Picture(
        "groups",
        "Groups of classes",
        f"Means over groups of classes by training data{trade}{whiskers}.",
        "; ".join(told),
        pictures.groups,
        (data,),
    )


def _weights(_: Results, data: Data) -> Picture:
    told = (
        f"rho {rho}: {values[0]:.3g} for the rarest class, {values[-1]:.3g} for the most frequent"
        for rho, values in data["weight"].items()
    )
    return Picture(
        "weights",
        "Re-weighting",
        "The weight in the loss by the training count of the class (eq. 11 of the paper): the steeper, "
        "the more the rare classes count; rho 0 weighs all alike, rho 1 by the inverse of the count.",
        "; ".join(told),
        pictures.weights,
        (data,),
        3.8,
    )


def _curves(_: Results, data: Data) -> Picture:
    told = (
        f"{setting} {one['value'][0]:g} to {one['value'][-1]:g}: "
        + ", ".join(
            f"{label} {shown(line['mean'][0])} to {shown(line['mean'][-1])}" for label, line in one["figures"].items()
        )
        for setting, one in data.items()
    )
    what = {
        "rho": "learnt at other rho",
        "strength": "taken a part of the way from stage one (0) to what it learnt (1)",
    }
    return Picture(
        "curves",
        "How far to go",
        f"DisAlign {', or '.join(what[setting] for setting in data)}: how the groups trade, and where their mean is "
        "flat; dotted lines are stage one's, a vertical line is where DisAlign stands in the table.",
        "; ".join(told),
        pictures.curves,
        (data,),
    )


def _calibration(results: Results, data: Data) -> Picture:
    slope = "" if data["slope"] is None else f"; here the margin follows it with slope {data['slope']:.2f}"
    return Picture(
        "calibration",
        "What was learnt",
        f"Magnitude and margin of each class by training count ({results.titles[results.method]}), beside the margin "
        f"-ln r of logit adjustment, slope 1{slope}.",
        f"magnitude {_range(data['magnitude']['mean'])}, margin {_range(data['margin']['mean'])}{slope}",
        pictures.calibration,
        (data,),
        5.2,
    )


def _confidence(results: Results, data: Data) -> Picture:
    mean = f"{data['mean']:.2f}"
    return Picture(
        "confidence",
        "Confidence",
        f"How much of the calibration the evaluated {results.each} get: a mean near 1 makes it the same for all, one "
        f"near 0 leaves stage one's scores; here it is {mean}.",
        f"histogram of the confidence in {len(data['share'])} bins from 0 to 1, mean {mean}",
        pictures.confidence,
        (data,),
        3.2,
        f"the mean confidence fell to {data['lowest']:.3f}: magnitude and margin hardly get gradients any more "
        "and stage two may end as stage one; see whether a confidence of one (disalign_one) does better"
        if data["lowest"] < COLLAPSED
        else "",
    )


def _confusion(results: Results, data: Data) -> Picture:
    groups, tables = data["groups"], data["percent"]
    last = max((row for rows in tables.values() for row in range(len(groups)) if rows[row][0] is not None), default=0)
    shares = " and ".join(f"{shown(rows[last][0])} % ({title})" for title, rows in tables.items())
    astray = f"of the {results.each} of {groups[last]!r}, {shares} are taken for {groups[0]!r}"
    return Picture(
        "confusion",
        f"Where {results.each} go",
        f"Of the {results.each} of each group (rows), the percentage predicted as a class of each (columns): {astray}.",
        f"confusion of groups: {astray}",
        pictures.confusion,
        (data,),
        3.2,
    )


def _reliability(results: Results, data: Data) -> Picture:
    errors = ", ".join(f"{title} {shown(one['ece'])} %" for title, one in data.items())
    return Picture(
        "reliability",
        "Reliability",
        f"Accuracy by predicted probability, and the share of {results.each} at each: below the diagonal a "
        f"classifier is too sure of itself; expected calibration error (ECE): {errors}.",
        f"reliability diagram; ECE: {errors}",
        pictures.reliability,
        (data,),
        5.2,
    )


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "n/a"


#: Name -> what describes it, in the order of the page.
PICTURES: dict[str, Callable[[Results, Data], Picture]] = {
    "per_class": _per_class,
    "groups": _groups,
    "weights": _weights,
    "curves": _curves,
    "calibration": _calibration,
    "confidence": _confidence,
    "confusion": _confusion,
    "reliability": _reliability,
}
