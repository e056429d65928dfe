"""Convert a checkpoint: disalign convert SOURCE DEST --to {cls,d2,mmseg,timm}

Takes the checkpoints of cvpods (the official DisAlign's among them), classifier-balancing, torchvision, timm,
mmpretrain, Detectron2, MMSegmentation and of this repository; docs/converting.md has the table. The source is not
changed. Before the result gets its name, it is read back, and its scores are compared with the source's own formula.
"""

import argparse
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from disalign import InputError
from disalign.cli import command
from disalign.errors import some
from disalign.hand_over import require_finite
from disalign.io import atomic_file, require_place

from . import resnet, targets
from .classifier import Classifier, Part
from .config_check import check_fit, timm_classifier
from .open_file import open_checkpoint
from .sources import SOURCES, detect
from .sources.frame import IMAGES, Content, Source
from .table import table

#: Tensors that no target needs; the official ImageNet-LT's loss keeps its class weights beside the network.
USELESS = ("pixel_*", "*anchor_generator*", "*cell_anchors*", "data_preprocessor.*", "loss_evaluator.weight")
#: Largest difference of scores, relative to the largest score.
TOLERANCE = 1e-6


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    require_dest(args)
    tensors, known, left_out = open_checkpoint(args.source, args.ema, args.trust_checkpoint)
    tensors, dropped = without(tensors, args.drop)
    source = detect(tensors, args.source_format, args.source, args.classifier)
    content = source.parse(tensors, args.scale, args.classifier)
    layers, where = content.classifiers, f" in {args.source!r}"
    for layer in layers:
        layer.require_fit(where)
    require_use(content, source, args)
    require_places(content, tensors)
    for layer in layers if args.fold else []:
        layer.fold()
    result = arrange(content, source, tensors, args)
    whole = {name: part.tensor for name, part in result.items()}
    require_finite(whole, where)
    if args.config:
        content.notes.append(check_fit(args.to, args.config, whole))
    meta = {key: value for key, value in known.items() if key in targets.TARGETS[args.to]}
    compared = write(args, result, tensors, meta, layers)

    print(f"{args.source}: {content.heading}")
    alone = {name for layer in layers for name in layer.named_parts()}
    print(table(result, dict.fromkeys(dropped, "") | content.dropped, alone, args.verbose))
    if left_out := left_out + [key for key in known if key not in meta]:
        print(f"left out: {', '.join(left_out)}")
    if meta:
        print(f"kept beside the weights: {', '.join(meta)}")
    for note in content.notes:
        print(f"note: {note}")
    print(f"{args.dest}: {len(result)} tensors for --to {args.to}; read back, {compared}")
    for layer in layers:
        if layer.stock_line:
            print(f"before loading it: {layer.stock_line}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "disalign convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the checkpoint: .pth and the like, .pkl of Detectron2's zoo, .safetensors")
    parser.add_argument("dest", help="the file to write; with d2, .pkl is Detectron2's pickle of numpy arrays")
    parser.add_argument("--to", required=True, choices=targets.TARGETS, help="the package that is to load it")
    parser.add_argument("--from", dest="source_format", choices=SOURCES, help="default: told by its tensors' names")
    parser.add_argument("--config", help="also check that it fits: a config of the package, or a timm model's name")
    parser.add_argument("--fold", action="store_true", help="fold the calibration into a stock classifier's weights")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="of two sets of weights, the averaged one")
    parser.add_argument("--scale", type=float, help="of a cosine classifier, if not in the file (official: 20)")
    parser.add_argument("--classifier", metavar="NAME", help="the last linear layer, if its name does not tell")
    parser.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave out tensors; repeatable")
    parser.add_argument("--force", action="store_true", help="replace an existing DEST")
    parser.add_argument("--verbose", action="store_true", help="list every tensor")
    parser.add_argument("--trust-checkpoint", action="store_true", help="unpickle SOURCE in full: its code runs")
    return parser.parse_args(argv)


def require_dest(args: argparse.Namespace) -> None:
    require_place(args.dest, [args.source], option="DEST", force=args.force)
    if args.dest.endswith(".safetensors") or (args.dest.endswith(".pkl") and args.to != "d2"):
        raise InputError(f"expected a DEST in .pth for --to {args.to}, got {args.dest!r}; only Detectron2 reads a .pkl")
    if args.scale is not None and not 0 < args.scale < math.inf:
        raise InputError(f"expected a positive number as --scale, got {args.scale:g}")


