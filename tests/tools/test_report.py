"""The report of a comparison: its numbers are the comparison's, and the page stands alone."""

import base64
import copy
import json
import math
import shutil
import statistics
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from disalign import Features, compare
from disalign.comparison import merged
from disalign.report import report
from disalign_tools import __main__ as console
from disalign_tools import pictures
from disalign_tools.captions import all_pictures
from disalign_tools.results import Results

COUNTS = [400, 200, 120, 70, 40, 25, 15, 9, 6, 4]
#: A page, a picture, a formula and a file could each take one of these for something else.
CLASSES = ['<b>&"x"', "$\\wrong$", "two\nlines", "\ud800", *"efghij"]
COMMAND = "compare '<script>alert(1)</script>' --stage-one a&b.pth"
ALL = ["per_class", "groups", "weights", "curves", "calibration", "confidence", "confusion", "reliability"]


def gaussians(counts, seed):
    means = 0.5 * torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    y = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    x = means[y] + torch.randn(len(y), 8, generator=torch.Generator().manual_seed(seed))
    return Features(x, y, torch.ones(len(y), dtype=torch.float64), torch.tensor(COUNTS))


@pytest.fixture(scope="module")
def comparison():
    """Of two stage ones, through JSON."""
    facts = {"classes": CLASSES, "dataset": "gaussians", "split": "test", "command": COMMAND}
    found = [
        compare(
            gaussians(COUNTS, seed),
            gaussians([30] * 10, 9),
            methods=["disalign", "disalign_one", "ncm"],
            dial=(0.0, 1.0),
            sweep=(0.0, 2.0),
            stage_one=f"stage_one_{seed}.pth",
            **facts,
        )
        for seed in (1, 2)
    ]
    found[0]["runs"][0]["notes"] = ["stage one knows <all> of its training set by heart"]
    return json.loads(json.dumps(merged(found)))


