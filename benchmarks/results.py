"""The tables of docs/results.md, from the comparisons whose figures docs/results/ keeps.

    python benchmarks/results.py docs/results/NAME.json                       # its table, in Markdown
    python benchmarks/results.py OUT/comparison.json ... --keep docs/results/NAME.json

``--keep`` leaves of the files of ``disalign compare`` (one or several, a run for each stage one) the figures, settings
and seconds of each method, stage one's figures on its training set, and the curves over rho and the dial; what else the
report needs is dropped.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from disalign.cli import command
from disalign.comparison import table_rows
from disalign.io import read_json, write_json

FACTS = ("command", "task", "dataset", "split", "rho", "settings", "groups_text", "unit", "columns", "versions", "date")
FIGURES = ("title", "setting", "seconds", "figures")


def kept(content: dict[str, Any]) -> dict[str, Any]:
    """A comparison without what its table does not need."""

    def figures(run: dict[str, Any]) -> dict[str, Any]:
        return {name: {key: one[key] for key in FIGURES if key in one} for name, one in run["methods"].items()}

    runs = [
        {**{key: run[key] for key in ("train", "dial", "sweep") if key in run}, "methods": figures(run)}
        for run in content["runs"]
    ]
    return {key: content[key] for key in FACTS if key in content} | {"runs": runs}


def markdown(content: dict[str, Any]) -> str:
    header, *rows = table_rows(content)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("files", nargs="+", metavar="FILE")
    arguments.add_argument("--keep", metavar="FILE", type=Path, help="write the figures of all files to this one")
    args = arguments.parse_args(argv)
    first, *others = (kept(read_json(path, "a comparison")) for path in args.files)
    content = {**first, "runs": [run for one in (first, *others) for run in one["runs"]]}
    if args.keep:
        write_json(args.keep, content)
    print(markdown(content))


if __name__ == "__main__":
    sys.exit(main())
