"""Image classifiers of other people's code, as :class:`Content` with timm's names.

Each ``parse`` takes the tensors, --scale and --classifier.
"""

import re

import torch

from disalign import InputError
from disalign.errors import some

from . import formulas
from .classifiers import Part, ScoreLayer
from .content import IMAGES, Content, below, is_matrix, own_layer, require, scale_part
from .resnet_names import to_torchvision

#: Names of timm's and torchvision's classifiers.
LAST_LINEAR = ("fc", "classifier", "head", "head.fc", "last_linear", "head.l", "head.head.l", "head.fc.fc2", "head.fc2")
#: Modules of a ResNet and a ResNeXt in torchvision's names.
RESNET = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.\w+")
#: What a whole one has.
RESNET_PARTS = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
#: A second classifier: of distillation, or an auxiliary one.
SECOND = re.compile(r"(head_dist|aux_head|aux\d?|aux_?logits)\.", re.IGNORECASE)
#: How timm names nothing.
TORCHVISION_ONLY = re.compile(r"features\.\d+\.\d+\.|trunk_output\.|encoder\.layers\.encoder_layer_|classifier\.\d+\.")


def parse_cvpods(tensors, scale, classifier):
    layer = "network.linear"
    own = below(tensors, layer)
    others = {}
    for name in tensors:
        renamed = to_torchvision(name.removeprefix("network."))
        if renamed and name.startswith("network."):
            others[renamed] = name
    parts = {"weight": Part(own["weight"], f"{layer}.weight")}
    calibrated = "logit_scale" in own or "logit_bias" in own or "confidence_layer.weight" in own
    is_cosine = "scale" in own or "bias" not in own
    if is_cosine:
        parts["scale"] = scale_part(own, layer, scale)
        value = float(parts["scale"].tensor)
        if calibrated:
            raise InputError(
                f"expected the confidence of {layer!r} to see the feature, but cvpods' DisAlignNormalizedLinear gives "
                "it the feature divided by its norm, which ours can't carry; convert its frozen stage one: add "
                f"--drop '{layer}.logit_*' --drop '{layer}.confidence_layer.*', and train stage two anew"
            )

        def formula(x):
            return formulas.cosine(x, own["weight"], value)
    else:
        parts["bias"] = Part(own["bias"], f"{layer}.bias")

        def formula(x):
            z = formulas.linear(x, own["weight"], own["bias"])
            if not calibrated:
                return z
            confidence = formulas.sigmoid(x, own["confidence_layer.weight"], own["confidence_layer.bias"])
            return formulas.rescaled(z, confidence, own["logit_scale"], own["logit_bias"])

        if calibrated:
            require(own, layer, ("logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias"))
            # (1 + confidence * s) z is eq. 5 with a magnitude of 1 + s; in half precision 1 + s would lose digits.
            s = own["logit_scale"]
            magnitude = (1 + s.double()).flatten().to(torch.promote_types(s.dtype, torch.float32))
            parts |= {
                "magnitude": Part(magnitude, f"{layer}.logit_scale", "+ 1"),
                "margin": Part(own["logit_bias"].flatten(), f"{layer}.logit_bias"),
                "confidence.weight": Part(own["confidence_layer.weight"], f"{layer}.confidence_layer.weight"),
                "confidence.bias": Part(own["confidence_layer.bias"], f"{layer}.confidence_layer.bias"),
            }
    heading = f"cvpods classification{', DisAlign' if calibrated else ''}{', cosine' if is_cosine else ''}"
    notes = [
        "the official ImageNet-LT configs see RGB images divided by 255 and normalised by ImageNet's mean and standard "
        "deviation, with the stride in the 3x3 convolution, as timm does; if yours set INPUT.FORMAT BGR or "
        "STRIDE_IN_1X1 True, the file can't tell"
    ]
    return Content(
        IMAGES, others, [ScoreLayer(layer, parts, formula)], heading, notes, trunk_known=is_whole_resnet(others)
    )


