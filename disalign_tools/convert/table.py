"""A table of how a source's tensors were converted."""

import re

from .classifier import Part


def table(result: dict[str, Part], dropped: dict[str, str], alone: set[str], verbose: bool) -> str:
    """One line for each module, or each tensor; the tensors of the result in ``alone`` have one in any case.

    ``dropped`` are names in the source, and why ("" if it is clear).
    """
    rows = [("mapped" if part.source else "new", part.source or "", name, part.change) for name, part in result.items()]
    rows += [("dropped", name, "", why) for name, why in dropped.items()]
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for status, source, name, change in rows:
        shown = (source, name) if verbose or name in alone else (_module(source), _module(name))
        groups.setdefault((status, *shown, change), []).append((source, name))
    lines = []
    for (status, source, name, change), members in groups.items():
        if len(members) == 1:
            source, name = members[0]
        lines.append((f"{status:7}  {len(members):5}", source, f"-> {name}" if name else "", change))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(("", *map(str.ljust, line, widths))).rstrip() for line in lines)


def _module(name):
    """``"backbone.layer1.0.conv1.weight"`` -> ``"backbone.layer1.*"``: two words at most, up to a number."""
    found = re.match(r"[^.\d][^.]*(?:\.[^.\d][^.]*)?(?=\.)", name)
    return f"{found[0]}.*" if found else name
