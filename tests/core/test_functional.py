"""The equations, against float64 references by another route."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from disalign import InputError, calibrate, generalized_reweight, grw_cross_entropy
from disalign.functional import check_background_weight, class_weights, grw_denominator

SHAPES = [(4, 5), (2, 5, 3, 2)]
INTEGER_VIEW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    """The bytes as integers: unlike ==, they tell -0.0 from 0.0."""
    return tensor.contiguous().view(INTEGER_VIEW[tensor.dtype])


def inputs(shape, dtype=torch.float64):
    k = shape[1]
    z = torch.randn(shape, dtype=dtype)
    confidence = torch.rand(shape[0], 1, *shape[2:], dtype=dtype)
    return z, confidence, torch.randn(k, dtype=dtype), torch.randn(k, dtype=dtype)


# ---------------------------------------------------------------------------------------------------- eq. 4-5


def calibrated_literally(z, confidence, magnitude, margin):
    """Eq. 4 and 5 word for word, class by class."""
    result = np.array(z, dtype=np.float64)
    for j in range(len(magnitude)):
        s = magnitude[j] * z[:, j] + margin[j]
        result[:, j] = confidence[:, 0] * s + (1 - confidence[:, 0]) * z[:, j]
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_calibrate_is_equation_4_and_5(shape):
    arguments = inputs(shape)
    expected = calibrated_literally(*(tensor.numpy() for tensor in arguments))
    np.testing.assert_allclose(calibrate(*arguments).numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_calibrate_has_the_gradients_of_equation_4_and_5(shape):
    z, confidence, magnitude, margin = (tensor.requires_grad_() for tensor in inputs(shape))
    upstream = torch.randn(shape, dtype=torch.float64)
    calibrate(z, confidence, magnitude, margin).backward(upstream)

    u, z_, c, alpha, beta = (t.detach().numpy() for t in (upstream, z, confidence, magnitude, margin))
    others = tuple(axis for axis in range(len(shape)) if axis != 1)
    column = (1, -1) + (1,) * (len(shape) - 2)
    alpha, beta = alpha.reshape(column), beta.reshape(column)
    np.testing.assert_allclose(z.grad, u * (c * alpha + 1 - c), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(magnitude.grad, (u * c * z_).sum(others), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(margin.grad, (u * c).sum(others), rtol=1e-12, atol=1e-14)
    slope = (u * (alpha * z_ + beta - z_)).sum(1, keepdims=True)
    np.testing.assert_allclose(confidence.grad, slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_calibrate_passes_gradcheck(shape):
    assert torch.autograd.gradcheck(calibrate, tuple(tensor.requires_grad_() for tensor in inputs(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_reaches_the_columns_that_pass_through(shape):
    z, confidence, magnitude, margin = inputs(shape)
    arguments = [tensor.requires_grad_() for tensor in (z, confidence, magnitude[:-1], margin[:-1])]
    assert torch.autograd.gradcheck(functools.partial(calibrate, passthrough=1), arguments)
    upstream = torch.randn_like(z)
    calibrate(*arguments, passthrough=1).backward(upstream)
    assert torch.equal(z.grad[:, -1], upstream[:, -1])


@pytest.mark.parametrize("dtype", INTEGER_VIEW)
@pytest.mark.parametrize("shape", [(64, 9), (16, 9, 4, 1)])
def test_magnitude_one_and_margin_zero_are_the_identity_bitwise(dtype, shape):
    limits = torch.finfo(dtype)
    z = torch.randn(shape) * 100
    z[:, 0], z[:, 1], z[:, 2], z[:, 3] = limits.max, limits.min, limits.tiny, 0.0
    z = z.to(dtype)
    confidence = torch.rand(shape[0], 1, *shape[2:])
    confidence[0], confidence[1] = 0, 1
    result = calibrate(z, confidence.to(dtype), torch.ones(9, dtype=dtype), torch.zeros(9, dtype=dtype))
    assert result.dtype == dtype
    assert torch.equal(bits(result), bits(z))


def test_the_literal_form_is_not_the_identity():
    # Why calibrate() isn't written as the paper prints it.
    z, c = torch.randn(64, 10) * 100, torch.rand(64, 1)
    literal = c * (1.0 * z + 0.0) + (1 - c) * z
    assert torch.allclose(literal, z)
    assert not torch.equal(bits(literal), bits(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_calibrated_in_fp32(dtype):
    z = torch.randn(4, 5).to(dtype)
    _, confidence, magnitude, margin = inputs((4, 5), torch.float32)
    result = calibrate(z, confidence, magnitude, margin)
    assert result.dtype == torch.float32
    assert torch.equal(result, calibrate(z.float(), confidence, magnitude, margin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_result_is_rounded_once(dtype):
    arguments = [tensor.to(dtype) for tensor in inputs((64, 5), torch.float32)]
    expected = calibrate(*(tensor.float() for tensor in arguments)).to(dtype)
    assert torch.equal(calibrate(*arguments), expected)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3, 2)])
def test_trailing_columns_pass_through_untouched(shape):
    z = torch.randn(shape)
    z[0, -1] = torch.finfo(torch.float32).max
    confidence = torch.rand(shape[0], 1, *shape[2:])
    magnitude, margin = torch.randn(5), torch.randn(5)
    result = calibrate(z, confidence, magnitude, margin, passthrough=shape[1] - 5)
    assert torch.equal(bits(result[:, 5:]), bits(z[:, 5:]))
    assert torch.equal(result[:, :5], calibrate(z[:, :5], confidence, magnitude, margin))
    assert not torch.equal(result[:, :5], z[:, :5])


@pytest.mark.parametrize(
    ("magnitude", "margin", "passthrough"), [(4, 5, 0), (5, 4, 0), (6, 6, 0), (5, 5, 1), (1, 1, 5), (4, 3, 1)]
)
def test_calibrate_refuses_another_number_of_classes(magnitude, margin, passthrough):
    with pytest.raises(InputError, match="expected magnitude and margin of length"):
        calibrate(torch.randn(2, 5), torch.rand(2, 1), torch.ones(magnitude), torch.zeros(margin), passthrough)


@pytest.mark.parametrize(("shape", "confidence"), [((5, 5), (5,)), ((5, 5, 5, 5), (5, 1))])
def test_calibrate_refuses_a_confidence_that_would_broadcast_wrongly(shape, confidence):
    with pytest.raises(InputError, match="confidence"):
        calibrate(torch.randn(shape), torch.rand(confidence), torch.ones(5), torch.zeros(5))


# ---------------------------------------------------------------------------------------------------- eq. 11


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.8, 1, 1.2, 3.0])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_weights_are_equation_11(rho, normalize):
    counts = [1280, 300, 47, 5, 1]
    total = sum(counts)
    terms = [(1 / (n / total)) ** rho for n in counts]
    expected = np.array(terms) / sum(terms) * (len(counts) if normalize == "mean" else 1)
    weights = generalized_reweight(torch.tensor(counts), rho, normalize)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("rho", [0.5, 1.2])
def test_weights_follow_r_to_the_minus_rho(rho):
    a, b = generalized_reweight(torch.tensor([10, 1000]), rho).tolist()
    assert a / b == pytest.approx(100**rho, rel=1e-6)


@pytest.mark.parametrize("scale", [1, 7, 1e-6])
def test_weights_depend_on_frequencies_only(scale):
    counts = torch.tensor([100.0, 10.0, 1.0])
    torch.testing.assert_close(generalized_reweight(counts * scale, 1.2), generalized_reweight(counts, 1.2))


@pytest.mark.parametrize("k", [1, 3, 7, 1203])
def test_rho_zero_gives_exactly_one_or_one_kth(k):
    counts = torch.arange(1, k + 1)
    assert torch.equal(generalized_reweight(counts, 0), torch.ones(k))
    assert torch.equal(generalized_reweight(counts, 0, "sum"), torch.full((k,), 1 / k))


@pytest.mark.parametrize("rho", [10, 14, 50, 100])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("counts", [[1e9, 1000, 3, 1], [1e12, 1e11, 1e10, 1e9], [0.9, 0.09, 0.01 - 1e-6, 1e-6]])
def test_large_rho_stays_finite(rho, normalize, counts):
    weights = generalized_reweight(torch.tensor(counts), rho, normalize)
    assert weights.isfinite().all()
    assert weights.sum().item() == pytest.approx(4 if normalize == "mean" else 1)


def test_weights_move_with_the_classes():
    counts, order = torch.tensor([500, 3, 70, 12]), torch.tensor([2, 0, 3, 1])
    assert torch.equal(generalized_reweight(counts[order], 1.2), generalized_reweight(counts, 1.2)[order])


def test_a_zero_count_is_refused_and_named():
    with pytest.raises(InputError, match=r"none for class 1, 3; .*zero_count='exclude'"):
        generalized_reweight(torch.tensor([5, 0, 3, 0]), 1.0)


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_an_excluded_class_weighs_nothing_and_stays_out_of_the_normalisation(normalize):
    weights = generalized_reweight(torch.tensor([5, 0, 3]), 1.0, normalize, zero_count="exclude")
    assert weights[1] == 0
    assert torch.equal(weights[[0, 2]], generalized_reweight(torch.tensor([5, 3]), 1.0, normalize))


@pytest.mark.parametrize("counts", [[3, -1], [3, math.nan], [3, math.inf], [0, 0]])
@pytest.mark.parametrize("zero_count", ["error", "exclude"])
def test_senseless_counts_are_refused(counts, zero_count):
    with pytest.raises(InputError, match="finite, not negative and not all zero"):
        generalized_reweight(torch.tensor(counts), 1.0, zero_count=zero_count)


@pytest.mark.parametrize("counts", [torch.tensor([]), torch.tensor(3), torch.ones(2, 2)])
def test_counts_are_one_number_per_class(counts):
    with pytest.raises(InputError, match="one count per class"):
        generalized_reweight(counts, 1.0)


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf, "1.2", None, True])
def test_a_senseless_rho_is_refused(rho):
    with pytest.raises(InputError, match="finite rho >= 0"):
        generalized_reweight(torch.tensor([1, 2]), rho)


@pytest.mark.parametrize("options", [{"normalize": "max"}, {"zero_count": "ignore"}])
def test_an_unknown_weight_option_is_refused(options):
    with pytest.raises(InputError, match="expected normalize 'mean' or 'sum' and zero_count 'error' or 'exclude'"):
        generalized_reweight(torch.tensor([1, 2]), 1.0, **options)


# ---------------------------------------------------------------------------------------------------- eq. 8-10


def loss_in_loops(logits, target, weight, reduction, ignore_index=-100):
    """Eq. 8-10 one label at a time: the loss, and its gradient where the reduction gives a scalar."""
    k = logits.shape[1]
    rows = np.moveaxis(logits, 1, -1).reshape(-1, k)
    labels = target.reshape(-1)
    losses, gradients = np.zeros(len(labels)), np.zeros_like(rows)
    weight_sum = number = 0.0
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        if label == ignore_index:
            continue
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        losses[i] = -weight[label] * math.log(probabilities[label])
        gradients[i] = weight[label] * (probabilities - np.eye(k)[label])
        weight_sum += weight[label]
        number += 1
    divisor = {"weighted_mean": weight_sum, "mean": number}.get(reduction, 1.0) or 1.0
    gradients = np.moveaxis((gradients / divisor).reshape(*target.shape, k), -1, 1)
    if reduction == "none":
        return losses.reshape(target.shape), gradients
    return losses.sum() / divisor, gradients


def batch(shape, ignore_index=-100, dtype=torch.float64):
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target[0] = ignore_index
    weight = torch.rand(shape[1]) + 0.1
    return logits, target, weight


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 2, 3)])
def test_the_loss_is_equation_8_to_10(reduction, ignore_index, shape):
    logits, target, weight = batch(shape, ignore_index)
    logits.requires_grad_()
    loss = grw_cross_entropy(logits, target, weight, reduction, ignore_index)
    loss.sum().backward()
    expected, gradient = loss_in_loops(
        logits.detach().numpy(), target.numpy(), weight.double().numpy(), reduction, ignore_index
    )
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum"])
def test_the_loss_passes_gradcheck(reduction):
    logits, target, weight = batch((4, 3))
    function = lambda z: grw_cross_entropy(z, target, weight.double(), reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum", "none"])
def test_half_precision_logits_are_taken_and_computed_in_fp32(dtype, reduction):
    logits, target, weight = batch((6, 4), dtype=dtype)
    logits.requires_grad_()
    loss = grw_cross_entropy(logits, target, weight, reduction)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, grw_cross_entropy(logits.detach().float(), target, weight, reduction))
    loss.sum().backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 2, 2)])
def test_an_empty_batch_gives_zero_and_a_graph(reduction, shape):
    logits = torch.zeros(shape, requires_grad=True)
    loss = grw_cross_entropy(logits, torch.zeros((0, *shape[2:]), dtype=torch.long), torch.ones(4), reduction)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == shape


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 2, 2)])
def test_an_all_ignored_batch_gives_zero_and_zero_gradients(reduction, dtype, shape):
    logits = torch.randn(shape).to(dtype).requires_grad_()
    loss = grw_cross_entropy(logits, torch.full((shape[0], *shape[2:]), 255), torch.ones(4), reduction, 255)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_given_denominator_divides_the_sum():
    logits, target, weight = batch((6, 4))
    total = grw_cross_entropy(logits, target, weight, "sum")
    for reduction in ("weighted_mean", "mean", "sum"):
        loss = grw_cross_entropy(logits, target, weight, reduction, denominator=40)
        torch.testing.assert_close(loss, total / 40)


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_the_denominators_count_what_is_valid(ignore_index):
    target = torch.tensor([[0, 2], [ignore_index, 2]])
    weight = torch.tensor([1.0, 10.0, 100.0])
    assert grw_denominator(target, weight, "weighted_mean", ignore_index) == 201
    assert grw_denominator(target, weight, "mean", ignore_index) == 3


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 2, 3)])
def test_rho_zero_is_plain_cross_entropy(shape):
    logits, target, _ = batch(shape, dtype=torch.float32)
    counts = torch.tensor([100, 20, 5, 1])
    plain = F.cross_entropy(logits, target)
    of_mean, of_sum = (generalized_reweight(counts, 0, normalize) for normalize in ("mean", "sum"))
    for weight in (of_mean, of_sum):
        torch.testing.assert_close(grw_cross_entropy(logits, target, weight, "weighted_mean"), plain)
    torch.testing.assert_close(grw_cross_entropy(logits, target, of_mean, "mean"), plain)
    torch.testing.assert_close(grw_cross_entropy(logits, target, of_sum, "mean"), plain / 4)


def test_the_weighted_mean_is_torchs_own():
    logits, target, weight = batch((7, 4), dtype=torch.float32)
    expected = F.cross_entropy(logits, target, weight=weight)
    torch.testing.assert_close(grw_cross_entropy(logits, target, weight, "weighted_mean"), expected)


@pytest.mark.parametrize("weight", [1e-6, 0.5, 1e6])
def test_the_weighted_mean_of_one_label_is_its_cross_entropy(weight):
    logits, target = torch.randn(1, 2), torch.tensor([0])
    loss = grw_cross_entropy(logits, target, torch.tensor([weight, 1.0]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum"])
def test_the_order_of_the_classes_does_not_matter(reduction):
    logits, target, weight = batch((7, 4))
    order = torch.tensor([2, 0, 3, 1])
    renamed = target.clone()
    renamed[1:] = order.argsort()[target[1:]]
    loss = grw_cross_entropy(logits, target, weight, reduction)
    torch.testing.assert_close(grw_cross_entropy(logits[:, order], renamed, weight[order], reduction), loss)


@pytest.mark.parametrize("rho", [1.2, 10, 12.5, 14, 100])
@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
def test_a_batch_of_head_classes_has_finite_gradients_at_any_rho(rho, reduction):
    # Their weights vanish in fp32: neither 1 / sum(w) nor its gradient may overflow.
    weight = generalized_reweight(torch.tensor([1280, 1]), rho)
    logits = torch.randn(3, 2, requires_grad=True)
    loss = grw_cross_entropy(logits, torch.zeros(3, dtype=torch.long), weight, reduction)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("label", [-1, 4, 255])
def test_a_label_out_of_range_is_refused(label):
    with pytest.raises(InputError, match=rf"labels in \[0, 4\) or ignore_index -100, got {label}; check the annot"):
        grw_cross_entropy(torch.randn(2, 4), torch.tensor([0, label]), torch.ones(4))


def test_the_wrong_number_of_weights_is_refused():
    with pytest.raises(InputError, match=r"expected 4 class weights .*got \(3,\); do the class counts belong"):
        grw_cross_entropy(torch.randn(2, 4), torch.tensor([0, 1]), torch.ones(3))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(InputError, match="reduction among weighted_mean, mean, sum, none, got 'avg'"):
        grw_cross_entropy(torch.randn(2, 4), torch.tensor([0, 1]), torch.ones(4), "avg")


# ------------------------------------------------------------------------------------------------ dtypes of labels

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64, torch.bool]


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_labels_of_every_whole_dtype_give_the_same_loss(dtype, reduction):
    # As many samples as classes: uint8 labels would choose among the weights as a mask does.
    logits, weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.0, 4.0])
    labels = torch.tensor([1, 0, 1]) if dtype == torch.bool else torch.tensor([2, 0, 1])
    expected = grw_cross_entropy(logits, labels, weight, reduction)
    assert torch.equal(grw_cross_entropy(logits, labels.to(dtype), weight, reduction), expected)
    by_hand = weight[labels] * -logits.log_softmax(1)[range(3), labels]
    torch.testing.assert_close(
        expected.sum(), by_hand.sum() / {"weighted_mean": weight[labels].sum(), "mean": 3}.get(reduction, 1)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_wrong_label_of_any_dtype_is_refused(dtype):
    with pytest.raises(InputError, match=r"expected labels in \[0, 3\)"):
        grw_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3], dtype=dtype), torch.ones(3))


def test_a_balanced_background_weighs_as_much_as_the_classes_on_average():
    counts = torch.tensor([900, 90, 9, 1])
    weight = class_weights(counts, 0.8, background_weight="balanced")
    examples = [label for label, count in enumerate(counts.tolist()) for _ in range(count)]
    assert float(weight[-1]) == pytest.approx(sum(float(weight[label]) for label in examples) / 1000, rel=1e-5)
    assert torch.equal(weight[:-1], generalized_reweight(counts, 0.8))
    assert class_weights(counts, 0.0, background_weight="balanced").tolist() == [1.0] * 5


@pytest.mark.parametrize("value", [-1.0, float("nan"), "even", None])
def test_a_background_weight_that_is_none_is_refused(value):
    with pytest.raises(InputError, match="expected a finite background weight >= 0, or 'balanced', got"):
        check_background_weight(value)
