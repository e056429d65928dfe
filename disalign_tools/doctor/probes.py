"""Each library is tried in another process, which it may crash, hang or end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from .commands import is_there
from .libraries import Library

NOT_INSTALLED = "not installed"
# Answers with a JSON line for each library, up to the first error; os._exit, since some libraries hang at exit.
_CHILD = """
import faulthandler, json, os, sys, traceback
sys.path[:], seconds, codes = json.loads(sys.argv.pop())
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
error, through = None, []
for code in codes:
    faulthandler.dump_traceback_later(seconds, exit=True, file=answers)
    names = {}
    try:
        exec(code, names)
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
        frames = traceback.walk_tb(exception.__traceback__)
        through = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps([names.get("value", "works"), error, through]), file=answers, flush=True)
    if error:
        break
os._exit(0)
"""


class Outcome(NamedTuple):
    """What a library did: its ``error``, and the ``cause``, another library that must be repaired first."""

    value: str = ""
    error: str = ""
    cause: str = ""


def try_all(libraries: Sequence[Library], timeout: int) -> dict[str, Outcome]:
    """The outcome of each library, by name; those whose needs don't work are not tried."""
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < len(libraries):
        broken = {name: outcome.cause or name for name, outcome in outcomes.items() if outcome.error}
        ready = []
        for library in (each for each in libraries if each.name not in outcomes):
            cause = next((broken[need] for need in library.needs.split() if need in broken), "")
            if not is_there(library):
                outcomes[library.name] = Outcome(error=NOT_INSTALLED)
                broken[library.name] = library.name
            elif cause:
                outcomes[library.name] = Outcome(error=f"not tried, since {cause} does not work", cause=cause)
                broken[library.name] = cause
            else:
                ready.append(library)
        answers = _try_until_error(ready, timeout, broken) if ready else []
        outcomes.update({library.name: answer for library, answer in zip(ready, answers, strict=False)})
    return outcomes


def _try_until_error(libraries: list[Library], timeout: int, broken: dict[str, str]) -> list[Outcome]:
    codes = [library.code or f"import {library.name}" for library in libraries]
    command = [sys.executable, "-c", _CHILD, json.dumps([sys.path, timeout, codes])]
    # A file, not a pipe, which anything that a library leaves running would keep open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL).returncode
        file.seek(0)
        lines = file.read().splitlines()
    outcomes = []
    for value, error, through in (json.loads(line) for line in lines if line.startswith("[")):
        # Without colours, on one line.
        error = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", error or "").split())
        # The broken library whose code raised, or which the message names.
        causes = [broken[name] for name in (*reversed(through), *re.findall(r"\w+", error)) if name in broken]
        outcomes.append(Outcome(value, error, causes[0] if causes else ""))
    if len(outcomes) < len(libraries) and not (outcomes and outcomes[-1].error):
        error = (
            f"crashes Python ({signal.Signals(-status).name})" if status < 0 else f"ends Python with status {status}"
        )
        if any(line.startswith("Timeout") for line in lines):
            error = f"no answer within {timeout} seconds (see --timeout)"
        outcomes.append(Outcome(error=error))
    return outcomes
