"""The sources' own formulas, literally, in float64: they share no code with disalign's.

Shapes: features x (N, d), stage one's scores z (N, C). ``own`` holds a source's tensors under the source's names.
"""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """w_j . x + b_j."""
    scores = x @ weight.double().flatten(1).T
    return scores if bias is None else scores + bias.double()


def cosine(x: Tensor, weight: Tensor, scale: float, eps: float) -> Tensor:
    """scale * cos(w_j, x); norms of weights are at least eps."""
    unit = weight.double() / weight.double().norm(dim=1, keepdim=True).clamp_min(eps)
    return scale * (x / x.norm(dim=1, keepdim=True)) @ unit.T


def sigmoid(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Confidence (N, 1)."""
    return 1 / (1 + torch.exp(-linear(x, weight, bias)))


def blended(z: Tensor, confidence: Tensor | float, magnitude: Tensor, margin: Tensor) -> Tensor:
    """Eq. 4-5 of the paper; trailing scores beyond the K of magnitude and margin are unchanged."""
    k = magnitude.numel()
    s = magnitude.double().flatten() * z[:, :k] + margin.double().flatten()
    return torch.cat([confidence * s + (1 - confidence) * z[:, :k], z[:, k:]], dim=1)


def ours(z: Tensor, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """This repository's: eq. 4-5; by default magnitude 1, margin 0, confidence 1."""
    k = own["magnitude" if "magnitude" in own else "margin"].numel()
    confidence = sigmoid(x, own["confidence.weight"], own["confidence.bias"]) if "confidence.weight" in own else 1.0
    return blended(z, confidence, own.get("magnitude", torch.ones(k)), own.get("margin", torch.zeros(k)))


def cvpods_detection(z: Tensor, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Eq. 4-5 for the foreground."""
    confidence = sigmoid(x, own["confidence_layer.weight"], own["confidence_layer.bias"])
    return blended(z, confidence, own["logit_scale"], own["logit_bias"])


def cvpods_classification(z: Tensor, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """(1 + confidence * scale) * z + confidence * bias."""
    confidence = sigmoid(x, own["confidence_layer.weight"], own["confidence_layer.bias"])
    return (1 + confidence * own["logit_scale"].double()) * z + confidence * own["logit_bias"].double()


def weight_scaling(z: Tensor, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """classifier-balancing's learnable weight scaling."""
    return z * own["scales"].double()
