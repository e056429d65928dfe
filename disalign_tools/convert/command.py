"""Convert a checkpoint: python -m disalign_tools.convert SOURCE DEST --to {cls,d2,mmseg,timm}

Takes the checkpoints of cvpods (the official DisAlign's among them), classifier-balancing, torchvision, timm,
mmpretrain, Detectron2, MMSegmentation and of this repository; docs/converting.md has the table. The source stays as it
is. Before the result gets its name it is read back, and its scores are compared with the source's own formula.
"""

import argparse
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from disalign import InputError
from disalign.cli import command
from disalign.errors import some
from disalign.hand_over import require_tensors
from disalign.io import atomic_file, require_place

from . import resnet, targets
from .classifier import Classifier, Part
from .config_check import check_fit, timm_classifier
from .open_file import open_checkpoint
from .sources import SOURCES, detect
from .sources.frame import IMAGES, Content, Task
from .table import table

#: Tensors that no target has a use for; the official ImageNet-LT's loss keeps its class weights beside the network.
USELESS = (
    *("pixel_mean", "pixel_std", "*anchor_generator*", "*cell_anchors*", "data_preprocessor.*"),
    "loss_evaluator.weight",
)
#: Of image classifiers: tables that timm now computes.
COMPUTED = ("*.relative_position_index", "*.attn_mask")
#: Largest difference of scores, relative to the largest score.
TOLERANCE = 1e-6


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    _require_dest(args)
    checkpoint = open_checkpoint(args.source, args.ema, args.trust_checkpoint)
    tensors, dropped = without(checkpoint.tensors, args.drop)
    source = detect(tensors, args.source_format, args.source, args.classifier)
    if source.task == IMAGES:
        tensors, computed = split(tensors, COMPUTED)
        dropped += computed
    content = source.parse(tensors, args.scale, args.classifier)
    layers, where = content.classifiers, f" in {args.source!r}"
    for layer in layers:
        layer.require_fit(where)
    targets.require_fit(source.task, content.heading, args.to)
    _require_use(content, source.task, args)
    _require_places(content, tensors)
    if args.fold:
        for layer in layers:
            layer.fold()
    result = arrange(content, source.task, tensors, args)
    whole = {name: part.tensor.detach().clone().contiguous() for name, part in result.items()}
    require_tensors(whole, whole, "tensors", where=f" in {args.source!r}")  # refuses NaN and infinity
    fit = check_fit(args.to, args.config, whole) if args.config else None
    copies = {name: tensors[part.source] for name, part in result.items() if part.source and not part.change}
    meta = {key: value for key, value in checkpoint.meta.items() if key in targets.TARGETS[args.to]}
    compared = write(args.to, args.dest, whole, meta, copies, layers)

    print(f"{args.source}: {content.heading}")
    alone = {name for layer in layers for name in layer.named_parts()}
    print(table(result, dict.fromkeys(dropped, "") | content.dropped, alone, args.verbose))
    if left_out := checkpoint.left_out + [key for key in checkpoint.meta if key not in meta]:
        print(f"left out: {', '.join(left_out)}")
    if meta:
        print(f"kept beside the weights: {', '.join(meta)}")
    for note in content.notes:
        print(f"note: {note}")
    if fit:
        print(fit)
    print(f"{args.dest}: {len(result)} tensors for --to {args.to}; read back, {compared}")
    for layer in layers:
        if layer.stock_line:
            print(f"before loading it: {layer.stock_line}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m disalign_tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="the checkpoint: .pth and the like, .pkl of Detectron2's zoo, .safetensors")
    parser.add_argument("dest", help="the file to write; with d2, .pkl is Detectron2's pickle of numpy arrays")
    parser.add_argument("--to", required=True, choices=targets.TARGETS, help="the package that is to load it")
    parser.add_argument("--from", dest="source_format", choices=SOURCES, help="default: what its tensors' names say")
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


def _require_dest(args):
    require_place(args.dest, [args.source], option="DEST", force=args.force)
    if args.dest.endswith(".safetensors"):
        raise InputError(f"expected a DEST in .pth, got {args.dest!r}; it would be torch's format under that name")
    if args.dest.endswith(".pkl") and args.to != "d2":
        raise InputError(f"expected a DEST in .pth for --to {args.to}, got {args.dest!r}; only Detectron2 reads .pkl")
    if args.scale is not None and not 0 < args.scale < math.inf:
        raise InputError(f"expected a positive number as --scale, got {args.scale:g}")


def split(tensors: dict[str, Tensor], patterns: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Those that no pattern matches, and the names of the others."""
    kept = {name: t for name, t in tensors.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)}
    return kept, [name for name in tensors if name not in kept]


def without(tensors: dict[str, Tensor], patterns: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """What is left after --drop and without what nobody needs, and the names of the others."""
    for pattern in patterns:
        if not split(tensors, [pattern])[1]:
            raise InputError(
                f"expected --drop of names that the source has, got {pattern!r}; its names are like {some(tensors, 3)}"
            )
    tensors, dropped = split(tensors, (*patterns, *USELESS))
    # mmcv 0.x's EMAHook keeps a second set of weights in buffers of the model.
    second = {f"ema_{name.replace('.', '_')}" for name in tensors} & tensors.keys()
    return {name: tensors[name] for name in tensors if name not in second}, dropped + sorted(second)


def _require_use(content, task, args):
    """Refuse what there is nothing for: a lone classifier, and options in vain."""
    cosine = any(layer.cosine for layer in content.classifiers)
    if not content.others:
        raise InputError(f"expected a trunk beside the classifier in {args.source!r}, got none; is the file whole?")
    if args.scale is not None and not cosine:
        raise InputError("expected a cosine classifier for --scale, got a linear one; leave out --scale")
    if args.fold and task == IMAGES and args.to == "d2":
        raise InputError("expected no --fold for a backbone, which has no classifier; leave it out")
    if args.classifier and not content.timm_name and args.to != "timm":
        raise InputError(f"expected no --classifier for {content.heading}, whose classifier is known; leave it out")
    if args.fold and args.config and cosine:
        raise InputError(
            "expected no --config with a folded cosine classifier, whose place no config has; leave it out"
        )


def _require_places(content, tensors):
    parts = [part for layer in content.classifiers for part in layer.parts.values()]
    unmapped = set(tensors) - set(content.others.values()) - {part.source for part in parts}
    if unmapped:
        raise InputError(
            f"expected a place for every tensor of the source, but {len(unmapped)} have none: "
            f"{some(name for name in tensors if name in unmapped)}; if they do not matter, add --drop PATTERN for them"
        )


def arrange(content: Content, task: Task, tensors: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Part]:
    """The result: name -> part."""
    classifier = None if content.timm_name else args.classifier  # which then names the source's
    if args.to == "timm" and args.config and not classifier:
        classifier = timm_classifier(args.config)
    sources = targets.arrange(content, task, args.to, classifier)
    if not (content.names_known or args.config or resnet.is_whole(content.others)):
        raise InputError(
            f"expected --config for {content.heading}, whose trunk is no whole plain ResNet "
            f"({some(content.others, 2)}), since only building the model tells whether these are its names; give a "
            "timm model's name for --to timm, else a config"
        )
    result = {
        name: Part(tensors[source], source) if source else Part(torch.tensor(0), None, "0")
        for name, source in sources.items()
    }
    for layer in content.classifiers:
        result |= layer.named_parts()
    return result


def write(
    to: str,
    path: str,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    copies: dict[str, Tensor],
    layers: list[Classifier],
) -> str:
    """Write the tensors, read them back and compare; the file gets its name only if all of it holds.

    ``copies`` are the source's own of those that were only copied. Returns what was compared, in words.
    """
    arrays = path.endswith(".pkl")
    with atomic_file(path, "w+b") as file:
        targets.save(to, tensors, meta, file, arrays)
        file.seek(0)
        again = targets.load(file, arrays)
        changed = [name for name, tensor in copies.items() if name not in again or not _same(again[name], tensor)]
        if again.keys() != tensors.keys() or changed:
            raise RuntimeError(f"the written file differs from the source in {some(changed) or 'its names'}")
        differences = [layer.difference(again) for layer in layers]
        if not all(difference <= TOLERANCE for difference in differences):
            raise InputError(
                f"expected the result's scores to be the source's, but they differ by {max(differences):.1e} of the "
                "largest; is its classifier what it was taken for (--from, --scale)?"
            )
    if not layers:
        return "every tensor equals the source's"
    return (
        "every copied tensor equals the source's; largest difference of scores from the source's own formula "
        f"{max(differences):.1e} of the largest"
    )


def _same(one, two):
    return one.dtype == two.dtype and torch.equal(one.flatten(), two.flatten())
