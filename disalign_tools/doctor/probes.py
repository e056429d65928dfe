"""Each library is tried in a process of its own, which it may crash, hang or end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .commands import is_there
from .libraries import Library

NOT_INSTALLED = "not installed"
# os._exit, since some libraries hang at exit.
_CHILD = """
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


def try_all(libraries: Sequence[Library], timeout: int) -> dict[str, tuple[str, str]]:
    """Value and error of each library, by name; those whose needs don't work are not tried."""
    outcomes: dict[str, tuple[str, str]] = {}
    waiting = list(libraries)
    with ThreadPoolExecutor() as pool:
        while waiting:
            names = {library.name for library in waiting}
            ready = [library for library in waiting if not names & {*library.needs.split()}]
            found = pool.map(lambda library: _try(library, outcomes, timeout), ready)
            outcomes.update(dict(zip([library.name for library in ready], list(found), strict=True)))
            waiting = [library for library in waiting if library not in ready]
    return outcomes


def _try(library: Library, outcomes: dict[str, tuple[str, str]], timeout: int) -> tuple[str, str]:
    if not is_there(library):
        return "", NOT_INSTALLED
    for need in library.needs.split():
        error = outcomes.get(need, ("", ""))[1]
        if error and not error.startswith("UserWarning: "):
            return "", error if error.startswith("not tried") else f"not tried, since {need} does not work"
    command = [sys.executable, "-c", _CHILD, json.dumps([sys.path, library.code or f"import {library.name}"])]
    # A file, not a pipe, which anything that a library leaves running would keep open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            status = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            return "", f"no answer within {timeout} seconds (see --timeout)"
        file.seek(0)
        last = (file.read().splitlines() or [""])[-1]
    if not last.startswith("["):
        crash = f"crashes Python ({signal.Signals(-status).name})" if status < 0 else ""
        return "", crash or f"ends Python with status {status}"
    value, error = json.loads(last)
    return value, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", error).split())  # without colours, on one line
