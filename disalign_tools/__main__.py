"""The console command ``disalign``: each of its commands is a module whose ``main(argv)`` returns the exit status."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

#: Imported only when called: the doctor must start where torch does not.
COMMANDS = {
    "compare": "disalign_tools.compare",
    "doctor": "disalign_tools.doctor.__main__",
    "features": "disalign_tools.features",
    "fit": "disalign_tools.fit",
    "report": "disalign_tools.report",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names, with the other arguments."""
    parser = argparse.ArgumentParser(prog="disalign")
    parser.add_argument("command", choices=COMMANDS, help="`disalign COMMAND --help` describes it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    given = parser.parse_args(argv)
    try:
        module = import_module(COMMANDS[given.command])
    except ModuleNotFoundError as error:
        print(
            f"error: expected the libraries of `disalign {given.command}`, but there is no {error.name}; install them "
            "with pip install 'disalign[cls]'",
            file=sys.stderr,
        )
        return 2
    status: int = module.main(given.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
