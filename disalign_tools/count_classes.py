"""Count training examples per class: disalign count SOURCE [SOURCE ...] --out counts.json

A SOURCE is a list file of 'path label' lines, a folder with one folder per class, an LVIS or COCO JSON, or a folder of
label images (masks); several of one kind add up. The JSON is accepted by load_class_counts and every config, and
records its origin: source, date (UTC), files, SHA-256.

Files that can't be read stop the command (exit status 2), unless --skip-corrupt leaves them out. Classes without any
example are counted as 0 and named: stage two refuses them by default.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from inspect import signature
from typing import Any

from disalign.cli import command
from disalign.errors import InputError, some
from disalign.io import require_place, write_json
from disalign.io.files import refuse_special
from disalign.io.images import IMAGE_SUFFIXES, MOST_CLASSES, image_files
from disalign.splits import frequent_common_rare, head_body_tail, many_medium_few

from .count_annotations import count_json, count_lists
from .count_files import count_folders, count_masks, named

#: Kind of source -> the function that counts it; its parameters after the sources are the options that it takes.
KINDS: dict[str, Callable[..., dict]] = {
    "list": count_lists,
    "folder": count_folders,
    "coco": count_json,
    "masks": count_masks,
}
#: Folders with only these names are not classes.
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = vars(_parser().parse_args(argv))
    sources, kind, out, force = map(options.pop, ("sources", "kind", "out", "force"))
    if out is not None:
        if not out.endswith(".json"):
            raise InputError(f"expected the name of a .json file as --out, got {out!r}")
        require_place(out, sources, force=force)
    record = count(sources, kind or kind_of(sources), **options)
    if out is None:
        print(json.dumps(record, indent=2))
    else:
        write_json(out, record)
    print(f"{out or 'counted'}: {summary(record)}", file=sys.stderr if out is None else sys.stdout)
    for warning in warnings(record):
        print(f"warning: {warning}", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a file or a folder")
    parser.add_argument("--out", metavar="FILE.json", help="default: the screen")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.add_argument("--kind", choices=KINDS, help="of the sources; default: inferred from their content")
    parser.add_argument("--num-classes", type=int, metavar="K", help="list, masks: default: the largest label + 1")
    parser.add_argument("--workers", type=int, help="folder, masks: threads; default: one per CPU, 8 at most")
    special = parser.add_argument_group("options of certain kinds", argument_default=argparse.SUPPRESS)
    special.add_argument("--verify", action="store_true", help="folder: decode each image completely")
    special.add_argument("--ignore-index", type=int, help="masks: the label that is left out; default: 255")
    special.add_argument("--reduce-zero-label", action="store_true", help="masks: leave out 0, shift the others by -1")
    special.add_argument("--suffix", help="masks: suffix of their names (seg_map_suffix); default: .png")
    special.add_argument("--skip-corrupt", action="store_true", help="folder, masks: leave out broken files")
    return parser


def count(
    sources: Sequence[str], kind: str, num_classes: int | None = None, workers: int | None = None, **options: Any
) -> dict:
    """Count the classes of sources of one kind, which add up; returns the record that docs/datasets.md describes."""
    for name in options:
        kinds = [one for one, counter in KINDS.items() if name in signature(counter).parameters]
        if kind not in kinds:
            raise InputError(
                f"expected --{name.replace('_', '-')} only for --kind {' or '.join(kinds)}, got {sources[0]!r} of kind "
                f"{kind}; leave it out, or name the --kind"
            )
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise InputError(f"expected 1 to {MOST_CLASSES} as --num-classes, got {num_classes}")
    if workers is not None and workers < 0:
        raise InputError(f"expected 0 or more as --workers, got {workers}")
    if len(set(map(os.path.realpath, sources))) < len(sources):
        raise InputError(f"expected each source once, or it counts twice, got {some(map(repr, sources))}")
    if "workers" in signature(KINDS[kind]).parameters:
        options["workers"] = workers
    return {
        "dataset": " + ".join(os.path.basename(os.path.normpath(source)) for source in sources),
        "kind": kind,
        "source": " + ".join(map(str, sources)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **KINDS[kind](sources, num_classes, **options),
    }


def kind_of(sources: Sequence[str]) -> str:
    """The kind of the sources: a file that begins like JSON is ``"coco"``, any other a ``"list"``; a folder of folders
    of images is a ``"folder"``, one of images alone ``"masks"``.
    """
    kinds = [_kind_of(source) for source in sources]
    if len(set(kinds)) > 1:
        got = some(f"{source!r} ({kind})" for source, kind in zip(sources, kinds, strict=True))
        raise InputError(f"expected sources of one kind, got {got}; count them one by one, or name the --kind")
    return kinds[0]


def _kind_of(source):
    if not os.path.isdir(source):
        refuse_special(source, "a list or JSON")
        try:
            with open(source, "rb") as file:
                start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        except OSError as error:
            raise InputError(f"expected a list, a JSON file or a folder at {source!r}, but: {error.strerror}") from None
        return "coco" if start.startswith((b"{", b"[")) else "list"
    entries = [entry for entry in os.scandir(source) if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    directly = any(entry.is_file() and entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)
    within = any(image_files(folder.path) for folder in folders)
    if directly == within:
        got = "both; name the --kind" if directly else "none"
        raise InputError(f"expected folders of images, one per class, or masks alone in {source!r}, got {got}")
    splits = sorted({folder.name.lower() for folder in folders})
    if within and SPLITS.issuperset(splits):
        raise InputError(
            f"expected one folder per class in {source!r}, got {some(splits)}, which look like splits; count the one "
            "that trains, or name the --kind"
        )
    return "folder" if within else "masks"


def summary(record: dict) -> str:
    """One line with a record's size, its largest and smallest class, and the groups for its kind."""
    counts, unit, names = record["train_counts"], record["unit"], _names(record)
    size = f"{sum(counts)} {unit}"
    if unit == "pixels":
        size += f" ({record['total_pixels'] - sum(counts)} more ignored) in {record['files']} masks"
        groups = head_body_tail(counts, total=record["total_pixels"])
    elif unit == "instances":
        reasons = ", ".join(f"{number} as {reason}" for reason, number in record["left_out_as"].items() if number)
        size += f" ({record['left_out']} more left out{reasons and f': {reasons}'}) in {record['images']} images"
        groups = frequent_common_rare(record["image_counts"])
    else:
        groups = many_medium_few(counts)
    largest, smallest = (f"{number} ({names[counts.index(number)]})" for number in (max(counts), min(counts)))
    sizes = ", ".join(f"{group} {int(members.sum())}" for group, members in groups.items())
    return f"{size} of {len(counts)} classes, from {largest} down to {smallest}; {sizes} classes"


