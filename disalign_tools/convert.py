"""Convert a checkpoint: python -m disalign_tools.convert SOURCE DEST --to {cls,d2,mmseg,timm}

Takes the checkpoints of cvpods (the official DisAlign's among them), classifier-balancing, torchvision, timm,
mmpretrain, Detectron2, MMSegmentation and of this repository; docs/converting.md has the table. The source stays as it
is. Before the result gets its name it is read back, and its scores are compared with the source's own formula.
"""

import argparse
import math
import os
import re
import sys
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from disalign.checkpoints import atomic_file
from disalign.files import require_place
from torch import Tensor

from disalign import InputError
from disalign.cli import command
from disalign.errors import some

from . import formats, targets
from .checkpoint_files import COUNTERS, open_checkpoint
from .classifiers import fold, require_shapes
from .content import IMAGES
from .fit import check_fit, timm_classifier
from .formats import FORMATS

#: Tensors that no target has a use for; the official ImageNet-LT's loss keeps its class weights beside the network.
USELESS = (
    *("pixel_mean", "pixel_std", "*anchor_generator*", "*cell_anchors*", "data_preprocessor.*"),
    *("loss_evaluator.weight", *COUNTERS),
)
#: Of image classifiers: tables that timm now computes.
COMPUTED = ("*.relative_position_index", "*.attn_mask")
#: Largest difference of scores, relative to the largest score.
TOLERANCE = 1e-6


class Row(NamedTuple):
    """A line of the table: what became of a tensor of the source, or where one of the result comes from."""

    status: str
    source: str
    name: str
    change: str = ""
    alone: bool = False  # a line of its own, whatever its module


@command
def main(argv=None):
    args = _arguments(argv)
    _check_arguments(args)
    checkpoint = open_checkpoint(args.source, args.ema, args.trust_checkpoint)
    tensors, dropped = _without(checkpoint.tensors, args.drop)
    content = formats.detect(tensors, args.source_format, args.source, args.classifier).parse(
        tensors, args.scale, args.classifier
    )
    for layer in content.classifiers:
        require_shapes(layer)
    if args.scale is not None and not any(layer.cosine for layer in content.classifiers):
        raise InputError("expected a cosine classifier for --scale, got a linear one; leave out --scale")
    if content.task == IMAGES:
        tensors, computed = _split(tensors, COMPUTED)
        content.others = {name: source for name, source in content.others.items() if source in tensors}
        dropped += computed
    targets.require_fit(content, args.to)
    _require_use(content, args)
    result, rows = arrange(content, tensors, args)
    _require_finite(result, args.source)
    if args.config and any(layer.in_sequence for layer in content.classifiers):
        raise InputError(
            "expected no --config with a folded cosine classifier, whose place no config has; leave it out"
        )
    if not content.trunk_known and not args.config:
        raise InputError(
            f"expected --config for {content.heading}, whose trunk is no whole plain ResNet "
            f"({some(content.others, 2)}), since only building the model tells whether these are its names; give a "
            "timm model's name for --to timm, else a config"
        )
    fit = check_fit(args.to, args.config, result) if args.config else None
    difference = write(result, checkpoint.meta, content, tensors, rows, args)

    print(f"{args.source}: {content.heading}")
    rows += [Row("dropped", name, "") for name in dropped]
    print(table(rows, args.verbose))
    if checkpoint.left_out:
        print(f"left out: {', '.join(checkpoint.left_out)}")
    if checkpoint.meta:
        print(f"kept beside the weights: {', '.join(checkpoint.meta)}")
    for note in checkpoint.notes + content.notes:
        print(f"note: {note}")
    if fit:
        print(fit)
    print(f"{args.dest}: {len(result)} tensors for --to {args.to}; read back, {difference}")
    for layer in content.classifiers:
        if layer.in_sequence:
            print(f"before loading it: {layer.stock_line}")


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the checkpoint: .pth and the like, .pkl of Detectron2's zoo, .safetensors")
    parser.add_argument("dest", help="the file to write; with d2, .pkl is Detectron2's pickle of numpy arrays")
    parser.add_argument("--to", required=True, choices=targets.TARGETS, help="the package that is to load it")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="default: what its tensors' names say")
    parser.add_argument("--config", help="also check that it fits: a config of the package, or a timm model's name")
    parser.add_argument("--fold", action="store_true", help="magnitude and margin go into a stock classifier's weights")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights, or the trained ones, of a file that has both",
    )
    parser.add_argument("--scale", type=float, help="of a cosine classifier, where the file lacks it (official: 20)")
    parser.add_argument("--classifier", metavar="NAME", help="the last linear layer, where it can't be told by name")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PATTERN", help="leave out tensors of the source; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing DEST")
    parser.add_argument("--verbose", action="store_true", help="list every tensor")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="unpickle SOURCE in full, which runs code that it may hold"
    )
    return parser.parse_args(argv)


def _check_arguments(args):
    require_place(args.dest, [args.source], option="DEST")
    if os.path.lexists(args.dest) and not args.force:
        raise InputError(f"expected a new file as DEST, but {args.dest!r} exists; add --force to replace it")
    if args.dest.endswith(".safetensors"):
        raise InputError(f"expected a DEST in .pth, got {args.dest!r}; it would be torch's format under that name")
    if args.dest.endswith(".pkl") and args.to != "d2":
        raise InputError(f"expected a DEST in .pth for --to {args.to}, got {args.dest!r}; only Detectron2 reads .pkl")
    if args.scale is not None and not 0 < args.scale < math.inf:
        raise InputError(f"expected a positive number as --scale, got {args.scale:g}")


