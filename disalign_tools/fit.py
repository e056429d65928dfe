"""Stage two by one pass and a solver, for any framework: disalign fit CONFIG --stage-one FILE [--rho ...]

CONFIG is the config of a stage two, for classification, Detectron2 or MMSegmentation; `disalign fit CONFIG --help` has
the options of its framework, which are those of python -m disalign_cls.fit, disalign_d2.fit and disalign_mmseg.fit.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from disalign import InputError
from disalign.cli import command, find_config
from disalign.errors import first_line


def main(argv: Sequence[str] | None = None) -> int:
    return dispatch("fit", __doc__, argv)


def dispatch(name: str, doc: str | None, argv: Sequence[str] | None) -> int:
    """Run the command ``name`` of the framework whose config is the first argument."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(doc)
        return 0
    found: list[Any] = []
    status = command(lambda: found.append(host_of(argv[0], name)))()
    return status or int(found[0].main(argv))


def host_of(path: str, name: str = "fit") -> Any:
    """The module with the command ``name`` for a config.

    Raises:
        InputError: no config file, one that can't be read, or its framework is missing.
    """
    if path.startswith("-"):
        raise InputError(f"expected a config as the first argument, got {path!r}; options go after it")
    path = find_config(path)
    try:
        if path.endswith((".yaml", ".yml")):
            return import_module(f"disalign_d2.{name}")
        scope = import_module("disalign_mmengine.cli").load_config(path, {}).get("default_scope")
        return import_module(f"{'disalign_mmseg' if scope == 'mmseg' else 'disalign_cls'}.{name}")
    except ImportError as error:
        raise InputError(f"expected the framework of {path!r}, but: {first_line(error)}; install it first") from None


if __name__ == "__main__":
    sys.exit(main())
