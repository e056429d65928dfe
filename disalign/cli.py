"""What all commands share: the shipped configs, and one sentence with exit status 2 for bad input."""

import argparse
import functools
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec

import torch

from .comparison import table
from .errors import InputError, input_errors, some
from .fitting import PENALTIES
from .functional import generalized_reweight
from .io import require_place, write_json

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


def as_typed(run: Callable[..., object], argv: Sequence[str] | None) -> str:
    """The line ``python -m MODULE ...`` for a shell: ``run``'s module, and ``argv``, by default this process's."""
    spec = sys.modules[run.__module__].__spec__  # has the name of a module that is run as __main__, too
    module = run.__module__ if spec is None else spec.name
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def log_to_stderr() -> None:
    """Let a command show what the core logs: sizes, folds, classes left out."""
    log = logging.getLogger("disalign")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)


@contextmanager
def warnings_to_stderr() -> Iterator[None]:
    """Within it a warning is one line on stderr, without the place in the code that it comes from."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)


def fit_arguments(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """The options of all commands that learn a calibration by :func:`disalign.fit`; ``dtype`` is a default."""
    parser.add_argument("--stage-one", help="stage one's checkpoint; default: the config's")
    parser.add_argument(
        "--rho", type=float, nargs="+", help="scales of eq. 11, a checkpoint each; default: the config's"
    )
    _features_arguments(parser, dtype)
    parser.add_argument(
        "--anchor", choices=tuple(PENALTIES), default="zero", help="of the margin; logit_adjust needs confidence 'one'"
    )
    parser.add_argument("--penalty", type=float, help="lambda; default: 0.01, with --anchor logit_adjust 0.1")
    parser.add_argument("--force", action="store_true", help="replace checkpoints of an earlier fit")


def _features_arguments(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--features", help="folder to keep features in, and to take them from the next time")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default=dtype, help="of features that are kept (%(default)s)"
    )


def compare_arguments(parser: argparse.ArgumentParser, dtype: str, sweep: Sequence[float] = ()) -> None:
    """The options of all commands that compare methods; ``dtype`` and ``sweep`` are defaults."""
    parser.add_argument("--stage-one", nargs="+", help="checkpoints, those of several seeds; default: the config's")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="or all; default: those that take seconds")
    parser.add_argument("--rho", type=float, help="scale of eq. 11 of all methods that learn; default: the config's")
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=sweep, metavar="RHO", help="DisAlign at these rho too, for a curve"
    )
    _features_arguments(parser, dtype)
    parser.add_argument("--seed", type=int, default=0, help="of folds and samples (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an earlier comparison")


def compare_place(folder: Path, rhos: Iterable[float], stage_ones: Sequence[str], force: bool) -> Path:
    """Where a comparison goes; what can't be done is refused before the passes.

    Raises:
        InputError: no stage one, one given twice, a rho that is none, or a place that is taken (see ``--force``) or
            can't be written.
    """
    _require_rhos(rhos)
    if not stage_ones or not all(stage_ones):
        raise InputError("expected stage-one checkpoints, got none; give them: --stage-one FILE [FILE ...]")
    if len({os.path.realpath(path) for path in stage_ones}) < len(stage_ones):
        raise InputError(f"expected every stage one once, got {some(stage_ones)}")
    place = folder / "comparison.json"
    require_place(place, stage_ones, "the comparison", force)
    return place


def write_comparison(place: Path, content: Mapping[str, Any]) -> None:
    """Write a comparison to its :func:`compare_place`, and print its table."""
    write_json(place, content)
    print(f"\n{table(content)}\n\nwritten to {place}; for pictures: disalign report {place.parent}")


def features_of(folder: str | None, number: int, many: bool) -> Path | None:
    """Where the features of one of several stage ones are kept."""
    return Path(folder, f"stage_one_{number}") if folder and many else Path(folder) if folder else None


def fit_places(folder: Path, rhos: Sequence[float], stage_one: str, force: bool) -> dict[float, Path]:
    """Where the checkpoint of each rho goes; what can't be done is refused before the pass.

    Raises:
        InputError: no stage one, an invalid rho, or an output that exists (see ``--force``) or is not writable.
    """
    if not stage_one:
        raise InputError("expected the stage-one checkpoint, got none; give it: --stage-one FILE")
    places = {rho: folder / f"fit_rho-{rho:g}.pth" for rho in rhos}
    if len(set(places.values())) < len(places):
        raise InputError(f"expected rho that differ in their first six digits, got {some(rhos)}; leave some out")
    _require_rhos(rhos)
    for path in places.values():
        require_place(path, [stage_one], "the checkpoint", force)
        require_place(results_of(path), [stage_one], "the results", force)
    return places


def _require_rhos(rhos: Iterable[float]) -> None:
    for rho in rhos:
        generalized_reweight(torch.ones(1), rho)


def results_of(checkpoint: Path) -> Path:
    """Where the results of a checkpoint of :func:`fit_places` go."""
    return checkpoint.with_name(f"results_{checkpoint.stem}.json")


#: What a config that does not fit raises while a framework builds from it.
BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)


@contextmanager
def config_errors(where: str, errors: tuple[type[Exception], ...] = BUILD_ERRORS) -> Iterator[None]:
    """Turn errors of a config (``where``) into one sentence, see :func:`disalign.errors.input_errors`."""
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
    """The config file named by a command's argument: a path, or the name of a shipped config."""
    if not os.path.isfile(path) and path and (shipped_configs() / path).is_file():
        path = str(shipped_configs() / path)
    if not os.path.isfile(path):
        raise InputError(f"expected a config file, or the name of a shipped one in {shipped_configs()}, got {path!r}")
    return path
