"""The checks of an installation, as text and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import commands
from .commands import OPENMMLAB, install, requirements, satisfies, version_of
from .libraries import LIBRARIES, OPENCV, PARTS, Library
from .probes import NOT_INSTALLED, try_all

OK, NOTE, PROBLEM, ABSENT = "ok", "note", "problem", "absent"


class Check(NamedTuple):
    """A library, a conflict, or a part that is absent; ``command`` repairs it in a shell."""

    name: str
    parts: list[str]
    state: str
    installed: str
    detail: str
    command: str | None


def examine(asked: Sequence[str] = (), timeout: int = 120) -> list[Check]:
    """Check the core and the parts that are asked for, or else those that are installed."""
    missing = {library.name: library for library in LIBRARIES if not commands.is_there(library)}
    absent = [part for part, frameworks in PARTS.items() if missing.keys() & frameworks.split()]
    parts = [part for part in PARTS if part == "core" or (part in asked if asked else part not in absent)]
    tried = [library for library in LIBRARIES if {*library.parts.split()} & {*parts}]
    outcomes = try_all(tried, timeout)
    checks = [*(_of_library(library, *outcomes[library.name]) for library in tried), *_conflicts()]
    checks = [check._replace(parts=[part for part in parts if part in check.parts]) for check in checks]
    for part in [] if asked else absent:
        lacking = [library for library in missing.values() if part in library.parts.split()]
        command = install(*(library.distributions.split()[0] for library in lacking))
        checks.append(
            Check(part, [part], ABSENT, "", f"not installed: {', '.join(each.name for each in lacking)}", command)
        )
    return [check for check in checks if check.parts]


def _of_library(library: Library, value: str, error: str) -> Check:
    name = commands.installed(library) or ""
    version, wanted = version_of(name) or "", requirements().get(name, "")
    state, detail, command = OK, value, None
    if error:
        state = NOTE if error.startswith("UserWarning: ") else PROBLEM
        detail = error.removeprefix("UserWarning: ")[:300]
        command = commands.repair(library, error)
    if error == NOT_INSTALLED:
        command = install(library.distributions.split()[0])
    elif version and not satisfies(version, wanted):
        state, detail, command = PROBLEM, f"expected {wanted}; {detail}", install(name)
    if error.startswith("not tried"):
        command = None
    return Check(library.name, library.parts.split(), state, f"{name} {version}".strip(), detail, command)


def _conflicts() -> Iterator[Check]:
    """What the metadata tells, whatever can be imported."""
    if pairs := {ours: theirs for theirs, ours in OPENMMLAB.items() if version_of(ours) and version_of(theirs)}:
        detail = f"{', '.join(map(' and '.join, pairs.items()))} are both installed and overwrite each other's files"
        yield Check("OpenMMLab", ["cls", "mmseg"], PROBLEM, "", detail, install(*pairs))
    opencv = {name: version_of(name) for name in OPENCV.split() if version_of(name)}
    if len({*opencv.values()}) > 1:
        detail = f"{' and '.join(f'{name} {version}' for name, version in opencv.items())} overwrite each other's files"
        yield Check("OpenCV", ["cls", "mmseg", "d2"], NOTE, "", detail, commands.HEADLESS)
    torch, wanted = version_of("torch"), requirements("torchvision").get("torch", "")
    if torch and not satisfies(torch, wanted):
        detail = f"torchvision asks for torch{wanted}, there is {torch}"
        yield Check("torch's build", ["cls", "d2"], NOTE, "", detail, commands.torchvision_for_torch())


def as_text(checks: Sequence[Check]) -> str:
    """The report for people."""
    width = max(len(check.name) for check in checks)
    lines = [f"Python {sys.version.split()[0]}, {sys.executable}"]
    for check in checks:
        lines.append(
            f"{check.state:<8} {check.name:<{width}}  {': '.join(filter(None, (check.installed, check.detail)))}"
        )
        lines += [f"{'':8} run: {check.command}"] * bool(check.command)
    broken = {part for check in checks if check.state == PROBLEM for part in check.parts}
    tried = {part for check in checks if check.state != ABSENT for part in check.parts}
    for title, parts in ("works", tried - broken), ("does not work", broken):
        lines += [f"{title}: {', '.join(part for part in PARTS if part in parts)}"] * bool(parts)
    return "\n".join(lines)


def as_json(checks: Sequence[Check]) -> str:
    """The report for scripts."""
    report = {"ok": all(check.state != PROBLEM for check in checks), "python": sys.version.split()[0]}
    return json.dumps({**report, "checks": [check._asdict() for check in checks]}, indent=2)
