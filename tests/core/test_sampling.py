"""A part of a training set: who is drawn, and how often."""

import math

import pytest
import torch

from disalign import InputError
from disalign.sampling import inclusion_probabilities, repeat_factors, seed_of, systematic_sample

FACTORS = torch.tensor([1.0, 1.0, 1.5, 3.0, 10.0, 1.0, 2.0])


def test_repeat_factors_by_hand():
    # Of 4 images class 0 is in 3, class 1 in 2, class 2 in 1.
    found = repeat_factors([{0, 1}, [0, 0], {0, 1, 2}, []], threshold=0.5)
    assert found.tolist() == pytest.approx([1, 1, math.sqrt(0.5 / 0.25), 1])


@pytest.mark.parametrize("number", range(1, 8))
def test_probabilities_sum_to_the_number_and_follow_the_factors(number):
    found = inclusion_probabilities(FACTORS, number)
    assert float(found.sum()) == pytest.approx(number)
    assert (found > 0).all()
    assert (found <= 1).all()
    below = found < 1
    ratios = found[below] / FACTORS[below]
    assert ratios.tolist() == pytest.approx([float(ratios[0])] * len(ratios) if len(ratios) else [])
    if below.any():  # who is sure would be above 1 at the common ratio
        assert (FACTORS[~below] * float(ratios[0]) >= 1 - 1e-12).all()


def test_more_than_there_are_is_all_of_them():
    assert inclusion_probabilities(FACTORS, 100).tolist() == [1] * 7
    assert systematic_sample(torch.ones(7)).tolist() == [*range(7)]


@pytest.mark.parametrize("number", [0, -3])
def test_no_images_are_refused(number):
    with pytest.raises(InputError, match="expected 1 or more images"):
        inclusion_probabilities(FACTORS, number)


def test_each_image_is_drawn_as_often_as_its_probability_says():
    probabilities = inclusion_probabilities(FACTORS, 3)
    draws = [systematic_sample(probabilities, seed) for seed in range(4000)]
    assert {len(drawn) for drawn in draws} == {3}
    shares = torch.bincount(torch.cat(draws), minlength=7) / 4000
    torch.testing.assert_close(shares, probabilities.float(), rtol=0, atol=0.03)
    assert all(drawn.tolist() == sorted(set(drawn.tolist())) for drawn in draws)


def test_sums_over_a_sample_are_unbiased():
    values = torch.tensor([5.0, -2.0, 3.0, 8.0, 1.0, 0.5, 7.0]).double()
    probabilities = inclusion_probabilities(FACTORS, 3)
    sums = [(values / probabilities)[systematic_sample(probabilities, seed)].sum() for seed in range(4000)]
    assert float(torch.stack(sums).mean()) == pytest.approx(float(values.sum()), abs=0.5)


def test_one_seed_one_sample():
    probabilities = torch.full((1000,), 0.1)
    first, second, other = (systematic_sample(probabilities, seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(first) == 100


def test_seeds_of_items_are_their_own():
    found = {seed_of(seed, item) for seed in range(20) for item in range(50)}
    assert len(found) == 1000
    assert all(0 <= seed < 2**32 for seed in found)
    assert seed_of(10**30, 3) == seed_of(10**30, 3)
    with pytest.raises(InputError, match="expected a seed >= 0, got -1"):
        seed_of(-1, 0)
