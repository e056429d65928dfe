"""Libraries tried in processes of their own: whatever they do there, this process learns of it and goes on."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from .libraries import NOT_CHECKED, NOT_INSTALLED, NOT_TRIED, is_there

# Says on its original stdout what came of each piece; all other output is noise. os._exit: what a library does on
# leaving is not asked.
_CHILD = """
import json, os, sys

pieces = json.loads(sys.argv.pop())
answers = os.fdopen(os.dup(1), "w")
nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(nowhere, 1)
os.dup2(nowhere, 2)
for piece in pieces:
    names = {}
    try:
        exec(piece, names)
        answer = {"value": names.get("value")}
    except SystemExit as error:
        answer = {"error": f"it ends Python, with exit status {error.code or 0}"}
    except BaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answer = {"error": ": ".join([type(error).__name__, *lines[:1]])}
    print(json.dumps(answer, default=str), file=answers, flush=True)
os._exit(0)
"""


class Outcome(NamedTuple):
    """What came of a piece of code: the ``value`` that it set, or the ``error`` in one line."""

    value: Any = None
    error: str = ""


def try_all(libraries, timeout: float) -> dict:
    """What came of each library, by name: those that work share a process, and what needs a broken one is not tried."""
    outcomes, waiting = {}, []
    for library in libraries:
        if is_there(library):
            waiting.append(library)
        else:
            outcomes[library.name] = Outcome(error=NOT_INSTALLED)
    while waiting:
        ready = []
        for library in waiting:
            broken = [name for name in library.needs if name in outcomes and outcomes[name].error]
            if broken:
                outcomes[library.name] = Outcome(error=f"{NOT_TRIED}, since {broken[0]} does not work")
            else:
                ready.append(library)
        try:
            tried = try_pieces([_piece(library) for library in ready], timeout) if ready else []
        except Exception as error:
            tried = [Outcome(error=f"{NOT_CHECKED}: {error}")] * len(ready)
        outcomes.update((ready[i].name, outcome) for i, outcome in enumerate(tried))
        waiting = ready[len(tried) :]
    return outcomes


def _piece(library) -> str:
    return f"""
import importlib
module = importlib.import_module({library.module or library.name!r})
if getattr(module, "__file__", None) is None:
    raise ImportError("a folder without code stands in its place: " + str(list(module.__path__)[0]))
value = getattr(module, "__version__", "")
{library.works}
"""


def try_pieces(pieces, timeout: float) -> list:
    """The outcomes of pieces of Python, run one after the other in one new process, to the first that fails.

    Args:
        pieces: Python source; each may set ``value`` to what JSON can hold.
        timeout: seconds that one piece may take.

    Returns:
        One :class:`Outcome` for each piece, up to the first with an error: an exception, an exit, a crash, or no answer
        in time.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(list(pieces))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Read by a thread: reading a pipe cannot be given a time limit everywhere.
    answers: queue.Queue = queue.Queue()
    threading.Thread(target=_forward, args=(process.stdout, answers), daemon=True).start()
    outcomes = []
    try:
        for _ in pieces:
            answer = answers.get(timeout=timeout)
            outcomes.append(Outcome(**json.loads(answer)) if answer else Outcome(error=_ending(process)))
            if outcomes[-1].error:
                break  # what follows is tried in a process that has not seen it fail
    except queue.Empty:
        outcomes.append(Outcome(error=f"no answer within {timeout:g} seconds: give --timeout more seconds"))
    finally:
        _end(process)
    return outcomes


def _forward(stream, answers) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


def _ending(process) -> str:
    try:
        status = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return "it closes its output"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"it crashes Python ({signal.Signals(-status).name})"
    return f"it ends Python, with exit status {status}"


def _end(process) -> None:
    """The process and what it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
