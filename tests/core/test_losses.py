"""The loss module: its weights, its metadata, and the global denominator under DDP."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disalign import GRWCrossEntropyLoss, InputError, generalized_reweight, grw_cross_entropy

COUNTS = [50, 10, 2]
REDUCTIONS = ["weighted_mean", "mean", "sum", "none"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)])
def test_the_module_equals_the_function(reduction, normalize, shape):
    logits = torch.randn(shape)
    target = torch.randint(3, (shape[0], *shape[2:]))
    target[0] = 255
    loss = GRWCrossEntropyLoss(COUNTS, 0.8, reduction=reduction, ignore_index=255, normalize=normalize)
    weight = generalized_reweight(torch.tensor(COUNTS), 0.8, normalize)
    assert torch.equal(loss(logits, target), grw_cross_entropy(logits, target, weight, reduction, 255))


def test_the_default_is_the_official_classification_loss():
    loss = GRWCrossEntropyLoss(COUNTS)
    assert torch.equal(loss.weight, generalized_reweight(torch.tensor(COUNTS), 1.2, "mean"))
    assert loss.reduction == "weighted_mean"


def test_a_checkpoint_holds_no_weights_and_cannot_override_rho():
    trained, other = GRWCrossEntropyLoss(COUNTS, rho=0.2), GRWCrossEntropyLoss(COUNTS, rho=2.0)
    before = other.weight.clone()
    assert trained.state_dict() == {}
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.weight, before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({"weight": trained.weight})


def test_the_weights_follow_the_module_to_its_device():
    assert GRWCrossEntropyLoss(COUNTS).to("meta").weight.device.type == "meta"


def test_metadata_says_how_the_counts_became_weights():
    loss = GRWCrossEntropyLoss(COUNTS, 0.8, reduction="mean", normalize="sum")
    assert loss.metadata() == {
        "class_counts": COUNTS,
        "rho": 0.8,
        "normalize": "sum",
        "zero_count": "error",
        "reduction": "mean",
        "ignore_index": -100,
        "sync": True,
        "background_weight": None,
    }


def test_the_background_is_one_more_class_behind_the_counted_ones():
    loss = GRWCrossEntropyLoss(COUNTS, 0.8, background_weight=6.0)
    expected = [count**-0.8 for count in COUNTS]
    expected = [3 * weight / sum(expected) for weight in expected] + [6.0]
    torch.testing.assert_close(loss.weight, torch.tensor(expected))
    scores, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    logs = scores.double().log_softmax(dim=1)
    summed = sum(-expected[label] * logs[row, label] for row, label in enumerate(target.tolist()))
    assert loss(scores, target).item() == pytest.approx(summed.item() / (sum(expected) + 6.0), rel=1e-5)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_background_weight_that_is_none_is_refused(weight):
    with pytest.raises(InputError, match="background weight"):
        GRWCrossEntropyLoss(COUNTS, background_weight=weight)


def test_counts_may_come_later():
    loss = GRWCrossEntropyLoss(rho=0.8)
    assert loss.metadata()["class_counts"] is None
    with pytest.raises(InputError, match=r"expected class counts before the first loss.*set_class_counts"):
        loss(torch.randn(2, 3), torch.tensor([0, 1]))
    loss.set_class_counts(COUNTS)
    assert torch.equal(loss.weight, GRWCrossEntropyLoss(COUNTS, 0.8).weight)


def test_later_counts_replace_the_weights():
    loss = GRWCrossEntropyLoss(COUNTS)
    loss.set_class_counts([1, 2])
    assert torch.equal(loss.weight, GRWCrossEntropyLoss([1, 2]).weight)


def test_the_zero_count_policy_is_passed_on():
    with pytest.raises(InputError, match="none for class 1"):
        GRWCrossEntropyLoss([3, 0])
    assert GRWCrossEntropyLoss([3, 0], zero_count="exclude").weight.tolist() == [1, 0]


def test_only_counts_and_rho_go_by_position():
    # Core and segmentation once had another order behind them.
    with pytest.raises(TypeError, match="positional argument"):
        GRWCrossEntropyLoss(COUNTS, 0.8, "mean")


def test_an_unknown_reduction_is_refused_at_once():
    with pytest.raises(InputError, match="expected a reduction among"):
        GRWCrossEntropyLoss(COUNTS, reduction="avg")


def test_a_bad_label_gets_the_same_sentence_in_distributed_training(process_group):
    with pytest.raises(InputError, match=r"labels in \[0, 3\)"):
        GRWCrossEntropyLoss(COUNTS)(torch.randn(2, 3), torch.tensor([0, 7]))


# ------------------------------------------------------------------------------------------ two real processes

# Labels of rank 0 and of rank 1; -100 is ignored.
SHARES = {
    "unequal valid labels": ([0, -100, -100, 1, -100], [2, 0, 1]),
    "an empty rank": ([0, 1, 2, 2], []),
    "an all-ignored rank": ([-100, -100], [0, 1, 2]),
    "nothing valid at all": ([-100], [-100, -100]),
}
MEANS = ["weighted_mean", "mean"]


def data(labels):
    """One feature per label, the same wherever it lands."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(part), 4, generator=generator, dtype=torch.float64) for part in labels], [
        torch.tensor(part, dtype=torch.long) for part in labels
    ]


