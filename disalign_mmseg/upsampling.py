"""Cross-entropy of bilinearly upsampled logits without the upsampled logits: exact in strips, or at sampled pixels.

Shapes: N images, K classes, h x w the head's logits, H x W the label map, n sampled pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from disalign.functional import grw_cross_entropy

#: MiB of upsampled logits at a time. A CPU is fastest within its caches (2 to 8 were; 32 took 1.6 times as long), a GPU
#: with few kernels to start.
STRIP_MIB = {"cpu": 4, "cuda": 64}


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    ignore_index: int = 255,
    align_corners: bool = False,
    strip_mib: float | None = None,
) -> Tensor:
    """Summed weighted cross-entropy of ``F.interpolate(logits, (H, W), mode="bilinear")``, and its gradient, exactly.

    It loops over strips of output rows, each of which needs only a few rows of the logits, and computes the gradient in
    the same pass; (N, K, H, W) never exists. It computes in fp32 or better, regardless of the logits' dtype and
    autocast, and keeps the gradient in that precision until a loss scaler's factor is applied. It cannot be
    differentiated twice. On a GPU it is as exact as matrix products: less so with TF32.

    Args:
        logits: (N, K, h, w), of any size relative to H x W; bf16 and fp16 are accepted too.
        target: (N, H, W) int64 labels in [0, K), or ``ignore_index``.
        weight: (K,) class weights.
        ignore_index: label of pixels that are ignored.
        align_corners: as in ``F.interpolate``.
        strip_mib: upsampled logits at a time; default: :data:`STRIP_MIB`.

    Returns:
        A scalar in fp32 or better, sum(w * ce) over the valid pixels; 0 with zero gradients if there are none.

    Raises:
        InputError: see :func:`disalign.grw_cross_entropy`.
    """
    if strip_mib is None:
        strip_mib = STRIP_MIB.get(logits.device.type, STRIP_MIB["cuda"])
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return _InStrips.apply(logits, target, weight, ignore_index, align_corners, strip_mib, wanted)


class _InStrips(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, ignore_index, align_corners, strip_mib, wanted):
        num_classes, (height, width) = logits.shape[1], target.shape[1:]
        precise = torch.promote_types(logits.dtype, torch.float32)
        # Rows first, so that the rows of a strip are contiguous.
        rows = logits.to(precise).transpose(1, 2).contiguous()
        down = interpolation_matrix(logits.shape[2], height, align_corners)
        down_here = down.to(rows)
        across = interpolation_matrix(logits.shape[3], width, align_corners).T.to(rows)
        strip_rows = max(1, int(strip_mib * 2**20 / (num_classes * width * rows.element_size())))
        total = rows.new_zeros(())
        gradient = torch.zeros_like(rows) if wanted else None
        with torch.autocast(logits.device.type, enabled=False), torch.set_grad_enabled(wanted):
            for start in range(0, height, strip_rows):
                strip = slice(start, start + strip_rows)
                needed = down[strip].any(dim=0).nonzero()
                needed = slice(int(needed[0]), int(needed[-1]) + 1)
                down_strip = down_here[strip, needed]
                for image in range(len(rows)):
                    source = rows[image, needed].detach().requires_grad_(wanted)
                    upsampled = (down_strip @ (source @ across).flatten(1)).unflatten(1, (num_classes, width))
                    loss = grw_cross_entropy(upsampled, target[image, strip], weight, "sum", ignore_index)
                    total += loss.detach()
                    if wanted:
                        gradient[image, needed] += torch.autograd.grad(loss, source)[0]
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        (gradient,) = ctx.saved_tensors
        return (gradient * factor).transpose(1, 2).to(ctx.dtype), *[None] * 6


def interpolation_matrix(size: int, new_size: int, align_corners: bool) -> Tensor:
    """(new_size, size) float64 matrix: ``F.interpolate`` along one dimension is a product with it.

    In fp32 ``F.interpolate`` rounds its coordinates, which changes its result by up to 1e-5 if the factor is not an
    integer.
    """
    basis = torch.eye(size, dtype=torch.float64)[None]
    return F.interpolate(basis, new_size, mode="linear", align_corners=align_corners)[0].T.contiguous()


def sampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    num_pixels: int = 4096,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """Unbiased estimate of :func:`upsampled_cross_entropy` from a few pixels of every image.

    The valid pixels of an image, in reading order, are cut into ``num_pixels`` equal shares, and one pixel is drawn
    from each; so every valid pixel is equally likely, and neighbours, which look alike, are seldom drawn together. The
    expectation of the sum over the drawn pixels, times (valid pixels / ``num_pixels``), is then the sum over all, in
    value and gradient; in an image of exactly ``num_pixels`` valid pixels the two are the same. The logits are
    interpolated at the drawn pixels only. Torch's global random numbers are used.

    Args and returns: as :func:`upsampled_cross_entropy`; the labels of the drawn pixels alone are checked.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(logits.device.type, enabled=False):
        positions, valid = sample_pixels(target, num_pixels, ignore_index)
        scores = interpolate_at(logits, positions, target.shape[1:], align_corners)
        labels = target.flatten(1).gather(1, positions)
        losses = grw_cross_entropy(scores, labels, weight, "none", ignore_index)
        return (losses * valid.to(losses.dtype)).sum() / num_pixels


