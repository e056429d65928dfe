"""Count training examples per class: python scripts/count_classes.py SOURCE [SOURCE ...] --out counts.json

A SOURCE is a list file of 'path label' lines, a folder with one folder per class, an LVIS or COCO JSON, or a folder of
label images (masks); several of one kind add up. The JSON is what load_class_counts and every config takes, with where
it comes from: source, date (UTC), files, SHA-256.

Files that can't be read stop the command (exit status 2), unless --skip-corrupt leaves them out. Classes without any
example are counted as 0 and named: stage two refuses them by default.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from disalign.cli import command, usable_cpus
from disalign.errors import InputError, some
from disalign.io import require_place, write_json
from disalign.io.images import IMAGE_SUFFIXES, MOST_CLASSES, image_files
from disalign.splits import frequent_common_rare, head_body_tail, many_medium_few

from .count_files import named
from .count_images import count_folders, count_lists
from .count_instances import count_json
from .count_pixels import count_masks

#: How each kind of source is counted.
KINDS: dict[str, Callable[..., dict]] = {
    "list": count_lists,
    "folder": count_folders,
    "coco": count_json,
    "masks": count_masks,
}
#: The options that only some kinds have, and their help; those without a type are flags.
OPTIONS = {
    "verify": (("folder",), None, "decode each image to its end"),
    "ignore_index": (("masks",), int, "the label that is left out; default: 255"),
    "reduce_zero_label": (
        ("masks",),
        None,
        "0 is left out and 1, 2, ... are the classes 0, 1, ..., as in MMSegmentation's option",
    ),
    "suffix": (("masks",), str, "the end of their names, MMSegmentation's seg_map_suffix; default: .png"),
    "skip_corrupt": (
        ("folder", "masks"),
        None,
        "leave out files that are missing, empty or can't be decoded, and name them in the JSON",
    ),
}
#: Folders of these names alone are no classes.
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.out is not None:
        _require_out(args.out, args.sources, args.force)
    kind = args.kind or kind_of(args.sources)
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    record = count(args.sources, kind, args.num_classes, args.workers, **options)
    if args.out is None:
        print(json.dumps(record, indent=2))
    else:
        write_json(args.out, record)
    print(f"{args.out or 'counted'}: {summary(record)}", file=sys.stderr if args.out is None else sys.stdout)
    for warning in warnings(record):
        print(f"warning: {warning}", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a file or a folder")
    parser.add_argument("--out", metavar="FILE.json", help="default: the screen")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.add_argument("--kind", choices=KINDS, help="of the sources; default: what their content looks like")
    parser.add_argument("--num-classes", type=int, metavar="K", help="list, masks: default: the largest label + 1")
    parser.add_argument("--workers", type=int, help="folder, masks: threads; default: one per CPU, 8 at most; 0: none")
    for name, (kinds, type_, text) in OPTIONS.items():
        how = {"action": "store_true", "default": None} if type_ is None else {"type": type_}
        parser.add_argument(_flag(name), **how, help=f"{', '.join(kinds)}: {text}")
    return parser


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _require_out(out, sources, force):
    if not out.endswith(".json"):
        raise InputError(f"expected the name of a .json file as --out, got {out!r}")
    require_place(out, sources, force=force)


def count(
    sources: Sequence[str], kind: str, num_classes: int | None = None, workers: int | None = None, **options: Any
) -> dict:
    """Count the classes of one or several sources of a kind.

    Args:
        sources: files or folders, as a user names them; they add up.
        kind: one of :data:`KINDS`.
        num_classes: K; default: what the sources say.
        workers: threads that read; default: one per CPU that this process may use, 8 at most. 0: none of its own.
        options: those of the kind, see :func:`.count_images.count_lists`, :func:`.count_images.count_folders`,
            :func:`.count_instances.count_json` and :func:`.count_pixels.count_masks`.

    Returns:
        A record for JSON, readable by :func:`disalign.load_class_counts`: ``dataset``, ``kind``, ``source``, ``date``
        (ISO 8601, UTC), ``unit``, ``files`` and ``images`` (those counted), ``checksum``, ``class_names`` (empty if
        they are not known), ``train_counts`` of the K classes; of instances and pixels ``image_counts`` (images that
        show the class), ``left_out`` (annotations) or ``total_pixels`` (ignored ones too); where files may be left out
        ``skipped``.

    Raises:
        InputError: see there; or a source that is given twice, or options out of range or of another kind.
    """
    for name in options:
        if kind not in OPTIONS[name][0]:
            raise InputError(
                f"expected {_flag(name)} only for --kind {' or '.join(OPTIONS[name][0])}, got {sources[0]!r} of kind "
                f"{kind}; leave it out, or name the --kind"
            )
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise InputError(f"expected 1 to {MOST_CLASSES} as --num-classes, got {num_classes}")
    if workers is not None and workers < 0:
        raise InputError(f"expected 0 or more as --workers, got {workers}")
    if len(set(map(os.path.realpath, sources))) < len(sources):
        raise InputError(f"expected each source once, or it counts twice, got {some(map(repr, sources))}")
    if kind in ("folder", "masks"):
        options["workers"] = min(8, usable_cpus()) if workers is None else workers
    return {
        "dataset": " + ".join(os.path.basename(os.path.normpath(source)) for source in sources),
        "kind": kind,
        "source": " + ".join(map(str, sources)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **KINDS[kind](sources, num_classes, **options),
    }


def kind_of(sources: Sequence[str]) -> str:
    """What sources look like: a file that begins like JSON is ``"coco"``, any other a ``"list"``; a folder of folders
    of images is a ``"folder"``, one of images alone ``"masks"``.

    Raises:
        InputError: sources of different kinds, a missing one, or a folder that may be either or is neither.
    """
    kinds = [_kind_of(source) for source in sources]
    if len(set(kinds)) > 1:
        named = some(f"{source!r} ({kind})" for source, kind in zip(sources, kinds, strict=True))
        raise InputError(f"expected sources of one kind, got {named}; count them one by one, or name the --kind")
    return kinds[0]


def _kind_of(source):
    if not os.path.isdir(source):
        try:
            with open(source, "rb") as file:
                start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        except OSError as error:
            raise InputError(
                f"expected a list file, an annotation file or a folder at {source!r}, but: {error.strerror or error}"
            ) from None
        return "coco" if start in (b"{", b"[") else "list"
    entries = [entry for entry in os.scandir(source) if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    directly = any(entry.is_file() and entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)
    within = any(image_files(folder.path) for folder in folders)
    if directly == within:
        got = "both; name the --kind" if directly else "none"
        raise InputError(
            f"expected folders of images, one per class, or images alone, as masks, in {source!r}, got {got}"
        )
    splits = sorted({folder.name.lower() for folder in folders})
    if within and SPLITS.issuperset(splits):
        raise InputError(
            f"expected one folder per class in {source!r}, got {some(splits)}, which look like splits; count the one "
            "that trains, or name the --kind"
        )
    return "folder" if within else "masks"


def summary(record: dict) -> str:
    """A record's size, its largest and smallest class, and the groups that fit its kind, on one line."""
    counts, unit = record["train_counts"], record["unit"]
    size = f"{sum(counts)} {unit}"
    if unit == "pixels":
        size += f" ({record['total_pixels'] - sum(counts)} more ignored) in {record['files']} masks"
        groups = head_body_tail(counts, total=record["total_pixels"])
    elif unit == "instances":
        size += f" ({record['left_out']} more left out) in {record['images']} images"
        groups = frequent_common_rare(record["image_counts"])
    else:
        groups = many_medium_few(counts)
    largest, smallest = (f"{number} ({name_of(counts.index(number), record)})" for number in (max(counts), min(counts)))
    sizes = ", ".join(f"{group} {int(members.sum())}" for group, members in groups.items())
    return f"{size} of {len(counts)} classes, from {largest} down to {smallest}; {sizes} classes"


def name_of(label: int, record: dict) -> str:
    return str(record["class_names"][label]) if record["class_names"] else f"class {label}"


def warnings(record: dict) -> list[str]:
    """What a user should know of a record: classes without examples, files left out."""
    found, skipped = [], record.get("skipped")
    empty = [name_of(label, record) for label, count in enumerate(record["train_counts"]) if not count]
    if empty:
        found.append(
            f"no {record['unit']} of {len(empty)} of the {len(record['train_counts'])} classes: {some(empty)}; stage "
            "two refuses them by default: leave these classes out, or add examples"
        )
    if skipped:
        found.append(f"left out {len(skipped)} files that can't be read: {named(skipped)}; all are named in the JSON")
    return found


if __name__ == "__main__":
    sys.exit(main())
