"""Check what is installed and what works, and print the commands that repair the rest."""

from __future__ import annotations

import argparse
import json
import sys

from .checks import Check, examine
from .libraries import PARTS


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit status is 0 where everything works, and 1 where something does not."""
    parser = argparse.ArgumentParser(prog="disalign doctor", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what must work: {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    checks = examine(arguments.parts)
    broken = {part for check in checks if check.state == "problem" for part in check.parts}
    if arguments.json:
        report = {"ok": not broken, "python": sys.version.split()[0], "checks": [check._asdict() for check in checks]}
        print(json.dumps(report, indent=2))
    else:
        print(as_text(checks, broken))
    return int(bool(broken))


def as_text(checks: list[Check], broken: set[str]) -> str:
    width = max(len(check.name) for check in checks)
    lines = [f"Python {sys.version.split()[0]}, {sys.executable}"]
    for check in checks:
        found = ": ".join(filter(None, (check.installed, check.detail)))
        lines.append(f"{check.state:<8} {check.name:<{width}}  {found}")
        if check.command:
            lines.append(f"{'':8} run: {check.command}")
    tried = {part for check in checks if check.state != "absent" for part in check.parts}
    for title, parts in (("works", tried - broken), ("does not work", broken)):
        if parts:
            lines.append(f"{title}: {', '.join(part for part in PARTS if part in parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
