"""Check what is installed and what works, and print the commands that repair the rest."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from subprocess import DEVNULL, TimeoutExpired, call
from typing import NamedTuple

from .commands import install, repair, version_of
from .libraries import LIBRARIES, PARTS, Library

TIMEOUT = 120  # seconds
# Each library has a process of its own, which it may crash, hang or end. os._exit, since some hang at exit.
CHILD = """
import json, os, sys
names = {"value": "works"}
try:
    exec(sys.argv.pop(), names)
    outcome = "ok", names["value"]
except UserWarning as note:
    outcome = "note", str(note)
except Exception as error:
    outcome = "problem", f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(outcome), flush=True)
os._exit(0)
"""


class Check(NamedTuple):
    """A library, or a part that is absent; ``command`` repairs it in a shell."""

    name: str
    parts: list[str]
    state: str  # ok, note, problem or absent
    installed: str
    detail: str
    command: str | None


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit status is 0 if everything works, otherwise 1."""
    parser = argparse.ArgumentParser(prog="disalign doctor", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what must work: {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    checks = examine(arguments.parts)
    python = sys.version.split()[0]
    broken = {part for check in checks if check.state == "problem" for part in check.parts}
    works = {part for check in checks if check.state != "absent" for part in check.parts} - broken
    if arguments.json:
        report = {"ok": not broken, "python": python, "checks": [check._asdict() for check in checks]}
        print(json.dumps(report, indent=2))
        return int(bool(broken))
    print(f"Python {python}, {sys.executable}")
    width = max(len(check.name) for check in checks)
    for name, _, state, installed, detail, command in checks:
        print(f"{state:<8} {name:<{width}}  {': '.join(filter(None, (installed, detail)))}")
        if command:
            print(f"{'':8} run: {command}")
    for title, parts in {"works": works, "does not work": broken}.items():
        if parts:
            print(f"{title}: {', '.join(part for part in PARTS if part in parts)}")
    return int(bool(broken))


def examine(asked: list[str]) -> list[Check]:
    """Check the core and the requested parts, by default the installed ones."""
    there = {library.name for library in LIBRARIES if any(map(version_of, library.distributions.split()))}
    absent = {part: lacking for part, frameworks in PARTS.items() if (lacking := {*frameworks.split()} - there)}
    parts = {"core", *(asked or PARTS.keys() - absent)}
    tried = [library for library in LIBRARIES if parts & {*library.parts.split()}]
    checks: list[Check] = []
    with ThreadPoolExecutor() as pool:
        for library, outcome in zip(tried, pool.map(_try, tried), strict=True):
            broken = [check.name for check in checks if check.state == "problem"]
            check = _judge(library, *outcome, [name for name in broken if name in library.needs.split()])
            checks.append(check._replace(parts=[part for part in check.parts if part in parts]))
    for part, lacking in absent.items() if not asked else ():
        detail = f"not installed: {', '.join(sorted(lacking))} (`disalign doctor {part}` tells how)"
        checks.append(Check(part, [part], "absent", "", detail, None))
    return checks


def _judge(library: Library, state: str, detail: str, causes: list[str]) -> Check:
    """The report's line on a library that was tried; ``causes`` are its dependencies that have a problem."""
    versions = {name: version for name in library.distributions.split() if (version := version_of(name))}
    preferred, name = library.distributions.partition(" ")[0], next(iter(versions), "")
    command = None
    if preferred and not versions:
        state, detail, command = "problem", "not installed", install(preferred)
    elif len({*versions.values()}) > 1 and (state == "ok" or preferred.startswith("onedl-")):
        state = "problem" if preferred.startswith("onedl-") else "note"
        detail, command = "overwrite each other's files", install(preferred, *versions)
    elif state == "problem" and causes:
        detail = f"needs {causes[0]}, which has a problem"
    elif state != "ok":
        command = repair(library.name, name, detail)
    installed = ", ".join(map(" ".join, versions.items()))
    return Check(library.name, library.parts.split(), state, installed, detail, command)


def _try(library: Library) -> tuple[str, str]:
    """State and detail of a library, tried in a process of its own."""
    command = [sys.executable, "-c", CHILD, library.code or f"import {library.name}"]
    # A file, not a pipe, which a process that a library leaves running would keep open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            status = call(command, stdin=DEVNULL, stdout=file, stderr=DEVNULL, timeout=TIMEOUT)
        except TimeoutExpired:
            return "problem", f"no answer within {TIMEOUT} seconds"
        file.seek(0)
        last = (file.read().splitlines() or [""])[-1]
    if last.startswith("["):
        state, detail = json.loads(last)
        return state, " ".join(detail.split())[:300]
    return "problem", f"crashes Python ({signal.Signals(-status).name})" if status < 0 else f"ends Python with {status}"


if __name__ == "__main__":
    sys.exit(main())
