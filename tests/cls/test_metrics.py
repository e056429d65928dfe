import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

from disalign.report import table
from disalign_cls.classifiers import _best_five
from disalign_cls.metrics import COLUMNS, LongTailAccuracy

K = 7
COUNTS = [200, 120, 100, 60, 20, 19, 3]
GROUPS = {"many": [0, 1], "medium": [2, 3, 4], "few": [5, 6]}


def scored(images=300, classes=range(K)):
    """Labels, and scores that favour them and the first classes: wrong in ways that differ between the classes."""
    labels = torch.tensor(list(classes)).repeat(images)[:images]
    scores = torch.randn(images, K) + 2.0 * torch.nn.functional.one_hot(labels, K) - 0.3 * torch.arange(K)
    return labels, scores


def evaluated(labels, meta=None, options=None, **scores):
    """The metrics and the report, given in two batches."""
    metric = LongTailAccuracy(**{"class_counts": COUNTS} | (options or {}))
    metric.dataset_meta = {"dataset": "toy", "split": "test", "classes": None} if meta is None else meta
    for part in (slice(0, 100), slice(100, None)):
        metric.process(None, _best_five(labels[part], **{name: z[part] for name, z in scores.items()}))
    return metric.evaluate(len(labels)), metric.report


def per_class(labels, scores):
    """Accuracy of each class in percent, one image at a time."""
    right, seen = [0] * K, [0] * K
    for label, row in zip(labels.tolist(), scores.tolist(), strict=True):
        seen[label] += 1
        right[label] += row.index(max(row)) == label
    return [100 * hits / number if number else None for hits, number in zip(right, seen, strict=True)]


def mean(values):
    return sum(values) / len(values)


def test_figures_equal_scikit_learns():
    labels, scores = scored()
    metrics, report = evaluated(labels, top=scores)
    predicted = scores.argmax(1)
    expected = {
        "top1": accuracy_score(labels, predicted),
        "top5": top_k_accuracy_score(labels, scores, k=5, labels=range(K)),
        "balanced": balanced_accuracy_score(labels, predicted),
        "f1": f1_score(labels, predicted, average="macro"),
    }
    assert len(set(expected.values())) == 4
    for name, value in expected.items():
        assert metrics[f"test/{name}"] == pytest.approx(100 * value, abs=1e-9)
        assert report["figures"][name] == metrics[f"test/{name}"]


def test_groups_are_means_of_the_classes_accuracies():
    labels, scores = scored()
    metrics, report = evaluated(labels, top=scores)
    accuracy = per_class(labels, scores)
    assert report["per_class"]["accuracy"] == pytest.approx(accuracy)
    for group, members in GROUPS.items():
        assert metrics[f"test/{group}"] == pytest.approx(mean([accuracy[j] for j in members]))


def test_the_thresholds_of_the_groups_are_arguments():
    labels, scores = scored()
    metrics, report = evaluated(labels, options={"many": 150, "few": 4}, top=scores)
    accuracy = per_class(labels, scores)
    assert metrics["test/many"] == pytest.approx(accuracy[0])
    assert metrics["test/few"] == pytest.approx(accuracy[6])
    assert report["groups"] == {"many": "> 150 training images", "few": "< 4"}


def test_a_group_without_classes_is_left_out_null_and_not_available():
    labels, scores = scored()
    metrics, report = evaluated(labels, options={"class_counts": [500] * K}, top=scores)
    assert {"test/medium", "test/few"}.isdisjoint(metrics)
    assert report["figures"]["medium"] is report["figures"]["few"] is None
    row = table(report, COLUMNS).splitlines()[-1].split()
    assert row[-2:] == ["n/a", "n/a"]
    assert row[-3] != "n/a"


def test_a_class_without_images_has_no_accuracy_and_does_not_count():
    labels, scores = scored(classes=[0, 1, 2, 3, 4, 6])
    metrics, report = evaluated(labels, top=scores)
    accuracy = per_class(labels, scores)
    assert accuracy[5] is None
    assert report["per_class"]["accuracy"][5] is None
    assert metrics["test/few"] == pytest.approx(accuracy[6])
    assert metrics["test/balanced"] == pytest.approx(mean([value for value in accuracy if value is not None]))
    present = sorted(set(labels.tolist()))
    expected = f1_score(labels.numpy(), scores.argmax(1).numpy(), labels=present, average="macro")
    assert metrics["test/f1"] == pytest.approx(100 * expected)


def test_every_metric_names_its_split():
    labels, scores = scored()
    metrics, report = evaluated(labels, meta={"dataset": "toy", "split": "dev"}, top=scores)
    assert {name.split("/")[0] for name in metrics} == {"dev"}
    assert report["split"] == "dev"


def test_stage_ones_figures_are_those_of_its_own_scores():
    labels, before = scored()
    after = before + 0.4 * torch.arange(K)
    metrics, report = evaluated(labels, top=after, stage_one=before)
    alone, alone_report = evaluated(labels, top=before)
    assert report["stage_one"] == {"figures": alone_report["figures"], "per_class": alone_report["per_class"]}
    assert {name.replace("stage_one_", ""): value for name, value in metrics.items() if "stage_one" in name} == alone
    assert metrics["test/top1"] == evaluated(labels, top=after)[0]["test/top1"] != alone["test/top1"]


def test_the_table_shows_stage_one_disalign_and_the_gain():
    labels, before = scored()
    _, report = evaluated(labels, top=before + 0.4 * torch.arange(K), stage_one=before)
    *_, one, two, gain = (line.split() for line in table(report, COLUMNS).splitlines())
    assert (one[:2], two[0], gain[0]) == (["stage", "one"], "DisAlign", "gain")
    for name, b, a, g in zip(("top1", "top5", "balanced"), one[2:], two[1:], gain[1:], strict=False):
        assert float(b) == pytest.approx(report["stage_one"]["figures"][name], abs=0.051)
        assert float(a) == pytest.approx(report["figures"][name], abs=0.051)
        gained = report["figures"][name] - report["stage_one"]["figures"][name]
        assert float(g) == pytest.approx(gained, abs=0.051)


def test_stage_ones_figures_can_be_switched_off():
    labels, scores = scored()
    metrics, report = evaluated(labels, options={"stage_one": False}, top=scores, stage_one=scores)
    assert "stage_one" not in report
    assert not any("stage_one" in name for name in metrics)


def test_without_counts_there_are_no_groups():
    labels, scores = scored()
    metrics, report = evaluated(labels, options={"class_counts": None}, top=scores)
    assert metrics["test/top1"] == 100 * accuracy_score(labels, scores.argmax(1))
    assert {"test/many", "test/medium", "test/few"}.isdisjoint(metrics)
    assert report["class_counts"] is None


def test_fewer_than_five_classes_are_all_among_the_best_five():
    labels, scores = torch.tensor([0, 1, 2]), torch.eye(3)
    assert [sample["top"].shape for sample in _best_five(labels, top=scores)] == [(3,)] * 3
    metrics, _ = evaluated(labels, options={"class_counts": [3, 2, 1]}, top=scores)
    assert metrics["test/top5"] == metrics["test/top1"] == 100.0


def test_the_best_five_come_in_order():
    (sample,) = _best_five(torch.tensor([0]), top=torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7]]))
    np.testing.assert_array_equal(sample["top"], [1, 3, 5, 2, 4])
