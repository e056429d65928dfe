"""Fused and sampled upsampling with cross-entropy, against loops in float64 and torch's own functions."""

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
import torch.nn.functional as F

from disalign import InputError
from disalign_mmseg import upsampling
from disalign_mmseg.upsampling import (
    cells_at,
    interpolate_at,
    interpolation_matrix,
    sample_pixels,
    sampled_cross_entropy,
    upsampled_cross_entropy,
)

K = 5
ONE_ROW = 1e-9  # MiB: strips of a single row
SIZES = {
    "whole factor": ((4, 6), (16, 24)),
    "odd sizes": ((5, 7), (33, 51)),
    "other factor": ((3, 8), (10, 11)),
    "same size": ((6, 5), (6, 5)),
    "same height": ((6, 5), (6, 12)),
    "down": ((12, 10), (5, 4)),
    "down and up": ((12, 3), (5, 14)),
    "far down": ((40, 40), (3, 3)),
    "from one pixel": ((1, 1), (7, 5)),
    "to one pixel": ((6, 5), (1, 1)),
}


def data(size, new_size, images=2, dtype=torch.float32):
    """Logits, labels of which a quarter is 255, and class weights, one of which is 0."""
    logits = 3 * torch.randn(images, K, *size, dtype=torch.float64)
    target = torch.randint(K, (images, *new_size))
    target[torch.rand(target.shape) < 0.25] = 255
    target[0, 0, 0] = 1
    weight = torch.tensor([0.3, 2.0, 0.0, 1.1, 0.7], dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), target, weight.to(torch.promote_types(dtype, torch.float32))


def plain(logits, target, weight, align_corners=False):
    """Torch's own, in float64: the sum and its gradient."""
    logits = logits.detach().double().requires_grad_()
    upsampled = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
    total = F.cross_entropy(upsampled, target, weight.double(), ignore_index=255, reduction="sum")
    return total.detach(), torch.autograd.grad(total, logits)[0]


def by_hand(logits, target, weight, align_corners):
    """The same sum by loops over pixels, by the definition of bilinear interpolation."""

    def source(index, size, new_size):
        if align_corners:
            return index * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
        return min(max((index + 0.5) * size / new_size - 0.5, 0.0), size - 1)

    total, (height, width) = 0.0, logits.shape[2:]
    for image, y, x in (target != 255).nonzero().tolist():
        row, column = source(y, height, target.shape[1]), source(x, width, target.shape[2])
        top, left = min(int(row), height - 1), min(int(column), width - 1)
        scores = torch.zeros(K, dtype=torch.float64)
        for i, down in ((top, 1 - (row - top)), (min(top + 1, height - 1), row - top)):
            for j, across in ((left, 1 - (column - left)), (min(left + 1, width - 1), column - left)):
                scores += down * across * logits[image, :, i, j].double()
        label = target[image, y, x]
        total += (weight[label] * (scores.exp().sum().log() - scores[label])).item()
    return total


