"""What a report shows of a comparison: means over stage ones and, for each picture, the figures to draw."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disalign import InputError, generalized_reweight
from disalign.errors import some
from disalign.io import read_json
from disalign.report import shown, without_nan

Data = dict[str, Any]

#: Figures of which less is better; all others are scores.
LOWER_IS_BETTER = ("ece", "nll")
#: Below it the mean confidence has collapsed; :class:`disalign.stage_two.StageTwoRun`.
COLLAPSED = 0.05
#: Winners, and losers, of a report.
MOVERS = 10
#: First column -> what stands before the name of a group in its figures, and the columns of ``per_class`` that it is
#: the mean of.
SCORES = {"AP": ("AP", ("AP",)), "mIoU": ("mIoU.", ("iou", "IoU"))}
GROUPS = ("many", "medium", "few", "head", "body", "tail", "f", "c", "r")
#: What JSON of another shape raises.
SHAPE_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def read_results(path: Path) -> dict[str, Data]:
    """The comparisons in a JSON file by name, in the shape of :func:`disalign.comparison.comparison`.

    Args:
        path: what ``disalign compare`` wrote, one comparison without a name; or an evaluation's results
            (:func:`disalign.report.report`), those of a detector by dataset and task.

    Raises:
        InputError: no such file, or it holds neither.
    """
    found = _parts(read_json(path, "a comparison or results"))
    if not found:
        raise InputError(
            f"expected a comparison or results in {str(path)!r}, got JSON without 'runs' and 'figures'; give the "
            "comparison.json of disalign compare, or the results of an evaluation"
        )
    return found


def _parts(content: Any) -> dict[str, Data]:
    if not isinstance(content, dict):
        return {}
    if "runs" in content:
        return {"": content}
    if "figures" in content:
        return {"": _as_comparison(content)}
    below = {name: _parts(item) for name, item in content.items()}
    return {f"{name} {own}".strip(): one for name, parts in below.items() for own, one in parts.items()}


def _as_comparison(results: Data) -> Data:
    """Results of one evaluation as a comparison of stage one, if it is there, and DisAlign."""
    after = {key: results[key] for key in ("figures", "per_class") if key in results}
    methods = {"evaluated": after | {"title": "evaluated model"}}
    if "stage_one" in results:
        methods = {
            "stage_one": results["stage_one"] | {"title": "stage one"},
            "disalign": after | {"title": "DisAlign"},
        }
    figures = results["figures"]
    task = "detection" if "AP" in figures else "segmentation" if "mIoU" in figures else "classification"
    return {
        "task": task,
        "group_of": results.get("per_class", {}).get("group"),
        "examples": results.get("images"),
        **{key: value for key, value in results.items() if key not in ("figures", "per_class", "stage_one")},
        "columns": {name: name for name in figures},
        "runs": [{"methods": methods}],
    }


def numbers(values: Any) -> np.ndarray:
    """fp64; ``None`` and what is not finite become NaN."""
    found = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def mean_and_sd(values: np.ndarray) -> tuple[Any, Any]:
    """Over the runs, the first dimension: what is NaN does not count, and of one value there is no spread."""
    known = np.ma.masked_invalid(values)
    sd = known.std(0, ddof=1) if len(values) > 1 else np.ma.masked_all(values.shape[1:])
    return np.ma.filled(known.mean(0), np.nan).tolist(), np.ma.filled(sd, np.nan).tolist()


class Results:
    """One comparison, and the method that stands beside stage one in its pictures.

    Args:
        content: of :func:`read_results`.
        method: the name of the method; default: ``disalign``, else the first of those that the most runs have.

    Raises:
        InputError: no such method.
        AttributeError, IndexError, KeyError, TypeError, ValueError: ``content`` is not a comparison.
    """

    def __init__(self, content: Mapping[str, Any], method: str | None = None) -> None:
        self.content = content
        self.runs: list[Data] = list(content["runs"])
        every = {name: one for run in self.runs for name, one in _of(run, "methods").items()}
        for run in self.runs:
            for one in run["methods"].values():
                numbers(list(_of(one, "figures").values()))
        if not every:
            raise ValueError("it has no methods")
        self.titles = {name: str(one.get("title", name)) for name, one in every.items()}
        others = [name for name in self.titles if name != "stage_one"]
        if method is not None and method not in others:
            raise InputError(
                f"expected a method of this comparison as --method, got {method!r}; give {some(others, 30)}"
            )
        support = {name: sum(name in run["methods"] for run in self.runs) for name in others}
        self.method = method or max(
            others,
            key=lambda name: (name == "disalign", name.startswith("disalign"), support[name]),
            default="stage_one",
        )
        #: Those of the pictures: before, after.
        self.shown = [name for name in dict.fromkeys(("stage_one", self.method)) if name in self.titles]

        self.columns = {key: str(title) for key, title in _of(content, "columns").items()}
        self.first = next(iter(self.columns))
        self.prefix, scores = SCORES.get(self.first, ("", ("accuracy",)))
        self.score = next((key for key in scores if self.rows(self.method, "per_class", key) is not None), None)

        self.score_title = "IoU" if self.score == "iou" else self.score
        #: What is counted in figures other than the scores: the evaluation's pixels, or examples.
        self.each = "pixels" if content.get("task") == "segmentation" else "examples"

        counts, group_of, classes = (content.get(key) for key in ("class_counts", "group_of", "classes"))
        learnt = [(self.method, key) for key in ("magnitude", "margin")]
        scored = [(name, "per_class", self.score) for name in self.titles] if self.score else []
        rows = [found for found in (self.rows(*keys) for keys in learnt + scored) if found is not None]
        sizes = {len(one) for one in (counts, group_of, classes) if one} | {one.shape[1] for one in rows}
        if len(sizes) > 1:
            raise ValueError(f"its lists are of {some(sorted(sizes))} classes")
        self.num_classes: int = next(iter(sizes), 0)
        self.counts = numbers(counts) if counts else None
        self.group_of = [None if group is None else str(group) for group in group_of] if group_of else None
        self.classes = [str(name) for name in classes or range(self.num_classes)]

        figures = every[self.method]["figures"]
        names = [key.removeprefix("mIoU.") for key in figures if key.startswith("mIoU.")] + list(GROUPS)
        self.groups = [name for name in dict.fromkeys(names) if self.prefix + name in figures]
        #: Title -> figure: the first, and that of each group.
        self.keys = {self.columns[self.first]: self.first}
        self.keys |= {(f"AP{name}" if self.first == "AP" else name): self.prefix + name for name in self.groups}

    @property
    def dataset(self) -> str:
        return str(self.content.get("dataset") or "")

    def rows(self, method: str, *keys: str) -> np.ndarray | None:
        """A method's entry of each run that has it: (runs, ...)."""
        found = [run["methods"].get(method) for run in self.runs]
        for key in keys:
            found = [one.get(key) for one in found if one is not None]
        found = [one for one in found if one is not None]
        return numbers(found) if found else None

    def figure(self, method: str, key: str) -> Data:
        """``mean`` and ``sd`` of a figure; NaN where there is none."""
        values = self.rows(method, "figures", key)
        return dict(zip(("mean", "sd"), (np.nan, np.nan) if values is None else mean_and_sd(values), strict=True))

    def gain(self, method: str) -> Data:
        """``mean`` and ``sd`` of what a method adds to stage one's first figure, in points."""
        pairs = [
            [run["methods"][name]["figures"].get(self.first) for name in ("stage_one", method)]
            for run in self.runs
            if "stage_one" in run["methods"] and method in run["methods"]
        ]
        values = np.diff(numbers(pairs or [[None, None]]))[:, 0]
        return dict(zip(("mean", "sd"), mean_and_sd(values), strict=True))

    def rho(self, method: str) -> float | None:
        """That a method was learnt with, or else the comparison's."""
        own = self.rows(method, "setting", "rho")
        rho = self.content.get("rho")
        return float(own.mean()) if own is not None else None if rho is None else float(rho)

    def table(self) -> Data:
        """Method -> title, setting, figures, gain and seconds."""
        found = {}
        for name, title in self.titles.items():
            own = next(run["methods"][name] for run in self.runs if name in run["methods"])
            found[name] = {
                "title": title,
                "setting": " ".join(f"{key} {value:g}" for key, value in own.get("setting", {}).items()),
                "figures": {key: self.figure(name, key) for key in self.columns},
                "gain": self.gain(name),
                "seconds": float(numbers(own.get("seconds"))),
            }
        return found

    def best(self) -> dict[str, set[str]]:
        """Column -> the methods whose mean is best as it is printed; a bound learns from other data."""
        found = {}
        for key in self.columns:
            means = {name: self.figure(name, key)["mean"] for name in self.titles if name != "bound"}
            rounded = {name: round(mean, decimals(key)) for name, mean in means.items() if not np.isnan(mean)}
            most = (min if key in LOWER_IS_BETTER else max)(rounded.values(), default=None)
            found[key] = {name for name, mean in rounded.items() if mean == most}
        return found

    def per_class(self) -> Data | None:
        """Everything that there is of each class: name, training count, group, and each method's mean and spread."""
        if self.score is None:
            return None
        found: Data = {"class": self.classes, "score": self.score_title, "mean": {}, "sd": {}}
        if self.counts is not None:
            found["count"] = self.counts.tolist()
        if self.group_of is not None:
            found["group"] = self.group_of
        for name in self.titles:
            values = self.rows(name, "per_class", self.score)
            if values is not None:
                mean, sd = mean_and_sd(values)
                found["mean"][name] = mean
                if name in self.shown and len(values) > 1:
                    found["sd"][name] = sd
        return found

    def movers(self) -> tuple[list[Data], list[Data]] | None:
        """The classes that gain and that lose the most, each with training count, before and after."""
        data = self.per_class()
        if data is None or any(name not in data["mean"] for name in ("stage_one", self.method)) or len(self.shown) < 2:
            return None
        before, after = numbers(data["mean"]["stage_one"]), numbers(data["mean"][self.method])
        change = after - before
        order = [int(label) for label in np.argsort(change, kind="stable") if not np.isnan(change[label])]

        def row(label: int) -> Data:
            count = None if self.counts is None else self.counts[label]
            return {
                "class": self.classes[label],
                "count": count,
                "before": before[label],
                "after": after[label],
                "change": change[label],
            }

        winners = [row(label) for label in reversed(order) if change[label] > 0]
        losers = [row(label) for label in order if change[label] < 0]
        return winners[:MOVERS], losers[:MOVERS]

    def group_means(self) -> Data | None:
        """The first figure and those of the groups, for before, logit adjustment and after."""
        if not self.groups:
            return None
        names = [name for name in dict.fromkeys(("stage_one", "logit_adjust", self.method)) if name in self.titles]
        return {
            self.titles[name]: {label: self.figure(name, key) for label, key in self.keys.items()} for name in names
        }

    def weights(self) -> Data | None:
        """Eq. 11's weights at each training count, for rho 0, 1 and the comparison's."""
        rho = self.rho(self.method)
        if rho is None or self.counts is None:
            return None
        counts = torch.from_numpy(self.counts)
        lines = {
            f"{one:g}": generalized_reweight(counts, one, zero_count="exclude").double().numpy()
            for one in sorted({0.0, 1.0, rho})
        }
        count, place = np.unique(self.counts, return_index=True)
        return {
            "count": count[count > 0].tolist(),
            "rho": rho,
            "weight": {one: values[place][count > 0].tolist() for one, values in lines.items()},
        }

    def curves(self) -> Data | None:
        """The first figure and those of the groups along rho and along the strength; ``used`` is the table's value."""
        found = {"rho": self._curve("sweep", self.rho("disalign")), "strength": self._curve("dial", 1.0)}
        return {setting: one for setting, one in found.items() if one} or None

    def _curve(self, role: str, used: float | None) -> Data | None:
        points = [one for run in self.runs for one in run.get(role) or []]
        values = sorted({float(one["value"]) for one in points})
        if len(values) < 2:
            return None
        found: Data = {"value": values, "used": used, "figures": {}, "stage one": {}}
        for label, key in self.keys.items():
            of = [[one["figures"].get(key) for one in points if one["value"] == value] for value in values]
            mean, sd = zip(*(mean_and_sd(numbers(one)) for one in of), strict=True)
            found["figures"][label] = {"mean": list(mean), "sd": list(sd)}
            found["stage one"][label] = self.figure("stage_one", key)["mean"]
        return found

    def calibration(self) -> Data | None:
        """Learnt magnitude and margin by training count; beside it logit adjustment's margin, -ln r, of equal mean.

        ``slope`` is the margin's along -ln r, by least squares: 1 for logit adjustment.
        """
        magnitude, margin = (self.rows(self.method, key) for key in ("magnitude", "margin"))
        if self.counts is None or magnitude is None or margin is None:
            return None
        known = self.counts > 0
        found: Data = {"count": self.counts[known].tolist()}
        for key, values in (("magnitude", magnitude), ("margin", margin)):
            mean, sd = mean_and_sd(values[:, known])
            found[key] = {"mean": mean, "sd": sd}
        mean, reference = numbers(found["margin"]["mean"]), -np.log(self.counts[known])
        off = reference - reference.mean()
        found["reference"] = (off + np.nanmean(mean)).tolist()
        found["slope"] = float(np.nansum(off * mean) / (off**2).sum()) if off.any() else np.nan
        return found

    def confidence(self) -> Data | None:
        """The learnt confidence's histogram over [0, 1], percent of the examples, and its mean; both over the runs."""
        counts, means = (self.rows(self.method, "confidence", key) for key in ("count", "mean"))
        if counts is None or means is None:
            return None
        with np.errstate(invalid="ignore"):
            share = counts / counts.sum(1, keepdims=True)
        if np.isnan(share).any() or np.isnan(means).any():
            return None
        return {"share": (100 * share.mean(0)).tolist(), "mean": float(means.mean()), "lowest": float(means.min())}

    def confusion(self) -> Data | None:
        """Where each group's examples go, percent: rows true, columns predicted."""
        found = {}
        for name in self.shown:
            values = self.rows(name, "confusion")
            if values is not None:
                if values.shape[1:] != (len(self.groups), len(self.groups)):
                    raise ValueError(f"it has {len(self.groups)} groups, and a confusion of {values.shape[1:]}")
                found[self.titles[name]] = mean_and_sd(values)[0]
        return {"groups": self.groups, "percent": found} if found else None

    def reliability(self) -> Data | None:
        """Accuracy by confidence, percent, over the examples of all runs; ECE as in the table."""
        found = {}
        for name in self.shown:
            count = self.rows(name, "reliability", "count")
            if count is None:
                continue
            own: Data = {"ece": self.figure(name, "ece")["mean"]}
            with np.errstate(invalid="ignore"):
                own["share"] = (100 * count.sum(0) / count.sum()).tolist()
                for key in ("confidence", "accuracy"):
                    values = self.rows(name, "reliability", key)
                    if values is None or values.shape != count.shape:
                        raise ValueError("the lists of its reliability differ in length")
                    own[key] = (np.nansum(count * values, 0) / count.sum(0)).tolist()
            found[self.titles[name]] = own
        return found or None

    def facts(self) -> Data:
        """As text: the facts of the title, how the groups are made, and how all of it was."""
        content = self.content
        facts = [str(content[key]) for key in ("task", "dataset") if content.get(key)]
        told = {
            "split {}": content.get("split"),
            "{} examples": content.get("examples") and counted(content["examples"]),
            "K = {} classes": self.num_classes and f"{self.num_classes:,}",
            "training counts {}": self.counts is not None
            and f"{counted(self.counts.max())} to {counted(self.counts.min())}",
            "rho {}": None if content.get("rho") is None else f"{content['rho']:g}",
            "settings: {}": content.get("settings"),
            "{} stage ones": len(self.runs) > 1 and len(self.runs),
        }
        facts += [form.format(value) for form, value in told.items() if value]
        groups = content.get("groups_text") or content.get("groups") or ""
        if isinstance(groups, Mapping):
            groups = groups.get("split") or "; ".join(f"{name} {text}" for name, text in groups.items())
        versions = ", ".join(f"{name} {version}" for name, version in (content.get("versions") or {}).items())
        made: dict[str, list[Any]] = {
            "Command": [content.get("command")],
            "Stage one": [run.get("stage_one") for run in self.runs],
            "Checkpoint": [content.get("checkpoint")],
            "Seed": [run.get("seed") for run in self.runs],
            "Versions": [versions],
            "Date": [content.get("date")],
            "Notes of the fit": [note for run in self.runs for note in run.get("notes") or []],
        }
        kept = {
            what: list(dict.fromkeys(str(one) for one in every if one not in (None, "")))
            for what, every in made.items()
        }
        return {"facts": facts, "groups": str(groups), "made": {what: every for what, every in kept.items() if every}}

    def figures(self) -> Data:
        """All of it by picture, ready for JSON; what is not there is left out."""
        found = {
            "facts": self.facts(),
            "table": self.table(),
            "per_class": self.per_class(),
            "groups": self.group_means(),
            "weights": self.weights(),
            "curves": self.curves(),
            "calibration": self.calibration(),
            "confidence": self.confidence(),
            "confusion": self.confusion(),
            "reliability": self.reliability(),
        }
        return {key: without_nan(value) for key, value in found.items() if value is not None}


def decimals(key: str) -> int:
    """Of a figure, as it is printed: percent to a tenth, nats to a hundredth."""
    return 2 if key == "nll" else 1


def counted(value: float | None) -> str:
    return shown(value, ",.0f")


def _of(content: Mapping[str, Any], key: str) -> Any:
    if key not in content:
        raise ValueError(f"it lacks {key!r}")
    return content[key]