def linear():
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 12).view(3, 4))
        model.bias.zero_()
    return model


def gradient(model, loss, x, y):
    loss(model(x), y).backward()
    return next(model.parameters()).grad.clone()


def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {}
    for share, labels in SHARES.items():
        xs, ys = data(labels)
        for reduction in MEANS:
            for sync in (True, False):
                loss = GRWCrossEntropyLoss(COUNTS, 1.0, reduction=reduction, sync=sync)
                model = DistributedDataParallel(linear())
                found[share, reduction, sync] = gradient(model, loss, xs[rank], ys[rank])

    # Only rank 0 evaluates: had these calls joined a reduction, the sums below would be wrong, or wait for ever.
    loss = GRWCrossEntropyLoss(COUNTS, 1.0)
    xs, ys = data(SHARES["unequal valid labels"])
    if rank == 0:
        found["evaluated"] = [loss.eval()(linear()(xs[0]), ys[0]).item()]
        with torch.no_grad():
            found["evaluated"].append(loss.train()(linear()(xs[0]), ys[0]).item())
    found["after evaluation"] = gradient(DistributedDataParallel(linear()), loss.train(), xs[rank], ys[rank])
    torch.save(found, f"{results}{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder / "store"), str(folder / "rank")), nprocs=2)
    return [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


def alone(share, reduction):
    xs, ys = data(SHARES[share])
    return gradient(linear(), GRWCrossEntropyLoss(COUNTS, 1.0, reduction=reduction), torch.cat(xs), torch.cat(ys))


@pytest.mark.parametrize("reduction", MEANS)
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_have_the_gradient_of_one(two_processes, share, reduction):
    expected = alone(share, reduction)
    assert expected.any() == (share != "nothing valid at all")
    for found in two_processes:
        torch.testing.assert_close(found[share, reduction, True], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", MEANS)
@pytest.mark.parametrize("share", SHARES)
def test_without_sync_each_rank_divides_by_its_own_denominator(two_processes, share, reduction):
    xs, ys = data(SHARES[share])
    loss = GRWCrossEntropyLoss(COUNTS, 1.0, reduction=reduction)
    own = [gradient(linear(), loss, x, y) for x, y in zip(xs, ys, strict=True)]
    expected = (own[0] + own[1]) / 2
    for found in two_processes:
        torch.testing.assert_close(found[share, reduction, False], expected, rtol=1e-6, atol=1e-9)


def test_sync_matters_for_unequal_ranks(two_processes):
    found = two_processes[0]
    together, apart = (found["unequal valid labels", "weighted_mean", sync] for sync in (True, False))
    assert not torch.allclose(together, apart, rtol=1e-3)


def test_a_rank_that_evaluates_waits_for_nobody(two_processes):
    xs, ys = data(SHARES["unequal valid labels"])
    own = GRWCrossEntropyLoss(COUNTS, 1.0)(linear()(xs[0]), ys[0]).item()
    assert two_processes[0]["evaluated"] == pytest.approx([own, own])
    for found in two_processes:
        expected = alone("unequal valid labels", "weighted_mean")
        torch.testing.assert_close(found["after evaluation"], expected, rtol=1e-6, atol=1e-9)


def test_soft_labels_are_refused_in_a_sentence():
    loss = GRWCrossEntropyLoss([5, 3, 1])
    with pytest.raises(InputError, match=r"expected one whole label per sample, got torch.float32 of shape \(2, 3\); "):
        loss(torch.zeros(2, 3), torch.full((2, 3), 1 / 3))
