"""Check what is installed and what works, and print the commands that repair the rest."""

from __future__ import annotations

import argparse
import sys

from .libraries import PARTS
from .report import PROBLEM, as_json, as_text, examine


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit status is 0 where everything works, and 1 where something does not."""
    parser = argparse.ArgumentParser(prog="disalign doctor", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what must work: {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--timeout", type=int, default=120, metavar="SECONDS", help="for each library")
    arguments = parser.parse_args(argv)
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if arguments.timeout < 1:
        parser.error(f"expected a timeout of at least one second, got {arguments.timeout}")
    checks = examine(arguments.parts, arguments.timeout)
    print((as_json if arguments.json else as_text)(checks))
    return int(any(check.state == PROBLEM for check in checks))


if __name__ == "__main__":
    sys.exit(main())
