"""Tiny checkpoints of other people's formats, and their scores, re-derived by loops."""

import math

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch import nn

from disalign_tools import convert

CLASSES, WIDTH = 5, 32
#: A small ResNet's options in timm, which has torchvision's names.
BACKBONE = dict(name="resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, WIDTH))


def small_resnet(**options):
    """A classifier with BatchNorm statistics that are not their starts; ``options`` override ``BACKBONE``."""
    options = BACKBONE | options
    model = timm.create_model(options.pop("name"), num_classes=CLASSES, **options)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running" in name or "bn" in name:
                tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 7)
    return model


def tiny(**more) -> dict:
    """A classifier in timm's names, a few numbers large, with every part of a ResNet."""
    trunk = {f"layer{stage}.0.conv1.weight": torch.randn(2, 2, 1, 1) for stage in (1, 2, 3, 4)}
    trunk |= {"conv1.weight": torch.randn(4, 3, 1, 1), "bn1.weight": torch.randn(4)}
    return {**trunk, "fc.weight": torch.randn(5, 4), "fc.bias": torch.randn(5), **more}


def cvpods_names(state: dict) -> dict:
    """A ResNet's state dict under cvpods' names, written out once more."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("fc."):
            renamed[name.replace("fc.", "network.linear.")] = tensor
            continue
        for number in "1234":
            name = name.replace(f"layer{number}.", f"res{int(number) + 1}.")
        for old, new in (("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm")):
            name = name.replace(old, new)
        for number in "123":
            name = name.replace(f"bn{number}.", f"conv{number}.norm.")
        renamed[f"network.{name}" if name.startswith("res") else f"network.stem.{name}"] = tensor
    return renamed


def calibration(classes: int, width: int, shape=(1, -1)) -> dict:
    """cvpods' names of a calibration that has learnt something."""
    return {
        "logit_scale": torch.randn(classes).reshape(shape),
        "logit_bias": torch.randn(classes).reshape(shape),
        "confidence_layer.weight": torch.randn(1, width) / width**0.5,
        "confidence_layer.bias": torch.randn(1),
    }


def below(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def run(*arguments) -> int:
    """Exit status of the command."""
    return convert.main([str(argument) for argument in arguments])


def saved(folder, content, name="source.pth"):
    path = folder / name
    torch.save(content, path)
    return path


def refused(capsys, folder, *arguments) -> str:
    """The one sentence that the command ends with; it leaves nothing new and the old as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(*arguments) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: expected ")
    return lines[0]


# Loops in Python's floats: nothing of torch's or ours but the numbers.


def dot(row, x):
    return math.fsum(a * b for a, b in zip(row, x, strict=True))


def linear_by_hand(x, weight, bias=None):
    bias = [0.0] * len(weight) if bias is None else bias.tolist()
    rows = weight.double().flatten(1).tolist()
    return [[dot(row, one) + b for row, b in zip(rows, bias, strict=True)] for one in x.tolist()]


def cosine_by_hand(x, weight, scale):
    rows = weight.double().tolist()
    return [[scale * dot(row, one) / math.sqrt(dot(row, row) * dot(one, one)) for row in rows] for one in x.tolist()]


def confidence_by_hand(x, weight, bias):
    return [1 / (1 + math.exp(-scores[0])) for scores in linear_by_hand(x, weight, bias)]


def classification_by_hand(z, confidence, scale, bias):
    """(1 + confidence * scale) * z + confidence * bias."""
    return [
        [
            (1 + c * s) * one + c * b
            for one, s, b in zip(scores, scale.flatten().tolist(), bias.flatten().tolist(), strict=True)
        ]
        for scores, c in zip(z, confidence, strict=True)
    ]


def detection_by_hand(z, confidence, scale, bias):
    """confidence * (scale * z + bias) + (1 - confidence) * z but for the last, the background."""
    result = []
    for scores, c in zip(z, confidence, strict=True):
        *foreground, background = scores
        pairs = zip(foreground, scale.flatten().tolist(), bias.flatten().tolist(), strict=True)
        result.append([c * (s * one + b) + (1 - c) * one for one, s, b in pairs] + [background])
    return result


def assert_scores(module: nn.Module, x, expected):
    """The module's scores of float64 features, in float64, are those."""
    with torch.no_grad():
        found = module.double()(x)
    torch.testing.assert_close(found.flatten(1), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