def sample_pixels(target: Tensor, num_pixels: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """One pixel from each of ``num_pixels`` equal shares of every image's valid pixels; without a GPU synchronization.

    Args:
        target: (N, H, W) int64 labels.
        num_pixels: n.
        ignore_index: label of pixels that are not drawn, unless an image has no other.

    Returns:
        (N, n) int64 positions, row * W + column; and (N, 1) int64 number of valid pixels.
    """
    # rank[p] of the p-th pixel: valid pixels up to and with it; so the k-th valid pixel is the first of rank > k.
    rank = (target != ignore_index).flatten(1).cumsum(dim=1)
    valid = rank[:, -1:]
    shares = torch.arange(num_pixels, device=target.device)
    # In float64, where every pixel of a share is as likely as its neighbour.
    drawn = (shares + torch.rand(len(target), num_pixels, dtype=torch.float64, device=target.device)) / num_pixels
    drawn = torch.minimum((drawn * valid).long(), valid - 1)
    return torch.searchsorted(rank, drawn, right=True), valid


def interpolate_at(logits: Tensor, positions: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The values of ``F.interpolate(logits, size, mode="bilinear")`` at a few positions.

    Args:
        logits: (N, K, h, w) fp32 or better.
        positions: (N, n) int64, row * W + column.
        size: (H, W).
        align_corners: as in ``F.interpolate``.

    Returns:
        (N, K, n).
    """
    height, width = size
    rows, columns = positions.div(width, rounding_mode="floor"), positions % width
    places = [_normalised(columns, width, align_corners), _normalised(rows, height, align_corners)]
    grid = torch.stack(places, dim=-1).to(logits.dtype).unsqueeze(1)
    return F.grid_sample(logits, grid, "bilinear", "border", align_corners).squeeze(2)


def cells_at(positions: Tensor, grid: Sequence[int], size: Sequence[int], align_corners: bool) -> tuple[Tensor, Tensor]:
    """The cells of the logits, and their weights, from which :func:`interpolate_at` computes the scores at positions.

    Args:
        positions: (n,) int64, row * W + column.
        grid: (h, w).
        size: (H, W).
        align_corners: as in ``F.interpolate``.

    Returns:
        (n, 4) int64 cells, row * w + column; and (n, 4) fp64 weights, which sum to 1.
    """
    height, width = size
    cells, shares = [], []
    for index, new, old in ((positions // width, height, grid[0]), (positions % width, width, grid[1])):
        from_edge = (_normalised(index, new, align_corners) + 1) / 2
        place = (from_edge * (old - 1) if align_corners else from_edge * old - 0.5).clamp(0, old - 1)
        first = place.floor()
        cells.append(torch.stack([first, (first + 1).clamp(max=old - 1)], dim=-1).long())
        shares.append(torch.stack([first + 1 - place, place - first], dim=-1))
    (rows, columns), (down, across) = cells, shares
    index = rows.unsqueeze(-1) * grid[1] + columns.unsqueeze(-2)
    return index.flatten(-2), (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)


def _normalised(index: Tensor, size: int, align_corners: bool) -> Tensor:
    """``grid_sample``'s coordinates, -1 to 1 from edge to edge, or from the first pixel's centre to the last one's."""
    if align_corners:
        return 2 * index.double() / max(size - 1, 1) - 1
    return (2 * index.double() + 1) / size - 1
