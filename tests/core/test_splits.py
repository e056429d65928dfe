"""Groups of classes, their boundaries, and means over them."""

import math

import pytest
import torch

from disalign import InputError, frequent_common_rare, group_means, head_body_tail, many_medium_few


def named(groups):
    """One group name per class; a class in no group or in two fails."""
    table = torch.stack(list(groups.values()))
    assert (table.sum(0) == 1).all()
    return [list(groups)[row] for row in table.int().argmax(0).tolist()]


# One class at a time, one below each threshold, on it and one above it.


@pytest.mark.parametrize(
    ("images", "group"),
    [(0, "few"), (19, "few"), (20, "medium"), (21, "medium"), (99, "medium"), (100, "medium"), (101, "many")],
)
def test_many_is_above_100_images_and_few_below_20(images, group):
    assert named(many_medium_few([images])) == [group]


@pytest.mark.parametrize(
    ("images", "group"), [(5, "few"), (6, "medium"), (7, "medium"), (29, "medium"), (30, "medium"), (31, "many")]
)
def test_the_thresholds_of_many_and_few_are_arguments(images, group):
    assert named(many_medium_few([images], many=30, few=6)) == [group]


@pytest.mark.parametrize(
    ("images", "group"), [(0, "r"), (9, "r"), (10, "r"), (11, "c"), (20, "c"), (99, "c"), (100, "c"), (101, "f")]
)
def test_frequent_is_above_100_images_and_rare_at_most_10(images, group):
    assert named(frequent_common_rare([images])) == [group]


@pytest.mark.parametrize(("images", "group"), [(1, "r"), (2, "r"), (3, "c"), (4, "c"), (5, "c"), (6, "f")])
def test_the_thresholds_of_frequent_and_rare_are_arguments(images, group):
    assert named(frequent_common_rare([images], frequent=5, rare=2)) == [group]


def test_equal_thresholds_leave_one_count_or_none_between_them():
    assert named(many_medium_few([19, 20, 21], many=20, few=20)) == ["few", "medium", "many"]
    assert named(frequent_common_rare([10, 11], frequent=11, rare=10)) == ["r", "c"]


@pytest.mark.parametrize(
    ("pixels", "group"),
    [(0, "tail"), (99, "tail"), (100, "tail"), (101, "body"), (999, "body"), (1_000, "body"), (1_001, "head")],
)
def test_head_is_above_one_percent_of_the_pixels_and_tail_at_most_a_tenth(pixels, group):
    counts = [pixels, 100_000 - pixels]
    for classes in (counts, torch.tensor(counts), [n / 100_000 for n in counts], torch.tensor(counts) / 100_000):
        assert named(head_body_tail(classes)) == [group, "head"]
    assert named(head_body_tail([pixels], total=100_000)) == [group]


def test_the_thresholds_of_head_and_tail_are_arguments():
    assert named(head_body_tail([0.5, 0.3, 0.2], head=0.4, tail=0.25)) == ["head", "body", "tail"]


def test_pixel_counts_are_turned_into_shares():
    pixels = [9_000_000, 90_000, 9_000, 901_000]
    assert named(head_body_tail(pixels)) == ["head", "body", "tail", "head"]
    assert named(head_body_tail(torch.tensor(pixels, dtype=torch.int64))) == ["head", "body", "tail", "head"]


def test_a_total_may_count_unlabelled_pixels_too():
    assert named(head_body_tail([500, 500])) == ["head", "head"]
    assert named(head_body_tail([500, 500], total=200_000)) == ["body", "body"]


@pytest.mark.parametrize(
    "call", [lambda: many_medium_few([1], many=10, few=20), lambda: frequent_common_rare([1], frequent=5, rare=10)]
)
def test_crossed_thresholds_are_refused(call):
    with pytest.raises(InputError, match="lower threshold at or below the upper"):
        call()


def test_bad_counts_are_refused():
    with pytest.raises(InputError, match="whole numbers"):
        many_medium_few([1, -1])


GROUPS = {
    "many": torch.tensor([True, True, False, False]),
    "medium": torch.tensor([False, False, True, True]),
    "few": torch.zeros(4, dtype=torch.bool),
}


def test_group_means_are_means_over_classes():
    means = group_means([0.2, 0.4, 1.0, 0.0], GROUPS)
    assert means["many"] == pytest.approx(0.3)
    assert means["medium"] == pytest.approx(0.5)


def test_an_empty_group_is_not_available():
    assert group_means([0.2, 0.4, 1.0, 0.0], GROUPS)["few"] is None


def test_a_class_that_was_not_evaluated_does_not_count():
    means = group_means([0.2, math.nan, math.nan, math.nan], GROUPS)
    assert means["many"] == pytest.approx(0.2)
    assert means["medium"] is None


def test_values_of_another_number_of_classes_are_refused():
    with pytest.raises(InputError, match="expected 3 classes in group 'many', got 4"):
        group_means([0.1, 0.2, 0.3], GROUPS)
