"""The demo's pure parts; the whole of it takes a minute."""

from disalign_cls.demo import by_rank


def test_from_many_images_to_few_all_that_belongs_to_a_class_moves_with_it():
    counts = [5, 80, 1, 30, 100, 2, 60, 10, 40, 20]
    method = {"per_class": {"accuracy": [n + 0.5 for n in counts]}, "margin": [-n for n in counts], "figures": {"x": 1}}
    found = by_rank(
        {"class_counts": counts, "group_of": [f"g{n}" for n in counts], "runs": [{"methods": {"a": method}}]}
    )
    ranks = [100, 80, 60, 40, 30, 20, 10, 5, 2, 1]
    assert found["class_counts"] == ranks
    assert found["group_of"] == [f"g{n}" for n in ranks]
    (moved,) = (run["methods"]["a"] for run in found["runs"])
    assert moved["per_class"]["accuracy"] == [n + 0.5 for n in ranks]
    assert moved["margin"] == [-n for n in ranks]
    assert "magnitude" not in moved