def written(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def out(comparison, tmp_path_factory):
    folder = written(tmp_path_factory.mktemp("run"), comparison)
    assert console.main(["report", str(folder)]) == 0
    return folder / "report"


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are one grey dot, for tests of all else."""
    dot = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
    )
    monkeypatch.setattr(pictures, "render", lambda *_: {"light": dot, "dark": dot})


class Page(HTMLParser):
    """Tags with their attributes, all text, and the tables: rows of (text, whether it is bold)."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.tables, self.open = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append(("", False))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "th" in self.open or "td" in self.open:
            text, bold = self.tables[-1][-1].pop()
            self.tables[-1][-1].append((text + data, bold or "strong" in self.open))

    def table(self, first):
        """The rows of the table whose first heading this is, as dictionaries: of text, and of what is bold."""
        header, *rows = next(table for table in self.tables if table[0][0][0] == first)
        titles = [text for text, _ in header]
        plain = [dict(zip(titles, (text for text, _ in row), strict=True)) for row in rows]
        return plain, [{title for title, (_, bold) in zip(titles, row, strict=True) if bold} for row in rows]


def spread(values, form):
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+z')}}"


def test_the_table_has_the_figures_of_the_comparison(comparison, out):
    rows, bold = Page(out / "report.html").table("method")
    methods = comparison["runs"][0]["methods"]
    assert [row["method"] for row in rows] == [one["title"] for one in methods.values()]
    means = {}
    for name, row in zip(methods, rows, strict=True):
        figures = [run["methods"][name]["figures"] for run in comparison["runs"]]
        for key, title in comparison["columns"].items():
            values, form = [one[key] for one in figures], ".2f" if key == "nll" else ".1f"
            assert row[title] == ("n/a" if None in values else spread(values, form))
            if None not in values:
                means.setdefault(title, {})[name] = float(f"{statistics.mean(values):{form}}")
        before = [run["methods"]["stage_one"]["figures"]["average"] for run in comparison["runs"]]
        gains = [one["average"] - other for one, other in zip(figures, before, strict=True)]
        assert row["gain"] == ("" if name == "stage_one" else spread(gains, "+z.1f"))
    assert rows[list(methods).index("disalign")]["setting"] == "rho 1.2"
    for name, titles in zip(methods, bold, strict=True):
        best = {
            title for title, of in means.items() if of.get(name) == (min, max)[title not in ("ECE", "NLL")](of.values())
        }
        assert titles == best


def test_the_page_needs_nothing_else(out):
    page = Page(out / "report.html")
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
        assert not any(name.startswith("on") for name in attributes)
    style = (out / "report.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_the_page_is_read_by_everyone(out):
    page = Page(out / "report.html")
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert [tag for tag, _ in page.tags].count("h1") == 1
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(ALL) == [tag for tag, _ in page.tags].count("figcaption")
    for image in images:
        assert any(letter.isdigit() for letter in image["alt"])
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert scopes.count("col") == sum(len(table[0]) for table in page.tables)
    assert scopes.count("row") == sum(len(table) - 1 for table in page.tables)
    assert len(scopes) == scopes.count("col") + scopes.count("row")


def test_each_picture_is_in_the_page_and_beside_it_in_two_themes(out):
    page = Page(out / "report.html")
    embedded = [
        base64.b64decode(attributes.get("srcset", attributes.get("src")).partition(",")[2])
        for tag, attributes in page.tags
        if tag in ("source", "img")
    ]
    files = [out / f"{name}_{theme}.png" for name in ALL for theme in ("dark", "light")]
    assert embedded == [file.read_bytes() for file in files]
    assert {path.name for path in out.iterdir()} == {file.name for file in files} | {"report.html", "report.json"}
    sizes = [(attributes["width"], attributes["height"]) for tag, attributes in page.tags if tag == "img"]
    for number, file in enumerate(files):
        with Image.open(file) as image:
            assert sizes[number // 2] == tuple(map(str, image.size))
            colors = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
        assert max(colors)[1] == ((255, 255, 255), (0x15, 0x18, 0x1B))[number % 2 == 0]
        assert len(colors) > 20


def test_text_is_text(out):
    page = Page(out / "report.html")
    assert COMMAND in page.text
    assert not {"b", "script"} & {tag for tag, _ in page.tags}
    every = next(table for table in page.tables if "magnitude" in [text for text, _ in table[0]])
    # What is no character at all can only be replaced.
    assert [row[0][0] for row in every[1:]] == ["\ufffd" if name == "\ud800" else name for name in CLASSES]


def test_every_class_has_a_row(comparison, out):
    table = next(t for t in Page(out / "report.html").tables if "magnitude" in [text for text, _ in t[0]])
    header = [text for text, _ in table[0]]
    for label, cells in enumerate(table[1:]):
        row = dict(zip(header, (text for text, _ in cells), strict=True))
        assert (row["training count"], row["group"]) == (str(COUNTS[label]), comparison["group_of"][label])
        learnt = [run["methods"]["disalign"] for run in comparison["runs"]]
        assert row["DisAlign"] == f"{statistics.mean(one['per_class']['accuracy'][label] for one in learnt):.1f}"
        for key in ("magnitude", "margin"):
            assert row[key] == f"{statistics.mean(one[key][label] for one in learnt):.3f}"


def test_winners_and_losers(comparison, out):
    tables = [table for table in Page(out / "report.html").tables if table[0][-1][0] == "change"]
    scores = {
        name: np.mean([run["methods"][name]["per_class"]["accuracy"] for run in comparison["runs"]], 0)
        for name in ("stage_one", "disalign")
    }
    change = scores["disalign"] - scores["stage_one"]
    for table, sign in zip(tables, (1, -1), strict=True):
        found = [float(row[-1][0]) for row in table[1:]]
        assert found == pytest.approx(sorted(change[sign * change > 0], key=lambda gain: -sign * gain), abs=0.051)
        for name, count, before, after, _ in ([text for text, _ in row] for row in table[1:]):
            label = 3 if name == "\ufffd" else CLASSES.index(name)
            assert int(count) == COUNTS[label]
            assert float(before) == pytest.approx(scores["stage_one"][label], abs=0.051)
            assert float(after) == pytest.approx(scores["disalign"][label], abs=0.051)


def test_what_does_not_change_neither_wins_nor_loses():
    scores = {"stage_one": [50.0, 60.0, 70.0, None, 10.0], "disalign": [50.0, 70.0, 65.0, 5.0, math.inf]}
    methods = {name: {"figures": {"top1": 1.0}, "per_class": {"accuracy": of}} for name, of in scores.items()}
    results = Results({"columns": {"top1": "top-1"}, "runs": [{"methods": methods}]})
    winners, losers = results.movers()
    assert [(row["class"], row["change"]) for row in winners] == [("1", 10.0)]
    assert [(row["class"], row["change"]) for row in losers] == [("2", -5.0)]
    assert results.figures()["per_class"]["mean"]["disalign"] == [50.0, 70.0, 65.0, 5.0, None]


def test_the_end_says_how_it_was_made(comparison, out):
    text = Page(out / "report.html").text
    for run in comparison["runs"]:
        assert run["stage_one"] in text
    assert comparison["runs"][0]["notes"][0] in text
    assert comparison["date"] in text
    assert f"torch {torch.__version__}" in text
    assert "gaussians · split test · 300 examples · K = 10 classes · training counts 400 to 4 · rho 1.2" in text
    assert "settings: defaults · 2 stage ones" in text


def test_the_figures_drawn(comparison, out):
    kept = json.loads((out / "report.json").read_text())
    inverse = [1 / count**1.2 for count in COUNTS]
    expected = [10 * one / sum(inverse) for one in inverse]
    assert kept["weights"]["count"] == COUNTS[::-1]
    assert kept["weights"]["weight"]["1.2"] == pytest.approx(expected[::-1], rel=1e-5)
    assert kept["weights"]["weight"]["0"] == [1.0] * 10
    assert list(kept["weights"]["weight"]) == ["0", "1", "1.2"]

    first, second = ([point["figures"]["few"] for point in run["sweep"]] for run in comparison["runs"])
    assert kept["curves"]["rho"]["value"] == [0.0, 2.0]
    assert kept["curves"]["rho"]["figures"]["few"]["mean"] == pytest.approx(
        [sum(pair) / 2 for pair in zip(first, second, strict=True)]
    )
    assert kept["curves"]["strength"]["figures"]["average"]["mean"][0] == pytest.approx(
        kept["curves"]["strength"]["stage one"]["average"]
    )

    margins = np.mean([run["methods"]["disalign"]["margin"] for run in comparison["runs"]], 0)
    reference = -np.log(COUNTS)
    assert kept["calibration"]["slope"] == pytest.approx(np.polyfit(reference, margins, 1)[0])
    assert np.mean(kept["calibration"]["reference"]) == pytest.approx(margins.mean())
    assert np.diff(kept["calibration"]["reference"]) == pytest.approx(np.diff(reference))

    confusions = [run["methods"]["stage_one"]["confusion"] for run in comparison["runs"]]
    assert kept["confusion"]["percent"]["stage one"] == np.mean(confusions, 0).tolist()
    astray = kept["confusion"]["percent"]["DisAlign"][2][0]
    assert f"{astray:.1f} % (DisAlign) are taken for 'many'" in Page(out / "report.html").text
    assert all(math.isclose(sum(row), 100) for row in kept["confusion"]["percent"]["DisAlign"])
    assert kept["groups"]["logit adjustment"]["few"]["mean"] == statistics.mean(
        run["methods"]["logit_adjust"]["figures"]["few"] for run in comparison["runs"]
    )


def test_reliability_adds_up_to_the_calibration_error(comparison):
    one = comparison | {"runs": comparison["runs"][:1]}
    found = Results(one).figures()["reliability"]["DisAlign"]
    gaps = [
        share * abs(confidence - accuracy) / 100
        for share, confidence, accuracy in zip(found["share"], found["confidence"], found["accuracy"], strict=True)
        if share
    ]
    assert sum(gaps) == pytest.approx(one["runs"][0]["methods"]["disalign"]["figures"]["ece"])


def test_logit_adjustment_has_slope_one(comparison):
    assert Results(comparison, "logit_adjust").figures()["calibration"]["slope"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("size", [3, 60, 1000])
def test_the_rolling_mean_is_that_of_the_neighbours(size):
    rng = np.random.default_rng(0)
    count, values = rng.integers(1, size // 2 + 2, size).astype(float), rng.random(size)
    values[1] = np.nan
    pairs = sorted(((c, v) for c, v in zip(count, values, strict=True) if v == v), key=lambda pair: pair[0])
    half, expected = max(len(pairs) // 20, 2), {}
    for place, (own, _) in enumerate(pairs):
        near = [v for _, v in pairs[max(place - half, 0) : place + half + 1]]
        expected.setdefault(own, []).append(statistics.mean(near))
    unique, found = pictures.rolling(count, values)
    assert unique.tolist() == list(expected)
    assert found == pytest.approx([statistics.mean(one) for one in expected.values()])


def test_pictures_draw_their_figures(comparison):
    figures = Results(comparison).figures()
    figure = Figure()
    pictures.groups(figure, figures["groups"])
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers if hasattr(bars, "datavalues")]
    assert heights == [[one["mean"] for one in of.values()] for of in figures["groups"].values()]

    shuffled = copy.deepcopy(figures["per_class"])
    shuffled["count"] = COUNTS[::-1]
    figure = Figure()
    pictures.per_class(figure, shuffled, {"stage_one": "before", "disalign": "after"})
    drawn = [bar[0].get_ydata().tolist() for bar in figure.axes[0].containers]
    assert drawn == [shuffled["mean"][name][::-1] for name in ("stage_one", "disalign")]
    assert figure.axes[0].get_xticklabels()[0].get_text() == "j (400)"

    figure = Figure()
    pictures.calibration(figure, figures["calibration"])
    for axes, key in zip(figure.axes, ("magnitude", "margin"), strict=True):
        assert axes.lines[0].get_ydata().tolist() == figures["calibration"][key]["mean"]
    assert figure.axes[1].lines[-1].get_ydata().tolist() == figures["calibration"]["reference"][::-1]

    figure = Figure()
    pictures.curves(figure, figures["curves"])
    assert figure.axes[0].lines[0].get_ydata().tolist() == figures["curves"]["rho"]["figures"]["average"]["mean"]
    assert [axes.lines[-1].get_xdata()[0] for axes in figure.axes] == [1.2, 1.0]


def collapsed(comparison, mean):
    content = copy.deepcopy(comparison)
    content["runs"][1]["methods"]["disalign"]["confidence"] = {"count": [300.0] + [0.0] * 14, "mean": mean}
    return content


@pytest.mark.parametrize(("mean", "warned"), [(0.049, True), (0.051, False)])
def test_a_collapsed_confidence_is_a_warning(mean, warned, comparison, tmp_path, undrawn):
    folder = written(tmp_path, collapsed(comparison, mean))
    assert console.main(["report", str(folder)]) == 0
    text = Page(folder / "report" / "report.html").text
    assert ("Warning: " in text) == warned
    assert ("the mean confidence fell to 0.049: magnitude and margin hardly get" in text) == warned
    other = comparison["runs"][0]["methods"]["disalign"]["confidence"]["mean"]
    assert f"near 0 leaves stage one's scores; here it is {(mean + other) / 2:.2f}." in text


def test_the_method_is_named_or_disalign_whatever_the_scores(comparison, tmp_path, undrawn, capfd):
    content = copy.deepcopy(comparison)
    for run in content["runs"]:
        run["methods"]["disalign"]["figures"]["average"] = 0.0
    folder = written(tmp_path, content)
    assert console.main(["report", str(folder)]) == 0
    assert dict(Page(folder / "report" / "report.html").tags)["title"] == {}
    assert "DisAlign on gaussians" in Page(folder / "report" / "report.html").text
    assert console.main(["report", str(folder), "--method", "ncm", "--out", str(tmp_path / "other")]) == 0
    assert "Nearest mean, cosine on gaussians" in Page(tmp_path / "other" / "report.html").text
    kept = json.loads((tmp_path / "other" / "report.json").read_text())
    assert list(kept["confusion"]["percent"]) == ["stage one", "nearest mean, cosine"]
    assert "calibration" not in kept
    capfd.readouterr()
    assert console.main(["report", str(folder), "--method", "stage_one", "--out", str(tmp_path / "third")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "error: expected a method of this comparison as --method, got 'stage_one'; give logit_adjust"
    )


def test_without_disalign_the_best_supported_stands_in(comparison):
    content = copy.deepcopy(comparison)
    for run in content["runs"]:
        del run["methods"]["disalign"]
    assert Results(content).method == "disalign_one"
    for run in content["runs"]:
        del run["methods"]["disalign_one"]
    del content["runs"][1]["methods"]["logit_adjust"]
    assert Results(content).method == "ncm"


MISSING = {
    "class_counts": {"weights", "calibration"},
    "group_of": set(),
    "classes": set(),
    "rho": {"weights"},
    "per_class": {"per_class"},
    "dial": set(),
    "sweep": set(),
    "dial sweep": {"curves"},
    "magnitude": {"calibration"},
    "confidence": {"confidence"},
    "confusion": {"confusion"},
    "reliability": {"reliability"},
    "setting seconds title notes seed stage_one versions date command split dataset task settings examples": set(),
}


@pytest.mark.parametrize("keys", MISSING)
def test_what_is_missing_is_left_out(keys, comparison, tmp_path, undrawn):
    content = copy.deepcopy(comparison)
    for key in keys.split():
        for place in [content, *content["runs"], *(one for run in content["runs"] for one in run["methods"].values())]:
            if place is not content or key != "stage_one":
                place.pop(key, None)
    if keys == "rho":
        for run in content["runs"]:
            del run["methods"]["disalign"]["setting"]
    results = Results(content)
    assert [one.name for one in all_pictures(results, results.figures())] == [
        name for name in ALL if name not in MISSING[keys]
    ]
    folder = written(tmp_path, content)
    assert console.main(["report", str(folder)]) == 0
    assert "None" not in Page(folder / "report" / "report.html").text


def test_the_least_comparison(tmp_path):
    content = {"columns": {"AP": "AP"}, "runs": [{"methods": {"disalign": {"figures": {"AP": 12.34, "APr": None}}}}]}
    folder = written(tmp_path, content)
    assert console.main(["report", str(folder)]) == 0
    page = Page(folder / "report" / "report.html")
    assert [row["AP"] for row in page.table("method")[0]] == ["12.3"]


def test_an_evaluations_results(tmp_path, undrawn):
    before, after = (
        {"mIoU": 30.0, "mIoU.head": 50.0, "mIoU.tail": 10.0},
        {"mIoU": 35.0, "mIoU.head": 45.0, "mIoU.tail": 25.0},
    )
    per_class = {"group": ["head", "tail", None], "IoU": [45.0, 25.0, math.nan]}
    content = report(after, before, per_class=per_class, stage_one_per_class={"IoU": [50.0, 10.0, math.nan]})
    path = tmp_path / "results_fit_rho-0.8.json"
    path.write_text(json.dumps(content | {"classes": ["sky", "pole", "void"], "class_counts": [90, 9, 1], "images": 7}))
    assert console.main(["report", str(path)]) == 0
    page = Page(tmp_path / "report_results_fit_rho-0.8" / "report.html")
    assert page.table("method")[0] == [
        {"method": "stage one", "mIoU": "30.0", "gain": "", "mIoU.head": "50.0", "mIoU.tail": "10.0"},
        {"method": "DisAlign", "mIoU": "35.0", "gain": "+5.0", "mIoU.head": "45.0", "mIoU.tail": "25.0"},
    ]
    assert "segmentation · 7 examples · K = 3 classes" in page.text
    assert "From stage one to DisAlign, in percent: mIoU 30.0 → 35.0, head 50.0 → 45.0, tail 10.0 → 25.0." in page.text
    winners = page.table("class")[0]
    assert [(row["class"], row["change"]) for row in winners] == [("pole", "+15.0")]


def test_a_segmentations_comparison_counts_pixels(comparison, tmp_path, undrawn):
    content = copy.deepcopy(comparison) | {"task": "segmentation", "columns": {"mIoU": "mIoU", "average": "aAcc"}}
    for run in content["runs"]:
        for one in run["methods"].values():
            one["per_class"]["iou"] = [value / 2 for value in one["per_class"]["accuracy"]]
    folder = written(tmp_path, content)
    assert console.main(["report", str(folder)]) == 0
    text = Page(folder / "report" / "report.html").text
    assert "of the pixels of 'few', " in text
    assert "The IoU of each class, from many to few in training" in text
    kept = json.loads((folder / "report" / "report.json").read_text())
    assert kept["groups"]["DisAlign"]["many"]["mean"] == statistics.mean(
        run["methods"]["disalign"]["figures"]["mIoU.many"] for run in content["runs"]
    )
    assert kept["per_class"]["mean"]["ncm"][0] == statistics.mean(
        run["methods"]["ncm"]["per_class"]["iou"][0] for run in content["runs"]
    )


def test_a_detectors_results_by_task(tmp_path, undrawn):
    tasks = {
        task: report({"AP": ap, "APr": 1.0, "APc": 2.0, "APf": 3.0}, {"AP": 10.0, "APr": 0.0, "APc": 1.0, "APf": 4.0})
        for task, ap in (("bbox", 20.0), ("segm", 15.0))
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"lvis_val": tasks}))
    assert console.main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    page = Page(tmp_path / "out" / "report.html")
    assert [[row[1][0] for row in table[1:]] for table in page.tables] == [["10.0", "20.0"], ["10.0", "15.0"]]
    assert "in percent: AP 10.0 → 20.0, APf 4.0 → 3.0, APc 1.0 → 2.0, APr 0.0 → 1.0" in page.text
    assert "lvis_val bbox" in page.text
    assert (tmp_path / "out" / "lvis_val_segm_groups_light.png").is_file()
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())) == {"lvis_val bbox", "lvis_val segm"}


def many_classes(number=8142):
    rng = np.random.default_rng(0)
    counts = np.maximum(2, 1000 * 0.002 ** (np.arange(number) / number)).astype(int)
    counts[7] = 0
    methods = {}
    for name, shift in (("stage_one", 0), ("disalign", 15)):
        accuracy = rng.integers(0, 4, number) * 25.0 + shift * rng.random(number)
        methods[name] = {
            "figures": {"average": accuracy.mean(), "many": 1.0, "few": None},
            "per_class": {"accuracy": accuracy.tolist()},
            "magnitude": rng.random(number).tolist(),
            "margin": rng.random(number).tolist(),
        }
    return {
        "columns": {"average": "average"},
        "rho": 1.0,
        "class_counts": counts.tolist(),
        "classes": [f"species {label}" for label in range(number)],
        "runs": [{"methods": methods}],
    }


def test_with_8142_classes(tmp_path):
    content = many_classes()
    folder, begun = written(tmp_path, content), time.process_time()
    assert console.main(["report", str(folder)]) == 0
    assert time.process_time() - begun < 20
    assert (folder / "report" / "report.html").stat().st_size < 2e6
    page = Page(folder / "report" / "report.html")
    before, after = (np.array(one["per_class"]["accuracy"]) for one in content["runs"][0]["methods"].values())
    best = np.argsort(after - before)[::-1][:10]
    assert {row["class"] for row in page.table("class")[0]} == {f"species {label}" for label in best}
    assert max(map(len, page.tables)) == 11
    assert "The figures of all 8,142 classes are in report.json, under per_class." in page.text
    kept = json.loads((folder / "report" / "report.json").read_text())
    assert kept["per_class"]["mean"]["disalign"] == after.tolist()
    # The class without training examples has no weight and nothing learnt, but a place on the axis.
    assert kept["weights"]["count"][0] == 2
    assert kept["calibration"]["count"] == [count for count in content["class_counts"] if count]
    figure = Figure()
    pictures.per_class(figure, kept["per_class"], {"stage_one": "before", "disalign": "after"})
    assert figure.axes[-1].get_xscale() == "symlog"
    assert -1 < figure.axes[-1].get_xlim()[0] < 0


def test_what_is_not_finite_is_not_there(comparison):
    content = copy.deepcopy(comparison)
    for run in content["runs"]:
        run["methods"]["disalign"]["confidence"]["count"][0] = math.inf
        run["methods"]["disalign"]["reliability"]["accuracy"][14] = math.inf
        run["methods"]["stage_one"]["reliability"]["count"] = [0.0] * 15
    results = Results(content)
    figures = results.figures()
    assert "confidence" not in figures
    assert figures["reliability"]["stage one"]["share"] == [None] * 15
    json.dumps(figures, allow_nan=False)
    drawn = next(one for one in all_pictures(results, figures) if one.name == "reliability")
    assert drawn.render()


@pytest.mark.parametrize(("number", "drawn"), [(20, True), (21, False)])
def test_only_few_classes_have_a_picture_without_counts(number, drawn):
    content = many_classes(number)
    del content["class_counts"]
    results = Results(content)
    names = [one.name for one in all_pictures(results, results.figures())]
    assert ("per_class" in names) == drawn
    assert "groups" in names


BAD = {
    "no file": (None, "expected a comparison or results at "),
    "no JSON": ("{", "expected a comparison or results as JSON in "),
    "another JSON": ({"images": [], "annotations": [{"id": 1}]}, "got JSON without 'runs' and 'figures'; give the"),
    "a list": ([1], "got JSON without 'runs' and 'figures'"),
    "no runs": ({"columns": {"a": "a"}, "runs": []}, "but: it has no methods; write it anew"),
    "no methods": ({"columns": {"a": "a"}, "runs": [{}]}, "but: it lacks 'methods'"),
    "no columns": ({"runs": [{"methods": {"a": {"figures": {}}}}]}, "but: it lacks 'columns'"),
    "no figures": ({"columns": {"a": "a"}, "runs": [{"methods": {"a": {}}}]}, "but: it lacks 'figures'"),
    "words": ({"figures": {"AP": "high"}}, "but: could not convert string to float: 'high'"),
    "other lengths": (
        {"figures": {"AP": 1.0}, "per_class": {"AP": [1.0, 2.0]}, "classes": ["a"]},
        "but: its lists are of 1, 2 classes",
    ),
    "runs of other lengths": (
        {
            "columns": {"average": "average"},
            "runs": [
                {"methods": {"a": {"figures": {"average": 1.0}, "per_class": {"accuracy": [1.0] * number}}}}
                for number in (2, 3)
            ],
        },
        "expected a comparison or results in ",
    ),
    "a confusion of other groups": (
        {
            "columns": {"average": "average"},
            "runs": [{"methods": {"a": {"figures": {"average": 1.0, "many": 1.0}, "confusion": [[1, 2], [3, 4]]}}}],
        },
        "but: it has 1 groups, and a confusion of (2, 2)",
    ),
    "no counts": (
        {
            "columns": {"average": "average"},
            "rho": -1,
            "class_counts": [3, 4],
            "runs": [{"methods": {"a": {"figures": {"average": 1}}}}],
        },
        "expected a finite rho >= 0, got -1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tmp_path, capfd):
    content, message = BAD[case]
    if content is not None:
        (tmp_path / "comparison.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert console.main(["report", str(tmp_path)]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: expected")
    assert message in line
    assert not (tmp_path / "report").exists()


def test_an_earlier_report_is_kept_without_force(comparison, tmp_path, undrawn, capfd):
    folder = written(tmp_path, comparison)
    (folder / "report").mkdir()
    page = folder / "report" / "report.html"
    page.write_text("mine")
    assert console.main(["report", str(folder)]) == 2
    assert "exists; add --force to replace it" in capfd.readouterr().err
    assert page.read_text() == "mine"
    assert list(page.parent.iterdir()) == [page]
    assert console.main(["report", str(folder), "--force"]) == 0
    assert "DisAlign on gaussians" in Page(page).text


def test_pictures_of_an_earlier_report_go_with_it(comparison, tmp_path, undrawn):
    folder = written(tmp_path, comparison)
    assert console.main(["report", str(folder)]) == 0
    before = {path.name for path in (folder / "report").iterdir()}
    own = {"confusion.png", "other_confusion_light.png", "confusion_light.png.bak"}
    for name in own:
        (folder / "report" / name).write_text("mine")
    fewer = copy.deepcopy(comparison)
    for run in fewer["runs"]:
        for one in run["methods"].values():
            del one["confusion"]
    written(folder, fewer)
    assert console.main(["report", str(folder), "--force"]) == 0
    gone = {"confusion_light.png", "confusion_dark.png"}
    assert {path.name for path in (folder / "report").iterdir()} == before - gone | own
    # Without --force nothing goes: they may be someone's own.
    for name in ("report.html", "report.json", *before - gone - {"report.html", "report.json"}):
        (folder / "report" / name).unlink()
    (folder / "report" / "confusion_light.png").write_text("mine")
    assert console.main(["report", str(folder)]) == 0
    assert (folder / "report" / "confusion_light.png").read_text() == "mine"


def test_what_is_read_is_never_replaced(comparison, tmp_path, undrawn, capfd):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(comparison))
    assert console.main(["report", str(path), "--out", str(tmp_path), "--force"]) == 2
    assert "which is read; name another" in capfd.readouterr().err
    assert json.loads(path.read_text()) == comparison


def browse(page, folder, scheme):
    """Screenshot, console lines and addresses that a page asks for in Chromium; ``scheme`` 0 is dark, 1 light."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (Debian's package of this name) to open the page in, and there is none")
    folder.mkdir()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={scheme}"]
    options += ["--window-size=800,1200", f"--screenshot={folder / 'shot.png'}", f"--log-net-log={folder / 'net.json'}"]
    options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    done = subprocess.run([chromium, *options], capture_output=True, text=True, timeout=120)
    events = json.loads((folder / "net.json").read_text())["events"]
    requests = [event["params"] for event in events if "initiator" in event.get("params", {})]
    # The browser's own requests, whatever it shows, come from no page.
    asked = {request["url"] for request in requests if request["initiator"] != "not an origin"}
    with Image.open(folder / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


def test_a_browser_shows_the_page_light_and_dark(out, tmp_path):
    for scheme, background in ((1, (255, 255, 255)), (0, (0x15, 0x18, 0x1B))):
        pixels, lines, asked = browse(out / "report.html", tmp_path / str(scheme), scheme)
        assert lines == []
        assert asked == set()
        assert pixels.shape == (1200, 800, 3)
        assert tuple(pixels[0, 0]) == background
        # Text and tables above, the bars or dots of a picture below.
        for part in (pixels[:600], pixels[600:]):
            assert 0.01 < (part != background).any(2).mean() < 0.5


def test_the_browser_would_tell(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://page.invalid/x.png"><script>console.error("wrong")</script>')
    _, lines, asked = browse(page, tmp_path / "browser", 1)
    assert len(lines) == 1
    assert asked == {"http://page.invalid/x.png"}
