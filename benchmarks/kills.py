"""Kill a run repeatedly and resume it each time, checking its folder and that it continues.

    python benchmarks/kills.py --folder FOLDER [--kills 20] [--seed 0] COMMAND ... {resume} ...

COMMAND trains into FOLDER, saves often, keeps one checkpoint and never ends by itself; ``{resume}`` in it becomes the
flag of a resumed run. Half of the kills come at a random moment, half while a checkpoint is being written.
After each, every checkpoint must load, at least one must exist once there was one, and the next run must resume it.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from disalign.io.files import TEMPORARY


def checkpoints(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth") if path.exists()}


def being_written(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(f".*{TEMPORARY}")}


def wait_for_a_write(folder: Path, process) -> None:
    before, half = checkpoints(folder), being_written(folder)
    while process.poll() is None and being_written(folder) <= half and checkpoints(folder) == before:
        time.sleep(0.0005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flag", default="--resume")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    found = dict.fromkeys(("kills", "at a write", "broken", "lost", "not resumed"), 0)
    first = None
    for number in range(args.kills):
        resume = [args.flag] if checkpoints(args.folder) else []
        command = [part for word in args.command for part in (resume if word == "{resume}" else [word])]
        before = checkpoints(args.folder)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_a_write(args.folder, process)  # it has begun
        if number % 2:
            time.sleep(chance.uniform(0, 1))
        else:
            time.sleep(chance.uniform(0, 0.2))
            wait_for_a_write(args.folder, process)
            found["at a write"] += 1
        ended = process.poll() is not None
        process.kill()
        error = process.communicate()[1]
        if ended:
            found["not resumed"] += 1
            first = first or error[-500:]
        found["kills"] += 1
        for name in checkpoints(args.folder):
            try:
                torch.load(args.folder / name, weights_only=True)
            except Exception as error:
                found["broken"] += 1
                first = first or f"{name}: {error}"
        found["lost"] += bool(before) and not checkpoints(args.folder)
    print(json.dumps(found | {"left behind": len(being_written(args.folder)), "first": first}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
