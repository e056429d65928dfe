import numpy as np
import pytest
import torch

from disalign import InputError
from disalign_cls.samplers import PowerSampler, ProgressivelyBalancedSampler

from .runs import BASELINE, runner

COUNTS = [160, 80, 40, 0, 20]


class Labels:
    """All that a sampler needs of a dataset, in a mixed order."""

    def __init__(self, counts):
        self.class_counts = torch.tensor(counts)
        self.labels = torch.arange(len(counts)).repeat_interleave(self.class_counts)
        self.labels = self.labels[torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))]

    def __len__(self):
        return len(self.labels)


def expected(counts, q):
    counts = np.array(counts, dtype=np.float64)
    powers = np.where(counts > 0, counts**q, 0)
    return powers / powers.sum()


def drawn(dataset, orders):
    """Share of each class among the images drawn."""
    labels = dataset.labels[torch.tensor([index for order in orders for index in order])]
    return torch.bincount(labels, minlength=len(dataset.class_counts)) / len(labels)


def epochs(sampler, number):
    for epoch in range(number):
        sampler.set_epoch(epoch)
        yield list(sampler)


@pytest.mark.parametrize("q", [1, 0.5, 0])
def test_classes_are_drawn_like_their_counts_to_the_q(q):
    dataset = Labels(COUNTS)
    sampler = PowerSampler(dataset, q=q, seed=0)
    np.testing.assert_allclose(sampler.class_probabilities(), expected(COUNTS, q), rtol=1e-12)
    # 15,000 draws: five standard deviations are 0.02.
    np.testing.assert_allclose(drawn(dataset, epochs(sampler, 50)), expected(COUNTS, q), atol=0.02)


def test_images_of_one_class_are_drawn_alike():
    dataset = Labels([8, 2])
    times = torch.bincount(
        torch.tensor([i for order in epochs(PowerSampler(dataset, q=0, seed=0), 2000) for i in order])
    )
    # 20,000 draws, half of them for either class: 1,250 and 5,000 for each image.
    np.testing.assert_allclose(times, torch.where(dataset.labels == 0, 1250, 5000), rtol=0.1)


@pytest.mark.parametrize("counts", [COUNTS, [10, 10, 10]])
def test_instance_balanced_visits_each_image_once(counts):
    dataset = Labels(counts)
    for order in epochs(PowerSampler(dataset, q=1, seed=0), 3):
        assert sorted(order) == list(range(len(dataset)))


@pytest.mark.parametrize(("epoch", "share"), [(0, 0), (5, 0.5), (9, 0.9)])
def test_progressively_balanced_goes_from_instances_to_classes(epoch, share):
    dataset = Labels(COUNTS)
    sampler = ProgressivelyBalancedSampler(dataset, max_epochs=10, seed=0)
    sampler.set_epoch(epoch)
    p = (1 - share) * expected(COUNTS, 1) + share * expected(COUNTS, 0)
    np.testing.assert_allclose(sampler.class_probabilities(), p, rtol=1e-12)
    orders = []
    for seed in range(30):
        sampler.seed = 1000 * seed
        orders.append(list(sampler))
    np.testing.assert_allclose(drawn(dataset, orders), p, atol=0.03)


def test_progressively_balanced_starts_with_each_image_once():
    dataset = Labels(COUNTS)
    assert sorted(ProgressivelyBalancedSampler(dataset, max_epochs=4, seed=0)) == list(range(len(dataset)))


def of_ranks(monkeypatch, world_size, build):
    for rank in range(world_size):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda rank=rank: (rank, world_size))
        yield build()


@pytest.mark.parametrize("counts", [COUNTS, [7, 3, 1]], ids=["even", "odd"])
@pytest.mark.parametrize("q", [1, 0])
def test_ranks_share_one_order_in_equal_parts(monkeypatch, q, counts):
    dataset = Labels(counts)
    parts = [list(sampler) for sampler in of_ranks(monkeypatch, 2, lambda: PowerSampler(dataset, q=q, seed=3))]
    lengths = [len(sampler) for sampler in of_ranks(monkeypatch, 2, lambda: PowerSampler(dataset, q=q, seed=3))]
    half = -(-len(dataset) // 2)
    assert lengths == [len(part) for part in parts] == [half, half]
    order = [index for pair in zip(*parts, strict=True) for index in pair]
    if q == 1:
        # The one order visits each image once; an odd one is rounded up with its own first.
        assert sorted(order[: len(dataset)]) == list(range(len(dataset)))
        assert order[len(dataset) :] == order[: len(order) - len(dataset)]
    else:
        assert parts[0] != parts[1]
    if len(dataset) % 2 == 0:
        (alone,) = of_ranks(monkeypatch, 1, lambda: PowerSampler(dataset, q=q, seed=3))
        assert order == list(alone)


def test_ranks_together_follow_the_probabilities(monkeypatch):
    dataset = Labels(COUNTS)
    ranks = list(of_ranks(monkeypatch, 2, lambda: PowerSampler(dataset, q=0, seed=0)))
    for part in ranks:
        np.testing.assert_allclose(drawn(dataset, epochs(part, 50)), expected(COUNTS, 0), atol=0.03)


@pytest.mark.parametrize("q", [1, 0.5])
def test_seed_and_epoch_fix_the_order(q):
    def order(seed, epoch):
        sampler = PowerSampler(Labels(COUNTS), q=q, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(7, 0)


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_q_outside_zero_and_one_is_refused(q):
    with pytest.raises(InputError, match=rf"expected q in \[0, 1\] .*, got {q}"):
        PowerSampler(Labels(COUNTS), q=q)


def test_a_run_without_epochs_is_refused():
    with pytest.raises(InputError, match="expected max_epochs >= 1, got 0"):
        ProgressivelyBalancedSampler(Labels(COUNTS), max_epochs=0)


def test_the_runner_sets_the_epochs(tmp_path, monkeypatch):
    seen = []
    iterate = PowerSampler.__iter__
    monkeypatch.setattr(PowerSampler, "__iter__", lambda self: seen.append((self.epoch, self.seed)) or iterate(self))
    sampler = dict(type="ProgressivelyBalancedSampler", max_epochs=3, _delete_=True)
    run = runner(BASELINE["linear"], tmp_path, epochs=3, **{"train_dataloader.sampler": sampler, "randomness.seed": 5})
    run.train()
    assert seen == [(0, 5), (1, 5), (2, 5)]


def test_small_probabilities_are_not_taken_for_equal_ones(monkeypatch):
    # Each image's is below 1e-8 in a set of 100 million: less than the tolerance that comparisons have by default.
    sampler = PowerSampler(Labels([400, 100]), q=0.0, seed=0)
    balanced = sampler.class_probabilities()
    monkeypatch.setattr(sampler, "class_probabilities", lambda: balanced * 1e-6)
    drawn = torch.bincount(sampler.dataset.labels[list(sampler)], minlength=2)
    assert drawn[1] > 200