def value_and_gradient(loss, logits):
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("strip_mib", [None, ONE_ROW, 0.003], ids=["whole", "one row", "a few rows"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_fused_is_the_plain_loss(sizes, align_corners, strip_mib):
    logits, target, weight = data(*sizes)
    total = upsampled_cross_entropy(logits, target, weight, 255, align_corners, strip_mib)
    total, gradient = value_and_gradient(total, logits)
    expected, expected_gradient = plain(logits, target, weight, align_corners)
    assert total.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", [SIZES["other factor"], SIZES["down and up"], SIZES["from one pixel"]])
def test_fused_is_the_sum_by_hand(sizes, align_corners):
    logits, target, weight = data(*sizes, dtype=torch.float64)
    total = upsampled_cross_entropy(logits, target, weight, 255, align_corners, ONE_ROW)
    assert total.item() == pytest.approx(by_hand(logits.detach(), target, weight, align_corners), rel=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck_with_a_factor(align_corners):
    logits, target, weight = data((3, 4), (7, 9), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: -2.5 * upsampled_cross_entropy(z, target, weight, 255, align_corners, ONE_ROW), logits
    )


def test_the_gradient_cannot_be_differentiated():
    logits, target, weight = data((3, 4), (7, 9))
    (gradient,) = torch.autograd.grad(upsampled_cross_entropy(logits, target, weight) ** 2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    logits, target, weight = data(*SIZES["odd sizes"], dtype=dtype)
    total, gradient = value_and_gradient(upsampled_cross_entropy(logits, target, weight), logits)
    expected, expected_gradient = plain(logits, target, weight)
    assert (total.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    # The exact gradient, rounded once.
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_loss_scaler_saves_gradients_too_small_for_fp16():
    logits, target, weight = data(*SIZES["odd sizes"], dtype=torch.float16)
    weight = weight * 1e-9
    total = upsampled_cross_entropy(logits, target, weight)
    (lost,) = torch.autograd.grad(total, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(total * 2.0**20, logits)
    _, expected = plain(logits, target, weight)
    assert not lost.any()
    torch.testing.assert_close(scaled, (expected * 2**20).half(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("function", [upsampled_cross_entropy, sampled_cross_entropy])
def test_autocast_changes_nothing(function):
    logits, target, weight = data(*SIZES["odd sizes"])
    torch.manual_seed(1)
    expected = value_and_gradient(function(logits, target, weight), logits)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(logits, target, weight)
    assert all(map(torch.equal, value_and_gradient(loss, logits), expected))


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    logits, target, weight = data(*SIZES["odd sizes"])
    expected = upsampled_cross_entropy(logits, target, weight)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        without = upsampled_cross_entropy(logits, target, weight)
    assert torch.equal(without, expected)
    assert not without.requires_grad
    assert torch.equal(upsampled_cross_entropy(logits.detach(), target, weight), expected)


def test_strips_stay_small(monkeypatch):
    shapes = []

    def noted(upsampled, *arguments):
        shapes.append(tuple(upsampled.shape))
        return loss(upsampled, *arguments)

    loss = upsampling.grw_cross_entropy
    monkeypatch.setattr(upsampling, "grw_cross_entropy", noted)
    logits, target, weight = data((4, 6), (20, 24))
    upsampled_cross_entropy(logits, target, weight, strip_mib=6.5 * K * 24 * 4 / 2**20)
    assert shapes == [(rows, K, 24) for rows in (6, 6, 6, 2) for _ in range(2)]


def test_channels_last_logits():
    logits, target, weight = data(*SIZES["odd sizes"])
    other = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = value_and_gradient(upsampled_cross_entropy(logits, target, weight), logits)
    assert all(map(torch.equal, value_and_gradient(upsampled_cross_entropy(other, target, weight), other), expected))


@pytest.mark.parametrize("function", [upsampled_cross_entropy, sampled_cross_entropy])
@pytest.mark.parametrize("images", [0, 2])
def test_nothing_valid_gives_zero_and_zero_gradients(function, images):
    logits, target, weight = data(*SIZES["odd sizes"])
    logits, target = logits[:images].detach().requires_grad_(), torch.full_like(target[:images], 255)
    total, gradient = value_and_gradient(function(logits, target, weight), logits)
    assert total == 0
    assert gradient.shape == logits.shape
    assert not gradient.any()


@pytest.mark.parametrize("function", [upsampled_cross_entropy, sampled_cross_entropy])
def test_wrong_labels_and_weights_are_refused(function):
    logits, target, weight = data(*SIZES["odd sizes"])
    with pytest.raises(InputError, match=r"labels in \[0, 5\) or ignore_index 255, got 7"):
        function(logits, torch.full_like(target, 7), weight)
    with pytest.raises(InputError, match="expected 5 class weights"):
        function(logits, torch.where(target == 4, 0, target), weight[:4])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "new_size"), [(4, 16), (5, 33), (3, 10), (12, 5), (1, 7), (6, 1), (6, 6)])
def test_interpolation_matrix(size, new_size, align_corners):
    matrix = interpolation_matrix(size, new_size, align_corners)
    line = torch.randn(1, 1, size, dtype=torch.float64)
    expected = F.interpolate(line, new_size, mode="linear", align_corners=align_corners)
    assert matrix.shape == (new_size, size)
    torch.testing.assert_close(matrix @ line[0, 0], expected[0, 0])
    torch.testing.assert_close(matrix.sum(1), torch.ones(new_size, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- sampled pixels


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_interpolation_at_every_position(sizes, align_corners):
    logits, target, _ = data(*sizes, dtype=torch.float64)
    positions = torch.stack([torch.randperm(target[0].numel()) for _ in target])
    scores = interpolate_at(logits, positions, target.shape[1:], align_corners)
    expected = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners).flatten(2)
    expected = expected.gather(2, positions.unsqueeze(1).expand(-1, K, -1))
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_cells_and_weights_make_the_interpolation(sizes, align_corners):
    grid, size = sizes
    logits = data(*sizes)[0].detach()
    positions = torch.arange(size[0] * size[1])[torch.randperm(size[0] * size[1])]
    index, weight = cells_at(positions, grid, size, align_corners)
    assert (index.shape, index.dtype) == ((len(positions), 4), torch.int64)
    assert (weight.shape, weight.dtype) == (index.shape, torch.float64)
    assert index.min() >= 0
    assert index.max() < grid[0] * grid[1]
    assert weight.min() >= 0
    torch.testing.assert_close(weight.sum(1), torch.ones(len(positions), dtype=torch.float64))
    mixed = (logits.double().flatten(2)[..., index] * weight).sum(-1)
    exact = interpolate_at(logits.double(), positions.expand(2, -1), size, align_corners)
    torch.testing.assert_close(mixed, exact, rtol=0, atol=1e-12)
    plain = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).flatten(2)[..., positions]
    torch.testing.assert_close(mixed.float(), plain, rtol=1e-4, atol=1e-4)


def test_cells_at_no_positions():
    index, weight = cells_at(torch.zeros(0, dtype=torch.long), (3, 4), (6, 8), False)
    assert index.shape == weight.shape == (0, 4)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_as_many_samples_as_valid_pixels_give_the_plain_loss(sizes, align_corners):
    logits, target, weight = data(*sizes, images=1)
    valid = int((target != 255).sum())
    total = sampled_cross_entropy(logits, target, weight, valid, 255, align_corners)
    total, gradient = value_and_gradient(total, logits)
    expected, expected_gradient = plain(logits, target, weight, align_corners)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    scale = expected_gradient.abs().max().item()
    # grid_sample's coordinates are in fp32, as F.interpolate's are.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5 * scale)


def even_draws(monkeypatch, number):
    """``torch.rand`` gives the midpoints of ``number`` equal parts of [0, 1), one part a call, alike for all shares."""
    parts = iter(range(number))

    def rand(*shape, **options):
        return torch.full(shape, (next(parts) + 0.5) / number, **options)

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("num_pixels", [1, 4, 7, 40])
def test_the_expectation_is_the_plain_loss_in_value_and_gradient(monkeypatch, num_pixels):
    """Exactly, for num_pixels draws split each pixel's share into whole parts; images of unequal valid pixels."""
    logits, target, weight = data((3, 4), (5, 6), images=3, dtype=torch.float64)
    target[1] = 255
    target[1, 2, 3:] = torch.tensor([0, 3, 4])
    target[2] = 255
    counts = (target != 255).flatten(1).sum(1)
    assert counts[0] > 10
    assert counts[1:].tolist() == [3, 0]
    # The pixels' borders within the shares are multiples of 1 / valid pixels.
    draws = int(counts[0]) * 3
    even_draws(monkeypatch, draws)
    estimates = [
        value_and_gradient(sampled_cross_entropy(logits, target, weight, num_pixels), logits) for _ in range(draws)
    ]
    total, gradient = (torch.stack(parts).mean(0) for parts in zip(*estimates, strict=True))
    expected, expected_gradient = plain(logits, target, weight)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_random_draws_have_that_expectation():
    logits, target, weight = data((3, 4), (9, 8), images=2, dtype=torch.float64)
    draws = torch.stack([sampled_cross_entropy(logits, target, weight, 5).detach() for _ in range(4000)])
    expected, _ = plain(logits, target, weight)
    assert abs(draws.mean() - expected) < 4 * draws.std() / 4000**0.5
    assert draws.std() > 0.05 * expected
    assert draws.std() / 4000**0.5 < 0.01 * expected


def test_every_valid_pixel_is_equally_likely_and_no_other_is_drawn():
    target = torch.full((2, 3, 7), 255)
    target[0, 1, 2:] = 0
    target[1, ::2] = 1
    draws = [sample_pixels(target, 3) for _ in range(6000)]
    for image, number in enumerate((5, 14)):
        assert all(valid[image].tolist() == [number] for _, valid in draws)
        drawn = torch.cat([positions[image] for positions, _ in draws]).bincount(minlength=21)
        valid = (target[image] != 255).flatten()
        assert not drawn[~valid].any()
        # Five standard deviations of a binomial count.
        expected = 18000 / number
        assert (drawn[valid] - expected).abs().max() < 5 * expected**0.5


def test_a_seed_fixes_the_pixels():
    target = torch.randint(K, (2, 30, 40))
    torch.manual_seed(3)
    first, _ = sample_pixels(target, 100)
    other, _ = sample_pixels(target, 100)
    torch.manual_seed(3)
    again, _ = sample_pixels(target, 100)
    assert first.shape == (2, 100)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_shares_spread_the_pixels():
    positions, _ = sample_pixels(torch.zeros(2, 32, 32, dtype=torch.int64), 64)
    assert torch.equal(positions // 16, torch.arange(64).expand(2, -1))


def test_half_precision_logits_are_sampled_in_fp32():
    logits, target, weight = data(*SIZES["odd sizes"], images=1, dtype=torch.bfloat16)
    valid = int((target != 255).sum())
    total, gradient = value_and_gradient(sampled_cross_entropy(logits, target, weight, valid), logits)
    assert (total.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(total.double(), plain(logits, target, weight)[0], rtol=1e-6, atol=0)