def parse_balancing(tensors, scale, classifier):
    layer = "classifier.fc"
    own = below(tensors, "classifier")
    others = {name.removeprefix("feat_model."): name for name in tensors if name.startswith("feat_model.")}
    if "weight" in own:
        raise InputError(
            "expected a linear classifier of classifier-balancing, got its cosine one, which divides by 1 + norm of "
            "the feature rather than by the norm; ours is another function, train stage one anew"
        )
    if "fc.weight" not in own:
        raise InputError(
            f"expected a linear classifier of classifier-balancing (fc.weight), got {some(own) or 'no tensors'}; its "
            "nearest-mean and meta-embedding classifiers have no counterpart here"
        )
    require(own, "classifier", ("fc.bias",))
    _require_resnet(others, "classifier-balancing")
    parts = {word: Part(own[f"fc.{word}"], f"{layer}.{word}") for word in ("weight", "bias")}
    learnt_scales = own.get("scales")
    if learnt_scales is not None:  # learnable weight scaling: eq. 4's magnitude, with confidence one
        parts["magnitude"] = Part(learnt_scales, "classifier.scales")

    def formula(x):
        z = formulas.linear(x, own["fc.weight"], own["fc.bias"])
        return z if learnt_scales is None else z * learnt_scales.double()

    heading = f"classifier-balancing{', learnable weight scaling' if learnt_scales is not None else ''}"
    layers = [ScoreLayer(layer, parts, formula)]
    return Content(IMAGES, others, layers, heading, trunk_known=is_whole_resnet(others))


def parse_mmpretrain(tensors, scale, classifier):
    others = {name.removeprefix("backbone."): name for name in tensors if name.startswith("backbone.")}
    _require_resnet(others, "mmpretrain")
    layers = [_linear_layer(tensors, "head.fc")]
    return Content(IMAGES, others, layers, "mmpretrain or mmcls", trunk_known=is_whole_resnet(others))


def parse_timm(tensors, scale, classifier):
    foreign = [name for name in tensors if TORCHVISION_ONLY.match(name)]
    if foreign:
        raise InputError(
            f"expected timm's names, got torchvision's of an architecture that timm names otherwise ({some(foreign, 2)}"
            "); ResNet, ResNeXt, Wide ResNet and DenseNet share theirs, take timm's own weights for others"
        )
    layer = classifier or _last_linear(tensors)
    others = {name: name for name in tensors if not name.startswith(f"{layer}.")}
    second = [name for name in others if SECOND.match(name)]
    if second:
        raise InputError(
            f"expected one classifier, got a second beside {layer!r}: {some(second, 2)}; the model may score by both, "
            "so --drop it only if it is not used"
        )
    layers = [_linear_layer(tensors, layer)]
    heading = f"torchvision or timm, classifier {layer!r}"
    return Content(IMAGES, others, layers, heading, timm_name=layer, trunk_known=is_whole_resnet(others))


def parse_disalign_cls(tensors, scale, classifier):
    others = {name.removeprefix("backbone."): name for name in tensors if name.startswith("backbone.")}
    layer = own_layer(tensors, "classifier", "classifier.calibration")
    return Content(IMAGES, others, [layer], f"disalign_cls, stage {'two' if layer.calibrated else 'one'}")


def is_whole_resnet(others) -> bool:
    """Whether the names are those of a plain ResNet or ResNeXt, from the stem to the last stage, and no others."""
    return all(map(RESNET.fullmatch, others)) and {name.partition(".")[0] for name in others} == RESNET_PARTS


def _linear_layer(tensors, layer):
    own = below(tensors, layer)
    if "weight" not in own:
        raise InputError(
            f"expected the name of a linear layer as --classifier, but the file has no {layer}.weight; its last names "
            f"are {some(list(tensors)[-3:])}"
        )
    if own["weight"].dim() != 2:
        raise InputError(
            f"expected a linear classifier, but {layer!r} has a weight of shape {tuple(own['weight'].shape)}; name "
            "another with --classifier"
        )
    weight, bias = own["weight"], own.get("bias")
    parts = {"weight": Part(weight, f"{layer}.weight")}
    if bias is None:
        parts["bias"] = Part(torch.zeros(len(weight), dtype=weight.dtype), None, "zeros")
    else:
        parts["bias"] = Part(bias, f"{layer}.bias")
    return ScoreLayer(layer, parts, lambda x: formulas.linear(x, weight, bias))


def _last_linear(tensors):
    found = [name for name in LAST_LINEAR if is_matrix(tensors.get(f"{name}.weight"))]
    if len(found) != 1:
        raise InputError(
            f"expected one linear classifier among {some(LAST_LINEAR)}, got {some(found) or 'none'}; name it with "
            "--classifier"
        )
    return found[0]


def _require_resnet(others, source):
    foreign = [name for name in others if not RESNET.fullmatch(name)]
    if foreign:
        raise InputError(
            f"expected a plain ResNet or ResNeXt of {source}'s, whose names timm shares, but it also holds "
            f"{some(foreign, 3)}; other architectures of {source}'s can't be converted"
        )