def warnings(record: dict) -> list[str]:
    """Warnings about a record: classes without examples, files left out."""
    found, counts, skipped = [], record["train_counts"], record.get("skipped")
    empty = [name for name, number in zip(_names(record), counts, strict=True) if not number]
    if empty:
        found.append(
            f"no {record['unit']} of {len(empty)} of the {len(counts)} classes: {some(empty)}; stage two refuses them "
            "by default: leave these classes out, or add examples"
        )
    crowds = record.get("left_out_as", {}).get("crowds or ignored", 0)
    if crowds > sum(counts):
        found.append(
            f"{crowds} of {crowds + sum(counts)} annotations are crowds or ignored and do not train; if they are "
            "objects (CVAT marks RLE masks as crowds), set their iscrowd to 0"
        )
    if record["unit"] == "pixels" and sum(map(bool, counts)) == 1 and record["total_pixels"] > sum(counts):
        ignored = record["ignore_index"]
        found.append(
            f"pixels of one class alone, and {record['total_pixels'] - sum(counts)} ignored ones; if {ignored} is the "
            f"foreground, save it as 1, since {ignored} is ignored"
        )
    if skipped:
        found.append(f"left out {len(skipped)} files that can't be read: {named(skipped)}; all are named in the JSON")
    return found


def _names(record):
    return record["class_names"] or [f"class {label}" for label in range(len(record["train_counts"]))]


if __name__ == "__main__":
    sys.exit(main())
