"""Before and after: the one table and the one JSON shape of all tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, float | None]
PerClass = Mapping[str, Sequence[Any]]


def report(
    figures: Figures,
    stage_one: Figures | None = None,
    *,
    per_class: PerClass | None = None,
    stage_one_per_class: PerClass | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """An evaluation's figures, with stage one's on the same data beside them, ready for JSON.

    Args:
        figures, stage_one: name -> percent; ``None`` or NaN where nothing was evaluated, which becomes null, never 0.
        per_class, stage_one_per_class: column -> K values.
        facts: what was evaluated: ``dataset``, ``split``, ``images``, ``classes``, ``groups`` and the like.

    Returns:
        ``{**facts, "unit": "percent", "figures", "per_class", "stage_one": {"figures", "per_class"}}``, without the
        entries that are not given.
    """

    def evaluated(figures: Figures, per_class: PerClass | None) -> dict[str, Any]:
        return {"figures": dict(figures)} | ({} if per_class is None else {"per_class": dict(per_class)})

    content = {**facts, "unit": "percent", **evaluated(figures, per_class)}
    if stage_one is not None:
        content["stage_one"] = evaluated(stage_one, stage_one_per_class)
    return {key: without_nan(value) for key, value in content.items()}


def without_nan(value: Any) -> Any:
    """A value for JSON: NaN becomes ``None``, within mappings and lists too."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table(content: Mapping[str, Any], columns: Mapping[str, str] | Sequence[str] = ()) -> str:
    """A :func:`report` as text: its figures in one row, or stage one, DisAlign and the gain in points.

    ``columns`` are figures in the order of the columns, perhaps with their titles; by default all of them.
    """
    after, before = content["figures"], content.get("stage_one", {}).get("figures")
    titles = columns if isinstance(columns, Mapping) else {name: name for name in columns or after}
    stages = {"": after} if before is None else {"stage one": before, "DisAlign": after}
    rows = [["percent", *titles.values()]]
    rows += [[stage, *(shown(figures.get(name)) for name in titles)] for stage, figures in stages.items()]
    if before is not None:
        rows.append(["gain", *(shown(gain(before.get(name), after.get(name)), "+z.1f") for name in titles)])
    return text_table(rows)


def gain(before: float | None, after: float | None) -> float | None:
    """In points; ``None`` without one of the two figures."""
    return None if before is None or after is None else after - before


def shown(value: float | None, form: str = ".1f") -> str:
    """A figure for a table: ``45.67`` -> ``"45.7"``; ``None`` or NaN -> ``"n/a"``."""
    return "n/a" if value is None or math.isnan(value) else format(value, form)


def text_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells, a header first, as aligned text: the first column to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