def _split(tensors, patterns):
    """Those that no pattern matches, and the names of the others."""
    matched = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: tensor for name, tensor in tensors.items() if name not in set(matched)}, matched


def _without(tensors, patterns):
    for pattern in patterns:
        if not _split(tensors, [pattern])[1]:
            raise InputError(
                f"expected --drop of names that the source has, got {pattern!r}; its names are like {some(tensors, 3)}"
            )
    tensors, dropped = _split(tensors, (*patterns, *USELESS))
    # mmcv 0.x's EMAHook keeps a second set of weights in buffers of the model.
    second = {f"ema_{name.replace('.', '_')}" for name in tensors}
    return (
        {name: tensor for name, tensor in tensors.items() if name not in second},
        dropped + [name for name in tensors if name in second],
    )


def _require_use(content, args):
    """Refuse what there is nothing for: a lone classifier, and options in vain."""
    if not content.others:
        raise InputError(f"expected a trunk beside the classifier in {args.source!r}, got none; is the file whole?")
    if args.fold and content.task == IMAGES and args.to == "d2":
        raise InputError("expected no --fold for a backbone, which has no classifier; leave it out")
    if args.classifier and not content.timm_name and args.to != "timm":
        raise InputError(f"expected no --classifier for {content.heading}, whose classifier is known; leave it out")


def arrange(content, tensors, args):
    """The result's tensors, and the rows of the table."""
    layers = content.classifiers
    known = set(content.others.values()) | {part.source for layer in layers for part in layer.parts.values()}
    unmapped = [name for name in tensors if name not in known]
    if unmapped:
        raise InputError(
            f"expected a place for every tensor of the source, but {len(unmapped)} have none: {some(unmapped)}; if "
            "they do not matter, add --drop PATTERN for them"
        )
    backbone_only = content.task == IMAGES and args.to == "d2"
    if args.fold:
        for layer in layers:
            fold(layer)
    classifier = None if content.timm_name else args.classifier  # which then names the source's
    if args.to == "timm" and args.config and not classifier:
        classifier = timm_classifier(args.config)
    sources = targets.TARGETS[args.to].arrange(content, classifier)
    rows, result = [], {}
    for name, source in sources.items():
        result[name] = torch.tensor(0) if source is None else tensors[source]
        rows.append(Row("mapped", source, name) if source else Row("new", "", name, "0"))
    for layer in layers:
        for word, name in layer.names().items():
            part = layer.parts[word]
            if backbone_only:
                rows.append(Row("dropped", part.source or "", "", "a backbone has no classifier"))
                continue
            result[name] = part.tensor
            rows.append(Row("mapped" if part.source else "new", part.source or "", name, part.change, alone=True))
    if backbone_only:
        layers.clear()
        content.notes.append(
            "for Detectron2 this is a backbone to start stage one from; like most image classifiers it has seen RGB "
            f"images: set {', '.join(f'{key} {value}' for key, value in targets.BACKBONE_CONFIG.items())}"
        )
    return {name: tensor.detach().clone().contiguous() for name, tensor in result.items()}, rows


def _require_finite(result: dict[str, Tensor], source: str):
    broken = [name for name, tensor in result.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"expected finite numbers in {source!r}, but got NaN or infinity in {some(broken)}; use an earlier one"
        )


def write(result, meta, content, tensors, rows, args) -> str:
    """Write the result, read it back and compare; it gets its name only if all of it holds."""
    arrays = args.dest.endswith(".pkl")
    with atomic_file(args.dest, "w+b") as file:
        targets.save(targets.TARGETS[args.to].packed(result, meta), file, arrays)
        file.flush()
        file.seek(0)
        again = targets.load(file, arrays)
        changed = [
            row.name
            for row in rows
            if row.status == "mapped" and not row.change and not _same(again[row.name], tensors[row.source])
        ]
        if again.keys() != result.keys() or changed:
            raise RuntimeError(f"the written file differs from the source in {some(changed) or 'its names'}")
        differences = [layer.difference(again) for layer in content.classifiers]
        if not differences:
            return "every tensor equals the source's"
        if not max(differences) <= TOLERANCE:
            raise InputError(
                f"expected the result's scores to be the source's, but they differ by {max(differences):.1e} of the "
                "largest; is its classifier what it was taken for (--from, --scale)?"
            )
    return (
        "every copied tensor equals the source's; largest difference of scores from the source's own formula "
        f"{max(differences):.1e} of the largest"
    )


def _same(one, two):
    return one.dtype == two.dtype and torch.equal(one.flatten(), two.flatten())


def table(rows, verbose: bool) -> str:
    """The rows as text; tensors of one module are one line unless ``verbose``."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        names = (row.source, row.name)
        key = names if verbose or row.alone else tuple(map(_module, names))
        groups.setdefault((row.status, *key, row.change), []).append(row)
    lines = []
    for (status, source, name, change), members in groups.items():
        if len(members) == 1:
            source, name = members[0].source, members[0].name
        else:
            source, name = (f"{module}.*" if module else "" for module in (source, name))
        lines.append((status, str(len(members)), source, "->" if name else "", name, change))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    shown = []
    for line in lines:
        cells = [
            f"{cell:>{width}}" if cell.isdigit() else f"{cell:<{width}}"
            for cell, width in zip(line, widths, strict=True)
        ]
        shown.append("  " + "  ".join(cells).rstrip())
    return "\n".join(shown)


def _module(name: str) -> str:
    """``"backbone.layer1.0.conv1.weight"`` -> ``"backbone.layer1"``: two words at most, up to a number."""
    found = re.match(r"[^.\d][^.]*(?:\.[^.\d][^.]*)?(?=\.)", name)
    return found[0] if found else name


if __name__ == "__main__":
    sys.exit(main())
