"""Tries the libraries, each in a process of its own, which it may crash, hang or end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from . import installed
from .installed import install, requirements, satisfies, version_of
from .libraries import LIBRARIES, OPENCV, PARTS, Library

TIMEOUT = 120  # seconds
NOT_INSTALLED, NOT_TRIED, NOTICE = "not installed", "not tried, since", "UserWarning: "
# os._exit, since some libraries hang at exit.
CHILD = """
import json, os, sys
sys.path[:], code = json.loads(sys.argv.pop())
names, error = {}, ""
try:
    exec(code, names)
except Exception as exception:
    error = f"{type(exception).__name__}: {exception}"
print("\\n" + json.dumps([names.get("value", "works"), error]), flush=True)
os._exit(0)
"""


class Check(NamedTuple):
    """A library, a conflict, or a part that is absent; ``command`` repairs it in a shell."""

    name: str
    parts: list[str]
    state: str  # ok, note, problem or absent
    installed: str
    detail: str
    command: str | None


def examine(asked: Sequence[str] = ()) -> list[Check]:
    """Check the core and the parts that are asked for, or else those that are installed."""
    missing = {library.name: library for library in LIBRARIES if not installed.is_there(library)}
    absent = [part for part, frameworks in PARTS.items() if missing.keys() & frameworks.split()]
    parts = [part for part in PARTS if part == "core" or (part in asked if asked else part not in absent)]
    tried = [library for library in LIBRARIES if {*library.parts.split()} & {*parts}]
    checks = [*map(_of_library, tried, _outcomes(tried)), *_conflicts()]
    checks = [check._replace(parts=[part for part in parts if part in check.parts]) for check in checks]
    for part in [] if asked else absent:
        lacking = [library for library in missing.values() if part in library.parts.split()]
        command = install(*(library.distributions.split()[0] for library in lacking))
        detail = f"{NOT_INSTALLED}: {', '.join(library.name for library in lacking)}"
        checks.append(Check(part, [part], "absent", "", detail, command))
    return [check for check in checks if check.parts]


def _outcomes(libraries: list[Library]) -> list[tuple[str, str]]:
    """Value and error of each library; those that need a broken one are not to blame."""
    with ThreadPoolExecutor() as pool:
        found = dict(zip((library.name for library in libraries), pool.map(_try, libraries), strict=True))
    for name, _, _, needs, _ in libraries:
        errors = {need: found[need][1] for need in needs.split() if need in found}
        broken = [need for need, error in errors.items() if error and not error.startswith(NOTICE)]
        if broken and found[name][1] != NOT_INSTALLED:
            cause = errors[broken[0]]
            found[name] = "", cause if cause.startswith(NOT_TRIED) else f"{NOT_TRIED} {broken[0]} does not work"
    return [*found.values()]


def _try(library: Library) -> tuple[str, str]:
    if not installed.is_there(library):
        return "", NOT_INSTALLED
    command = [sys.executable, "-c", CHILD, json.dumps([sys.path, library.code or f"import {library.name}"])]
    # A file, not a pipe, which anything that a library leaves running would keep open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL, timeout=TIMEOUT
            ).returncode
        except subprocess.TimeoutExpired:
            return "", f"no answer within {TIMEOUT} seconds"
        file.seek(0)
        last = (file.read().splitlines() or [""])[-1]
    if not last.startswith("["):
        return "", f"crashes Python ({signal.Signals(-status).name})" if status < 0 else f"ends Python with {status}"
    value, error = json.loads(last)
    return value, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", error).split())  # without colours, on one line


def _of_library(library: Library, outcome: tuple[str, str]) -> Check:
    value, error = outcome
    name = installed.distribution_of(library)
    version, wanted = version_of(name), requirements().get(name, "")
    state, detail, command = "ok", value, None
    if error:
        state = "note" if error.startswith(NOTICE) else "problem"
        detail = error.removeprefix(NOTICE)[:300]
    if error == NOT_INSTALLED:
        command = install(library.distributions.split()[0])
    elif version and not satisfies(version, wanted):
        state, detail, command = "problem", f"expected {wanted}; {detail}", install(name)
    elif error and not error.startswith(NOT_TRIED):
        command = installed.repair(library, error)
    return Check(library.name, library.parts.split(), state, f"{name} {version}".strip(), detail, command)


def _conflicts() -> Iterator[Check]:
    """What the metadata tells, whatever can be imported."""
    both = {ours: theirs for theirs, ours in installed.OPENMMLAB.items() if version_of(ours) and version_of(theirs)}
    if both:
        detail = f"{', '.join(map(' and '.join, both.items()))} are both installed and overwrite each other's files"
        yield Check("OpenMMLab", ["cls", "mmseg"], "problem", "", detail, install(*both))
    opencv = {name: version_of(name) for name in OPENCV.split() if version_of(name)}
    if len({*opencv.values()}) > 1:
        detail = f"{' and '.join(map(' '.join, opencv.items()))} overwrite each other's files"
        yield Check("OpenCV", ["cls", "mmseg", "d2"], "note", "", detail, installed.HEADLESS)
    if version_of("mmengine") and not both and satisfies(version_of("torch"), ">=2.6"):
        detail = "upstream MMEngine does not load its own checkpoints with torch 2.6 and later; our commands do"
        yield Check("checkpoints", ["cls", "mmseg"], "note", "", detail, install("onedl-mmengine"))
