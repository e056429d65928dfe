"""What all commands share: the shipped configs, and one sentence with exit status 2 for bad input."""

import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from .errors import InputError


def command(main):
    """Turn :class:`disalign.InputError` into one sentence on stderr and exit status 2, and Ctrl-C into 130.

    With ``DISALIGN_TRACEBACK=1`` in the environment the error keeps its traceback, for those whose own code raised it.
    """

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        try:
            main(argv)
        except InputError as error:
            if os.environ.get("DISALIGN_TRACEBACK"):
                raise
            print(f"error: {sentence_of(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    return wrapped


def sentence_of(error: InputError) -> str:
    """Its own sentence: from a data loader's worker an error comes with the worker's traceback around it."""
    return str(error).strip().splitlines()[-1].removeprefix("disalign.errors.InputError: ")


def usable_cpus() -> int:
    """The number of CPUs that this process may use: fewer than the machine's in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shipped_configs() -> Path:
    """The folder of the shipped configs, in a checkout and in an installed wheel alike."""
    checkout = Path(__file__).parent.parent
    if (checkout / "setup.py").is_file():
        return checkout / "configs"
    return Path(next(iter(find_spec("disalign_configs").submodule_search_locations)))


def find_config(path: str) -> str:
    """The config file that a command's argument means: a file, or the name of a shipped one.

    Raises:
        InputError: there is neither.
    """
    if not os.path.isfile(path) and path and (shipped_configs() / path).is_file():
        path = str(shipped_configs() / path)
    if not os.path.isfile(path):
        raise InputError(f"expected a config file, or the name of a shipped one in {shipped_configs()}, got {path!r}")
    return path
