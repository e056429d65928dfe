"""What all commands share: the shipped configs, and one sentence with exit status 2 for bad input."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import ParamSpec

from .errors import InputError, input_errors

P = ParamSpec("P")


def command(main: Callable[P, object]) -> Callable[P, int]:
    """Turn :class:`disalign.InputError` into one sentence on stderr and exit status 2, and Ctrl-C into 130."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            main(*args, **kwargs)
        except InputError as error:
            print(f"error: {sentence_of(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    return wrapped


def log_to_stderr() -> None:
    """Let a command show what the core logs: sizes, folds, classes left out."""
    log = logging.getLogger("disalign")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)


#: What a config that does not fit raises while a framework builds from it.
BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)


@contextmanager
def config_errors(where: str, errors: tuple[type[Exception], ...] = BUILD_ERRORS) -> Iterator[None]:
    """What a config (``where``) may be at fault for becomes one sentence, see :func:`disalign.errors.input_errors`."""
    with input_errors(f"expected a config that can be built in {where!r}", "correct it", errors):
        yield


def sentence_of(error: Exception) -> str:
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
    return Path(next(iter(import_module("disalign_configs").__path__)))


def find_config(path: str) -> str:
    """The config file that a command's argument means: a file, or the name of a shipped one."""
    if not os.path.isfile(path) and path and (shipped_configs() / path).is_file():
        path = str(shipped_configs() / path)
    if not os.path.isfile(path):
        raise InputError(f"expected a config file, or the name of a shipped one in {shipped_configs()}, got {path!r}")
    return path
