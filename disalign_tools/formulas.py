"""The sources' own formulas, literally, in float64: they share nothing with disalign's.

Shapes: features x (N, d), scores z (N, C).
"""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """w_j . x + b_j."""
    scores = x @ weight.double().flatten(1).T
    return scores if bias is None else scores + bias.double()


def cosine(x: Tensor, weight: Tensor, scale: float, eps: float = 1e-12) -> Tensor:
    """scale * cos(w_j, x); norms below eps count as it (cvpods: torch's 1e-12)."""
    unit = weight.double() / weight.double().norm(dim=1, keepdim=True).clamp_min(eps)
    return scale * (x / x.norm(dim=1, keepdim=True)) @ unit.T


def sigmoid(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Confidence (N, 1)."""
    return 1 / (1 + torch.exp(-linear(x, weight, bias)))


def blended(z: Tensor, confidence: Tensor | float, magnitude: Tensor, margin: Tensor) -> Tensor:
    """Eq. 4-5 of the paper; trailing scores beyond the K of magnitude and margin stay."""
    k = magnitude.numel()
    s = magnitude.double().flatten() * z[:, :k] + margin.double().flatten()
    return torch.cat([confidence * s + (1 - confidence) * z[:, :k], z[:, k:]], dim=1)


def rescaled(z: Tensor, confidence: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """cvpods' classification: (1 + confidence * scale) * z + confidence * bias."""
    return (1 + confidence * scale.double()) * z + confidence * bias.double()
