"""One page about a comparison, with pictures: disalign report FOLDER_OR_JSON [--out DIR] [--method NAME] [--force]

FOLDER_OR_JSON is the folder or the comparison.json that `disalign compare` wrote, or the results (JSON) of an
evaluation. Writes report.html, which needs no other file, no script and no network; its pictures as PNG; and
report.json, the figures that they show.
"""

import argparse
import base64
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from disalign.cli import command
from disalign.errors import input_errors
from disalign.io import atomic_file, require_place, write_json
from disalign.report import shown

from .captions import PICTURES, all_pictures, lead
from .pictures import THEMES
from .results import LOWER_IS_BETTER, SHAPE_ERRORS, Data, Results, counted, decimals, read_results

#: Classes up to which the page has a row for each.
ROWS = 200


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("results", type=Path, metavar="FOLDER_OR_JSON")
    arguments.add_argument(
        "--out", type=Path, metavar="DIR", help="default: beside the JSON, report for comparison.json, else report_NAME"
    )
    arguments.add_argument(
        "--method", metavar="NAME", help="beside stage one in the pictures; default: disalign, whatever its score"
    )
    arguments.add_argument("--force", action="store_true", help="replace an earlier report")
    args = arguments.parse_args(argv)
    source = args.results / "comparison.json" if args.results.is_dir() else args.results
    name = source.name.removesuffix(".json")
    out = args.out or source.parent / ("report" if name == "comparison" else f"report_{name}")
    print(f"written to {write_report(source, out, args.method, args.force)}")


def write_report(source: Path, out: Path, method: str | None = None, force: bool = False) -> Path:
    """Write the report of a comparison, or of an evaluation's results, into a folder.

    Args:
        source: the JSON, see :func:`.results.read_results`.
        out: made if it is missing.
        method: see :class:`.results.Results`.
        force: replace an earlier report.

    Returns:
        The page.

    Raises:
        InputError: JSON of another shape, an unknown method, or a report that is there already.
    """
    page, kept = out / "report.html", out / "report.json"
    for path in (page, kept):
        require_place(path, [source], "the report", force)
    found: dict[str, tuple[Results, Data]] = {}
    with input_errors(f"expected a comparison or results in {str(source)!r}", "write it anew", SHAPE_ERRORS):
        for name, content in read_results(source).items():
            results = Results(content, method)
            found[name] = results, results.figures()
    bodies, images = [], dict[str, bytes]()
    for name, (results, figures) in found.items():
        body, drawn = _part(name, results, figures)
        bodies.append(body)
        images |= drawn
    for picture in images:
        require_place(out / picture, [source], "a picture", force)
    for picture, png in images.items():
        with atomic_file(out / picture) as file:
            file.write(png)
    write_json(kept, {name: figures for name, (_, figures) in found.items()} if found.keys() - {""} else figures)
    title = _sentence(f"{results.titles[results.method]} on {results.dataset or 'a test set'}")
    if force:  # an earlier report may have had more pictures
        earlier = {file for name in found for picture in PICTURES for file in _files(name, picture).values()}
        for picture in earlier - images.keys():
            (out / picture).unlink(missing_ok=True)
    with atomic_file(page) as file:
        file.write(_page(title, "\n".join(bodies)).encode("utf-8", "xmlcharrefreplace"))
    return page


def _part(name: str, results: Results, figures: Data) -> tuple[str, dict[str, bytes]]:
    """The HTML of one comparison, and its pictures by file name."""
    tag, images = "h3" if name else "h2", dict[str, bytes]()
    facts, groups, made = (figures["facts"][key] for key in ("facts", "groups", "made"))
    body = [f"<h2>{escape(name)}</h2>"] if name else []
    body.append(f'<p class="facts">{escape(" · ".join(facts))}</p>')
    body.append(f"<p>{escape(_sentence(lead(results)))}.</p>")
    body += [f"<p>Groups by training data: {escape(groups)}.</p>"] if groups else []
    body += [
        f"<{tag}>{'All methods' if len(results.titles) > 1 else 'Figures'}</{tag}>",
        _methods(results, figures["table"]),
    ]
    for picture in all_pictures(results, figures):
        drawn = picture.render()
        images |= {file: drawn[theme] for theme, file in _files(name, picture.name).items()}
        body += [f"<{tag}>{escape(picture.title)}</{tag}>", _figure(drawn, picture.caption, picture.alt)]
        if picture.warning:
            body.append(f'<p class="warning"><strong>Warning:</strong> {escape(picture.warning)}.</p>')
    if any(movers := results.movers() or ()):
        body += [f"<{tag}>Winners and losers</{tag}>", _movers(results, movers)]
    if "per_class" in figures:
        body += [f"<{tag}>All classes</{tag}>", _classes(results, figures)]
    rows = (f"<dt>{escape(what)}</dt>" + "".join(f"<dd>{escape(one)}</dd>" for one in made[what]) for what in made)
    body += [f"<{tag}>How it was made</{tag}>", f"<dl>{''.join(rows)}</dl>"]
    return "\n".join(body), images


def _files(name: str, picture: str) -> dict[str, str]:
    """Theme -> file name, of a picture of the comparison of this name."""
    prefix = "".join(letter if letter.isalnum() else "_" for letter in name) + "_" * bool(name)
    return {theme: f"{prefix}{picture}_{theme}.png" for theme in THEMES}


