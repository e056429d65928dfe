"""The long tail's metric for segmentation."""

import json

import numpy as np
import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from mmseg.structures import SegDataSample
from PIL import Image

from disalign import InputError
from disalign.counts import bundled
from disalign.report import table
from disalign_mmseg.metrics import LongTailIoUMetric

K = 5
NAMES = ("road", "car", "tree", "sign", "rider")
COUNTS = [9000, 800, 150, 40, 10]
SHARES = {"groups": dict(head=0.05, tail=0.01), "total_pixels": 12_000}
GROUPS = {"head": [0, 1], "body": [2], "tail": [3, 4]}


def images(number=6, classes=range(K), predicted=range(K), size=(13, 17)):
    """Pairs of prediction and label, (H, W) int64, with ignored pixels and predictions below these."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(number):
        label = rng.choice(list(classes), size)
        noise = rng.choice(list(predicted), size)
        prediction = np.where(rng.random(size) < 0.6, label, noise)
        label[rng.random(size) < 0.2] = 255
        pairs.append((prediction, label))
    return pairs


def samples(pairs):
    return [
        SegDataSample(
            metainfo={"img_path": f"images/{number}.png", "seg_map_path": f"labels/{number}.png"},
            pred_sem_seg=PixelData(data=torch.from_numpy(prediction)[None]),
            **({} if label is None else {"gt_sem_seg": PixelData(data=torch.from_numpy(label)[None])}),
        )
        for number, (prediction, label) in enumerate(pairs)
    ]


def built(names=NAMES, kind=LongTailIoUMetric, **options):
    metric = kind(**{"class_counts": COUNTS, **SHARES} | options) if kind is LongTailIoUMetric else kind(**options)
    metric.dataset_meta = {"classes": names}
    return metric


def evaluated(pairs, metric=None, **options):
    """Metrics and report, given in batches of two."""
    metric = metric or built(**options)
    evaluator = Evaluator(metric)
    given = samples(pairs)
    for start in range(0, len(given), 2):
        evaluator.process(given[start : start + 2])
    return evaluator.evaluate(len(given)), getattr(metric, "report", None)


def by_hand(pairs, num_classes=K):
    """IoU and accuracy of each class in percent, and the overall accuracy, pixel by pixel."""
    both, either, labelled, right, valid = np.zeros(num_classes), np.zeros(num_classes), np.zeros(num_classes), 0, 0
    for prediction, label in pairs:
        for p, t in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
            if t == 255:
                continue
            valid += 1
            labelled[t] += 1
            if p == t:
                right += 1
                both[t] += 1
                either[t] += 1
            else:
                either[t] += 1
                either[p] += 1
    iou = [100 * b / e if n else None for b, e, n in zip(both, either, labelled, strict=True)]
    acc = [100 * b / n if n else None for b, n in zip(both, labelled, strict=True)]
    return iou, acc, 100 * right / valid


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------- figures


def test_figures_equal_a_count_pixel_by_pixel():
    pairs = images()
    metrics, report = evaluated(pairs)
    iou, acc, overall = by_hand(pairs)
    expected = {"mIoU": mean(iou), "mAcc": mean(acc), "aAcc": overall}
    for group, members in GROUPS.items():
        expected[f"mIoU.{group}"] = mean([iou[j] for j in members])
        expected[f"mAcc.{group}"] = mean([acc[j] for j in members])
    assert len({round(value, 6) for value in expected.values()}) == len(expected)
    assert report["figures"] == pytest.approx(expected, abs=1e-9)
    assert metrics == pytest.approx(expected, abs=0.0051)
    assert all(type(value) is float and round(value, 2) == value for value in metrics.values())
    assert report["per_class"]["IoU"] == pytest.approx(iou)
    assert report["per_class"]["Acc"] == pytest.approx(acc)
    assert report["per_class"]["group"] == ["head", "head", "body", "tail", "tail"]
    assert report["per_class"]["pixels"] == [sum(int((label == j).sum()) for _, label in pairs) for j in range(K)]


@pytest.mark.parametrize("figures", ["mIoU", ["mIoU", "mDice", "mFscore"]])
def test_where_every_class_occurs_it_is_mmsegs_metric(figures):
    pairs = images()
    stock, _ = evaluated(pairs, built(kind=IoUMetric, iou_metrics=figures))
    ours, _ = evaluated(pairs, iou_metrics=figures)
    assert set(stock) <= set(ours)
    assert {name: ours[name] for name in stock} == pytest.approx(stock, abs=0.011)


def test_every_figure_is_grouped():
    metrics, report = evaluated(images(), iou_metrics=["mFscore"])
    per_class = report["per_class"]
    assert {"mFscore.tail", "mPrecision.head", "mRecall.body"} <= set(metrics)
    assert metrics["mRecall.tail"] == pytest.approx(mean(per_class["Recall"][3:]), abs=0.0051)


def test_a_class_without_ground_truth_is_not_available_though_it_is_predicted():
    pairs = images(classes=[0, 1, 2, 4])
    assert any((prediction[label != 255] == 3).any() for prediction, label in pairs)
    metrics, report = evaluated(pairs)
    iou, acc, _ = by_hand(pairs)
    assert iou[3] is acc[3] is report["per_class"]["IoU"][3] is report["per_class"]["Acc"][3] is None
    assert metrics["mIoU"] == pytest.approx(mean(iou), abs=0.0051)
    assert metrics["mIoU.tail"] == pytest.approx(iou[4], abs=0.0051)
    assert metrics["mAcc.tail"] == pytest.approx(acc[4], abs=0.0051)
    # mmseg's counts it as 0.
    stock, _ = evaluated(pairs, built(kind=IoUMetric))
    assert stock["mIoU"] == pytest.approx(metrics["mIoU"] * 4 / 5, abs=0.011)


def test_a_class_without_ground_truth_is_not_available_in_the_other_figures_either():
    _, report = evaluated(images(classes=[0, 1, 2, 4]), iou_metrics=["mDice", "mFscore"])
    assert {name: report["per_class"][name][3] for name in ("Dice", "Acc", "Fscore", "Precision", "Recall")} == (
        dict.fromkeys(("Dice", "Acc", "Fscore", "Precision", "Recall"))
    )


def test_a_group_without_evaluated_classes_is_left_out_null_and_not_available():
    metrics, report = evaluated(images(classes=[0, 1, 2]))
    assert {"mIoU.tail", "mAcc.tail"}.isdisjoint(metrics)
    assert "mIoU.body" in metrics
    assert report["figures"]["mIoU.tail"] is report["figures"]["mAcc.tail"] is None
    assert report["groups"]["classes"] == {"head": 2, "body": 1, "tail": 2}
    assert report["groups"]["evaluated"] == {"head": 2, "body": 1, "tail": 0}
    assert table(report).count("n/a") == 2
    json.dumps(report, allow_nan=False)


def test_nan_to_num_is_kept():
    pairs = images(classes=[0, 1, 2, 4])
    metrics, report = evaluated(pairs, nan_to_num=0)
    assert report["per_class"]["IoU"][3] == 0
    assert metrics["mIoU"] == pytest.approx(evaluated(pairs)[0]["mIoU"] * 4 / 5, abs=0.011)


def test_areas_above_float32_lose_no_pixel():
    metric = built(names=("a", "b"), class_counts=[1, 1])
    # The second image's pixels are below the rounding of the first's sum in float32.
    big, small = 2**24, 1
    results = []
    for pixels in (big, small, small, small):
        area = torch.tensor([pixels, pixels])
        results.append((area, area, area, area))
    metric.results = list(results)
    metric.evaluate(len(results))
    assert metric.report["per_class"]["pixels"] == [2**24 + 3] * 2
    stock = [sum(area.float() for area in areas) for areas in zip(*results, strict=True)]
    assert stock[3].tolist() == [2.0**24] * 2


def test_areas_of_an_image_are_whole_numbers_equal_to_mmsegs():
    for prediction, label in images():
        arguments = torch.from_numpy(prediction), torch.from_numpy(label), K, 255
        ours, stock = LongTailIoUMetric.intersect_and_union(*arguments), IoUMetric.intersect_and_union(*arguments)
        assert all(area.dtype == torch.int64 and area.shape == (K,) for area in ours)
        assert [area.tolist() for area in ours] == [area.tolist() for area in stock]


def test_another_ignore_index_is_ignored():
    pairs = [(prediction, np.where(label == 255, 254, label)) for prediction, label in images()]
    assert evaluated(pairs, ignore_index=254)[0] == evaluated(images())[0]


def test_scores_of_one_channel_give_whole_classes():
    pairs = images(classes=[0, 1], predicted=[0, 1])
    floats = [(prediction.astype(np.float32), label) for prediction, label in pairs]
    options = dict(names=NAMES[:2], class_counts=COUNTS[:2], total_pixels=None)
    assert evaluated(floats, **options)[0] == evaluated(pairs, **options)[0]


@pytest.mark.parametrize(
    "pairs", [[], [(np.zeros((4, 4), int), np.full((4, 4), 255))]], ids=["no image", "all ignored"]
)
def test_nothing_to_evaluate_gives_no_figures(pairs, recwarn):
    metrics, report = evaluated(pairs)
    assert metrics == {}
    assert set(report["figures"].values()) == {None}
    assert report["images"] == len(pairs)
    assert "n/a" in str(table(report))
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_results_of_two_processes_are_those_of_one():
    pairs = images(7)
    expected = evaluated(pairs)
    ranks = [built(), built()]
    for rank, metric in enumerate(ranks):
        # DefaultSampler gives the ranks every other image, and pads the last with the first.
        Evaluator(metric).process(samples([pairs[i % 7] for i in range(rank, 8, 2)]))
    merged = built()
    merged.results = [result for pair in zip(ranks[0].results, ranks[1].results, strict=True) for result in pair]
    assert len(merged.results) == 8
    assert merged.evaluate(7) == expected[0]
    assert merged.report == expected[1]


def test_a_second_evaluation_starts_anew():
    metric = built()
    first = evaluated(images(), metric)[0]
    other = evaluated(images(3, size=(7, 5)), metric)[0]
    assert other != first
    assert evaluated(images(), metric)[0] == first


# -------------------------------------------------------------------------------------------------------- groups


def members(metric):
    return {group: chosen.nonzero().flatten().tolist() for group, chosen in metric.members().items()}


def test_thresholds_are_shares_of_all_pixels():
    assert members(built()) == GROUPS
    # Of the 10,000 labelled ones the third class has 1.5 %, of 20,000 pixels 0.75 %.
    assert members(built(total_pixels=20_000)) == {"head": [0], "body": [1], "tail": [2, 3, 4]}
    assert members(built(total_pixels=None, groups=dict(head=0.079, tail=0.002))) == {
        "head": [0, 1],
        "body": [2, 3],
        "tail": [4],
    }


def test_the_papers_thresholds_are_the_default():
    metric = built(groups=None, total_pixels=None)
    assert members(metric) == {"head": [0, 1, 2], "body": [3], "tail": [4]}
    metric = built(names=("a", "b", "c"), class_counts=[1_000, 100, 10], groups=None, total_pixels=10_000)
    # Exactly 1 % is body, exactly 0.1 % tail.
    assert members(metric) == {"head": [0], "body": [1], "tail": [2]}


@pytest.mark.parametrize("options", [dict(class_counts="ade20k"), dict(class_counts=None, groups="ade20k")])
def test_ade20ks_official_split(options):
    names = bundled("ade20k")["class_names"]
    metric = LongTailIoUMetric(**options)
    metric.dataset_meta = {"classes": names}
    _, report = evaluated([(np.arange(150)[None], np.arange(150)[None])], metric)
    assert report["groups"]["classes"] == {"head": 20, "body": 55, "tail": 75}
    # By rank: the classes are sorted by their pixels.
    assert report["per_class"]["group"] == ["head"] * 20 + ["body"] * 55 + ["tail"] * 75
    assert "official" in report["groups"]["split"]


def test_ade20ks_own_table_of_shares_gives_the_official_split(tmp_path):
    ratios = bundled("ade20k")["pixel_ratio"]
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{index}\t{ratio:.4f}\t10\t1\tclass {index}" for index, ratio in enumerate(ratios, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    metric = LongTailIoUMetric(class_counts=str(tmp_path / "objectInfo150.txt"))
    assert [len(chosen) for chosen in members(metric).values()] == [20, 55, 75]


def test_a_file_of_counts_knows_its_total(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"train_counts": COUNTS, "total_pixels": 20_000}))
    assert members(built(class_counts=path, total_pixels=None)) == {"head": [0], "body": [1], "tail": [2, 3, 4]}
    assert members(built(class_counts=path, total_pixels=12_000)) == GROUPS
    path.write_text(json.dumps(COUNTS))
    assert built(class_counts=path, total_pixels=None).total_pixels is None


def test_counts_can_be_set_later():
    pairs = images()
    metric = LongTailIoUMetric(groups=SHARES["groups"])
    metric.dataset_meta = {"classes": NAMES}
    metrics, report = evaluated(pairs, metric)
    assert set(metrics) == {"mIoU", "mAcc", "aAcc"}
    assert report["class_counts"] is report["figures"]["mIoU.head"] is None
    assert report["per_class"]["group"] == [None] * K
    assert "no class counts" in report["groups"]["split"]
    metric.total_pixels = SHARES["total_pixels"]
    metric.class_counts = torch.tensor(COUNTS)
    assert evaluated(pairs, metric) == evaluated(pairs)


# -------------------------------------------------------------------------------------------------- report, files


def test_the_report_says_what_was_evaluated():
    _, report = evaluated(images())
    assert report["images"] == 6
    assert report["unit"] == "percent"
    assert report["classes"] == list(NAMES)
    assert report["class_counts"] == COUNTS
    assert report["total_pixels"] == 12_000
    split = "head: more than 5 % of all training pixels, tail: at most 1 %, body: between them"
    assert report["groups"] == {
        "split": split,
        "classes": {"head": 2, "body": 1, "tail": 2},
        "evaluated": {"head": 2, "body": 1, "tail": 2},
    }
    assert "of the labelled" in evaluated(images(), total_pixels=None)[1]["groups"]["split"]
    json.dumps(report, allow_nan=False)


def test_the_table_has_the_groups_after_the_means():
    _, report = evaluated(images())
    header, _, row = (line.split() for line in table(report).splitlines())
    assert header == [
        "percent",
        "mIoU",
        "mAcc",
        "aAcc",
        *(f"{name}.{group}" for name in ("mIoU", "mAcc") for group in GROUPS),
    ]
    assert row == [f"{report['figures'][name]:.1f}" for name in header[1:]]


def test_predictions_are_written_without_ground_truth(tmp_path):
    metric = built(format_only=True, output_dir=str(tmp_path))
    predictions = [(prediction, None) for prediction, _ in images(2)]
    metrics, report = evaluated(predictions, metric)
    assert (metrics, report) == ({}, None)
    for number, (prediction, _) in enumerate(predictions):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{number}.png")), prediction)


def test_its_name_is_in_the_registry():
    config = dict(type="LongTailIoUMetric", class_counts="ade20k", prefix="val", iou_metrics=["mIoU"])
    metric = METRICS.build(config)
    assert isinstance(metric, LongTailIoUMetric)
    metric.dataset_meta = {"classes": bundled("ade20k")["class_names"]}
    assert all(name.startswith("val/") for name in evaluated(images(), metric)[0])


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(iou_metric=["mIoU"], tails=1),
            r"arguments of LongTailIoUMetric or mmseg's IoUMetric, got .*tails",
        ),
        (dict(iou_metrics=["mAP"]), "iou_metrics among mIoU, mDice, mFscore, got mAP"),
        (dict(iou_metrics=[]), "got none"),
        (dict(groups="cityscapes"), "groups 'ade20k', or dict.*'cityscapes'"),
        (dict(groups=dict(head=0.01)), "groups 'ade20k', or dict"),
        (dict(groups=dict(head=0.01, tail=0.001, body=1)), "groups 'ade20k', or dict"),
        (dict(groups=dict(head=0.001, tail=0.01)), "0 <= tail <= head < 1, got {'head': 0.001, 'tail': 0.01}"),
        (dict(groups=dict(head=5, tail=1)), "shares of all pixels"),
        (dict(total_pixels=9_999), "all 10000 labelled pixels of class_counts, got 9999"),
        (dict(class_counts=COUNTS[:4]), "the dataset's 5 classes in the metric's class_counts, got 4"),
        (dict(class_counts="nowhere.json"), "nowhere.json"),
        (dict(groups="ade20k"), "the dataset's 5 classes in the metric's groups='ade20k', got 150"),
        (dict(format_only=True), "expected an output_dir with format_only"),
    ],
)
def test_bad_arguments_are_refused_before_any_image(options, sentence):
    with pytest.raises(InputError, match=sentence):
        built(**options)


def test_counts_set_later_must_fit_too():
    metric = built(class_counts=None)
    with pytest.raises(InputError, match="5 classes in the metric's class_counts, got 6"):
        metric.class_counts = [1] * 6
    with pytest.raises(InputError, match="12000"):
        metric.class_counts = [5_000] * 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p, t: (p, np.where(t == 3, 7, t)), "labels of the dataset's 5 classes, got class 7 for labels/0.png"),
        (lambda p, t: (p, np.where(t == 3, -1, t)), "labels of .*, got class -1 for labels/0.png"),
        (lambda p, t: (p[:-1], t), r"as large as its image, got \[13, 17\] and \[12, 17\] for labels/0.png"),
        (
            lambda p, t: (np.where(p == 3, 5, p), t),
            "predictions of the dataset's 5 classes, got class 5 for labels/0.png",
        ),
        (lambda p, t: (p, None), "expected ground truth for labels/0.png.*format_only"),
    ],
)
def test_bad_images_are_refused_by_name(change, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluated([change(*images(1)[0])])
