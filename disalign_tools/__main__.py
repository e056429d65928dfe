"""The console command ``disalign``: each of its commands is a module whose ``main(argv)`` returns the exit status."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

#: Name -> module, imported only when called, since the doctor must start even if torch does not; and its purpose.
COMMANDS = {
    "demo": ("disalign_cls.demo", "see DisAlign and related methods on real images, in a minute"),
    "doctor": ("disalign_tools.doctor.__main__", "is my installation sound?"),
    "count": ("disalign_tools.count_classes", "class counts of lists, folders, annotations or masks"),
    "convert": ("disalign_tools.convert", "a checkpoint of other code, as stage one"),
    "check": ("disalign_tools.check", "what is missing of a config's data?"),
    "features": ("disalign_tools.features", "features of images, by a pretrained trunk of timm"),
    "fit": ("disalign_tools.fit", "stage two by one pass and a solver"),
    "compare": ("disalign_tools.compare", "related methods on the same checkpoint, as a table"),
    "report": ("disalign_tools.report", "a comparison or an evaluation as a page with pictures"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command named by the first argument, with the other arguments."""
    width = max(map(len, COMMANDS))
    listed = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="disalign",
        epilog="\n".join(["commands:", *listed, "", "disalign COMMAND --help describes each."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    given = parser.parse_args(argv)
    try:
        module = import_module(COMMANDS[given.command][0])
    except ModuleNotFoundError as error:
        print(
            f"error: expected the libraries of `disalign {given.command}`, but there is no {error.name}; install them "
            "with pip install 'disalign[cls]'",
            file=sys.stderr,
        )
        return 2
    # For the usage line.
    sys.argv = [f"disalign {given.command}", *given.arguments]
    status: int = module.main(given.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