def _methods(results: Results, rows: Data) -> str:
    """THE table, without columns that have nothing to tell."""
    best = results.best() if len(rows) > 1 else {}
    columns: dict[str, list[Any]] = {"method": [row["title"] for row in rows.values()]}
    columns["setting"] = [row["setting"] for row in rows.values()]
    for key, title in results.columns.items():
        form = f".{decimals(key)}f"
        columns[title] = [
            (_plus_minus(row["figures"][key], form), name in best.get(key, ())) for name, row in rows.items()
        ]
        if key == results.first:
            columns["gain"] = [
                "" if name == "stage_one" else _plus_minus(row["gain"], "+z.1f") for name, row in rows.items()
            ]
    columns["s"] = [shown(row["seconds"]) for row in rows.values()]
    columns = {title: cells for title, cells in columns.items() if {*cells} - {"", shown(None)}}
    note = "Percent."
    if "gain" in columns:
        note += " Gain: points of the first figure."
    if "nll" in results.columns:
        note += " NLL: nats."
    if "s" in columns:
        note += " s: seconds to learn, once there are features."
    if len(results.runs) > 1:
        note += f" Mean ± standard deviation over {len(results.runs)} stage ones."
    if best:
        lowest = ", ".join(results.columns[key] for key in LOWER_IS_BETTER if key in results.columns)
        note += (
            f" Bold: the best mean of each column{f' ({lowest}: the lowest)' if lowest else ''}, which is known only "
        )
        note += "after the evaluation."
    return _table(note, list(columns), list(zip(*columns.values(), strict=True)))


def _movers(results: Results, movers: Iterable[list[Data]]) -> str:
    header = ["class", "training count", *(results.titles[name] for name in results.shown), "change"]
    tables = []
    for what, rows in zip(("gain", "lose"), movers, strict=True):
        cells = [
            [
                one["class"],
                counted(one["count"]),
                *(shown(one[key]) for key in ("before", "after")),
                f"{one['change']:+.1f}",
            ]
            for one in rows
        ]
        if cells:
            tables.append(_table(f"Classes that {what} the most, {results.score_title} in percent", header, cells))
    return f'<div class="beside">{"".join(f"<div>{table}</div>" for table in tables)}</div>'


def _classes(results: Results, figures: Data) -> str:
    if results.num_classes > ROWS:
        return f"<p>The figures of all {results.num_classes:,} classes are in report.json, under per_class.</p>"
    data, columns = figures["per_class"], {}
    columns["class"] = data["class"]
    if "count" in data:
        columns["training count"] = [counted(value) for value in data["count"]]
    if "group" in data:
        columns["group"] = [group or "" for group in data["group"]]
    for name, values in data["mean"].items():
        columns[results.titles[name]] = [shown(value) for value in values]
    caption = f"{data['score']} in percent"
    learnt = figures.get("calibration")
    if learnt and len(learnt["count"]) == results.num_classes:
        caption += f", and what {results.titles[results.method]} learnt"
        columns |= {key: [shown(value, ".3f") for value in learnt[key]["mean"]] for key in ("magnitude", "margin")}
    return _table(caption, list(columns), list(zip(*columns.values(), strict=True)))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plus_minus(figure: Mapping[str, float | None], form: str) -> str:
    spread = "" if figure["sd"] is None else f" ± {shown(figure['sd'], form.lstrip('+z'))}"
    return shown(figure["mean"], form) + spread


def _figure(drawn: Mapping[str, bytes], caption: str, alt: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(drawn[theme]).decode()}" for theme in THEMES)
    width, height = struct.unpack(">II", drawn["light"][16:24])
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}" width="{width}" height="{height}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells are text, or text and whether it is bold; the first of a row is its heading."""

    def cell(value: Any) -> str:
        text, bold = value if isinstance(value, tuple) else (value, False)
        return f"<td><strong>{escape(text)}</strong></td>" if bold else f"<td>{escape(text)}</td>"

    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(map(cell, others))}</tr>' for first, *others in rows
    )
    # The caption is no <caption>: that scrolls with the table.
    return (
        f'<p class="note">{escape(caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _page(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
<p>The figures behind the pictures are in report.json.</p>
</main>
</body>
</html>
"""


STYLE = f"""
:root {{ --ink: #222; --page: {THEMES["light"][0]}; --line: #d8d8d8; --soft: #595f65; --warn: #a33b00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e4e4; --page: {THEMES["dark"][0]}; --line: #3a4046; --soft: #a9b0b7; --warn: #f0a070; }}
}}
body {{ margin: 0; color: var(--ink); background: var(--page); font: 1rem/1.55 system-ui, sans-serif; }}
main {{ max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.25rem; margin: 2.8rem 0 .6rem; }}
h3 {{ font-size: 1.05rem; margin: 2.2rem 0 .5rem; }}
p, dl, figure {{ max-width: 46rem; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; height: auto; display: block; }}
.facts, .note, figcaption, dt {{ color: var(--soft); }}
.note, figcaption {{ font-size: .92rem; line-height: 1.45; margin: .5rem 0; }}
.beside {{ display: flex; flex-wrap: wrap; column-gap: 3rem; }}
.beside div {{ max-width: 100%; }}
.scroll {{ overflow: auto; max-height: 60rem; margin: .6rem 0 1.4rem; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
tr > :first-child {{ text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page); }}
thead th {{ position: sticky; top: 0; background: var(--page); border-bottom: 2px solid var(--soft); }}
thead th:first-child {{ z-index: 1; }}
tbody th {{ font-weight: 400; white-space: normal; overflow-wrap: break-word; min-width: min(11rem, 36vw); }}
.warning {{ border-left: .25rem solid var(--warn); padding: .4rem .9rem; }}
.warning strong {{ color: var(--warn); }}
dt {{ margin-top: .7rem; }}
dd {{ margin: 0; }}
@media print {{ .scroll {{ max-height: none; }} }}
"""

if __name__ == "__main__":
    sys.exit(main())