def without(tensors: dict[str, Tensor], patterns: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors left after --drop and without those that no target needs, and the names of the others."""
    for pattern in patterns:
        if not fnmatch.filter(tensors, pattern):
            raise InputError(
                f"expected --drop of names that the source has, got {pattern!r}; it has {some(tensors, 3)}"
            )
    dropped = {name for pattern in (*patterns, *USELESS) for name in fnmatch.filter(tensors, pattern)}
    # mmcv 0.x's EMAHook keeps a second set of weights in buffers of the model.
    dropped |= {f"ema_{name.replace('.', '_')}" for name in tensors} & tensors.keys()
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return kept, [name for name in tensors if name in dropped]


def require_use(content: Content, source: Source, args: argparse.Namespace) -> None:
    """Refuse a target for other models, a lone classifier, and options without effect."""
    if args.to not in source.targets:
        to = " or ".join(source.targets)
        raise InputError(f"expected --to {to} for {content.heading}, got --to {args.to}; see docs/converting.md")
    if not content.others:
        raise InputError(f"expected a trunk beside the classifier in {args.source!r}, got none; is the file whole?")
    layers = content.classifiers
    cosine = any(layer.cosine for layer in layers)
    stock = not all(layer.calibrated or layer.cosine for layer in layers)
    in_vain = {
        "--scale, since its classifier is linear": args.scale is not None and not cosine,
        "--classifier, since it is known": args.classifier and not content.timm_name and args.to != "timm",
        "--fold for a backbone, which has no classifier": args.fold and source.targets == IMAGES and args.to == "d2",
        "--fold, since its classifier is a stock one": args.fold and stock,
        "--config, which has no place for a folded cosine classifier": args.fold and cosine and args.config,
    }
    for option, given in in_vain.items():
        if given:
            raise InputError(f"expected no {option} ({content.heading}); leave it out")


def require_places(content: Content, tensors: dict[str, Tensor]) -> None:
    parts = [part for layer in content.classifiers for part in layer.parts.values()]
    unmapped = tensors.keys() - content.others.values() - {part.source for part in parts}
    if unmapped:
        raise InputError(
            f"expected a place for every tensor of the source, but {len(unmapped)} have none: "
            f"{some(name for name in tensors if name in unmapped)}; if they are not needed, add --drop PATTERN for them"
        )


def arrange(content: Content, source: Source, tensors: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Part]:
    """The result: name -> part."""
    named = None if content.timm_name else args.classifier  # which then has the source's names
    known = content.names_known and (args.to != "timm" or named)
    if args.to == "timm" and args.config and not named:
        named = timm_classifier(args.config)
    result = {name: Part(tensors[theirs], theirs) for name, theirs in content.others.items()}
    if source.targets == IMAGES:
        result = targets.of_images(result, content, args.to, named or content.timm_name or "fc")
    if not (known or args.config or resnet.is_whole(content.others)):
        raise InputError(
            f"expected --config for {content.heading}, whose trunk is no whole plain ResNet "
            f"({some(resnet.foreign(content.others) or content.others, 2)}): only a model tells the names; give a timm "
            "model's name for --to timm (from disalign_cls its --classifier will do), else a config"
        )
    for layer in content.classifiers:
        result |= layer.named_parts()
    return result


def write(
    args: argparse.Namespace,
    result: dict[str, Part],
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    layers: list[Classifier],
) -> str:
    """Write, read back and compare with the source's ``tensors``; the file gets its name only if all checks pass."""
    arrays = args.dest.endswith(".pkl")
    copies = {name: tensors[part.source] for name, part in result.items() if part.source and not part.change}
    with atomic_file(args.dest, "w+b") as file:
        targets.save(args.to, result, meta, file, arrays)
        file.seek(0)
        again = targets.load(file, arrays)
        changed = [name for name, tensor in copies.items() if name in again and not _same(again[name], tensor)]
        if again.keys() != result.keys() or changed:
            raise RuntimeError(f"the written file differs from the source in {some(changed) or 'its names'}")
        differences = [layer.difference(again) for layer in layers]
        if not all(difference <= TOLERANCE for difference in differences):
            raise InputError(
                f"expected the result's scores to be the source's, but they differ by {max(differences):.1e} of the "
                "largest; is its classifier what it was taken for (--from, --scale)?"
            )
    said = "every copied tensor equals the source's"
    if differences:
        said += f"; largest difference of scores from the source's own formula {max(differences):.1e} of the largest"
    return said


def _same(one, two):
    return one.dtype == two.dtype and torch.equal(one.flatten(), two.flatten())
