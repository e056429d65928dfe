import re
from collections import OrderedDict
from itertools import count

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.data import MetadataCatalog

from disalign import at_identity
from disalign_d2 import comparison

from .models import batch, detections, identical, random_calibration, stages, tiny_cfg

NUMBERS = count()
NAN = float("nan")


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -------------------------------------------------------------------------------------------------- at_identity


@pytest.mark.parametrize("cascade", [False, True])
def test_at_the_identity_it_is_stage_one(cascade):
    one, two = stages(cascade=cascade)
    before, inputs = bits(random_calibration(two)), batch()
    after = detections(two, inputs)
    with at_identity(two) as model:
        assert model is two
        assert identical(detections(two, inputs), detections(one, inputs))
    assert identical(bits(two), before)
    assert identical(detections(two, inputs), after)
    assert not identical(after, detections(one, inputs))


def test_the_calibration_comes_back_after_an_exception():
    two = random_calibration(stages()[1])
    before = bits(two)
    with pytest.raises(KeyboardInterrupt), at_identity(two):
        raise KeyboardInterrupt
    assert identical(bits(two), before)


def test_a_part_that_is_left_out_needs_no_restoring():
    one, two = stages("MODEL.DISALIGN.MARGIN", False, "MODEL.DISALIGN.CONFIDENCE", "one")
    torch.nn.init.constant_(two.roi_heads.box_predictor.cls_score.calibration.magnitude, 0.5)
    before, inputs = bits(two), batch()
    with at_identity(two):
        assert identical(detections(two, inputs), detections(one, inputs))
    assert identical(bits(two), before)


# --------------------------------------------------------------------------------------------------------- key


@pytest.fixture
def dataset(tmp_path):
    """A registered test set, and its annotation file."""
    name, path = f"comparison_{next(NUMBERS)}", tmp_path / "annotations.json"
    path.write_text("{}")
    MetadataCatalog.get(name).set(json_file=str(path))
    yield name, path
    MetadataCatalog.remove(name)


def key(model, name, *options):
    cfg = tiny_cfg("DATASETS.TEST", (name,), *options, calibrate=True)
    cfg.freeze()
    return comparison.stage_one_key(cfg, model)


def test_the_key_is_stage_ones_alone(dataset, tmp_path):
    name, _ = dataset
    two = stages()[1]
    first = key(two, name)
    assert first == key(two, name)
    unrelated = {
        "OUTPUT_DIR": str(tmp_path / "other"),
        "SOLVER.BASE_LR": 0.5,
        "SEED": 3,
        "MODEL.WEIGHTS": "other.pth",
        "MODEL.DISALIGN.RHO": 0.1,
    }
    for option in unrelated.items():
        assert key(two, name, *option) == first
    random_calibration(two)
    assert key(two, name) == first
    # Evaluated later, without class counts.
    two.roi_heads.box_predictor.resolve_class_counts()
    assert key(two, name) == first


def test_the_key_is_the_same_within_ddp(dataset):
    two, wrapper = stages()[1], torch.nn.Module()
    wrapper.module = two
    assert key(wrapper, dataset[0]) == key(two, dataset[0])


@pytest.mark.parametrize(
    "option",
    [
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.4),
        ("TEST.DETECTIONS_PER_IMAGE", 300),
        ("TEST.FIXED_AP", True),
        ("INPUT.MIN_SIZE_TEST", 32),
        ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]),
    ],
)
def test_the_key_changes_with_the_settings_of_the_test(dataset, option):
    name, _ = dataset
    two = stages()[1]
    assert key(two, name) != key(two, name, *option)


@pytest.mark.parametrize("tensor", ["backbone.fpn_output2.bias", "roi_heads.box_predictor.cls_score.bias"])
def test_the_key_changes_with_the_frozen_weights(dataset, tensor):
    two = stages()[1]
    first = key(two, dataset[0])
    with torch.no_grad():
        two.get_parameter(tensor)[0].add_(1e-6)
    assert key(two, dataset[0]) != first


def test_the_key_changes_with_the_batch_statistics(dataset):
    two = stages()[1]
    first = key(two, dataset[0])
    two.backbone.bottom_up.stem.conv1.norm.running_mean[0] += 1e-6
    assert key(two, dataset[0]) != first


def test_the_key_changes_with_the_annotations(dataset):
    name, path = dataset
    two = stages()[1]
    first = key(two, name)
    path.write_text("{ }")
    assert key(two, name) != first


def test_the_key_changes_with_the_dataset(dataset):
    two = stages()[1]
    other = f"comparison_{next(NUMBERS)}"
    MetadataCatalog.get(other).set(json_file=str(dataset[1]))
    assert key(two, dataset[0]) != key(two, other)
    MetadataCatalog.remove(other)


# ------------------------------------------------------------------------------------------------------- cache


def test_results_are_read_back(tmp_path):
    path = str(tmp_path / "folder" / "results.json")
    results = OrderedDict(bbox={"AP": 12.34567890123, "APr": NAN, "APf": 0.0}, segm={"AP": -1.5})
    comparison.save_stage_one_results(path, "key", results)
    kept = {"bbox": {"AP": 12.34567890123, "APr": None, "APf": 0.0}, "segm": {"AP": -1.5}}
    assert comparison.load_stage_one_results(path, "key") == kept


def test_results_of_another_stage_one_are_not_taken(tmp_path):
    path = tmp_path / "results.json"
    comparison.save_stage_one_results(str(path), "key", {"bbox": {"AP": 1.0}})
    assert comparison.load_stage_one_results(str(path), "other") is None
    assert comparison.load_stage_one_results(str(tmp_path / "gone.json"), "key") is None
    for broken in ("", '{"key": "k', "[]", "null"):
        path.write_text(broken)
        assert comparison.load_stage_one_results(str(path), "key") is None


# ------------------------------------------------------------------------------------------------------- words

BEFORE = {"bbox": {"AP": 20.04, "AP50": 30.0, "APr": NAN, "APf": 25.0, "APs": 1.0}, "segm": {"AP": 10.0}}
AFTER = {"bbox": {"AP": 21.5, "AP50": 29.0, "APr": NAN, "APf": 25.0, "APs": 2.0}, "segm": {"AP": 12.5}}


def reports(before, after, *names):
    return comparison.reports(tiny_cfg("DATASETS.TEST", names or ("val",)), after, before)


def tables(before, after, *names):
    """Title -> rows of cells of each table."""
    found = {}
    for text in comparison.tables(reports(before, after, *names)).split("\n\n"):
        title, head, _, *lines = text.splitlines()
        found[title] = [re.split(" {2,}", line) for line in (head, *lines)]
    return found


def test_the_reports_hold_both_stages_and_null_for_no_ground_truth():
    assert reports(BEFORE, AFTER) == {
        "val": {
            "bbox": {
                "unit": "percent",
                "figures": {"AP": 21.5, "AP50": 29.0, "APr": None, "APf": 25.0, "APs": 2.0},
                "stage_one": {"figures": {"AP": 20.04, "AP50": 30.0, "APr": None, "APf": 25.0, "APs": 1.0}},
            },
            "segm": {"unit": "percent", "figures": {"AP": 12.5}, "stage_one": {"figures": {"AP": 10.0}}},
        }
    }
    alone = reports(None, {"segm": {"AP": 12.5}})
    assert alone == {"val": {"segm": {"unit": "percent", "figures": {"AP": 12.5}}}}


def test_each_of_two_datasets_has_its_own_reports():
    found = reports({"a": BEFORE, "b": AFTER}, {"a": AFTER, "b": BEFORE}, "a", "b")
    assert found.keys() == {"a", "b"}
    assert found["a"] == reports(BEFORE, AFTER)["val"]
    assert found["b"] == reports(AFTER, BEFORE)["val"]


def test_the_table_shows_both_stages_and_the_gain():
    assert tables(BEFORE, AFTER) == {
        "val, bbox, before and after": [
            ["percent", "AP", "AP50", "APr", "APf"],
            ["stage one", "20.0", "30.0", "n/a", "25.0"],
            ["DisAlign", "21.5", "29.0", "n/a", "25.0"],
            ["gain", "+1.5", "-1.0", "n/a", "+0.0"],
        ],
        "val, segm, before and after": [
            ["percent", "AP"],
            ["stage one", "10.0"],
            ["DisAlign", "12.5"],
            ["gain", "+2.5"],
        ],
    }


@pytest.mark.parametrize("before", [{"bbox": BEFORE["bbox"]}, {}])
def test_a_task_that_stage_one_has_no_figures_of_is_not_available(before):
    # It detected nothing.
    masks = tables(before, AFTER)["val, segm, before and after"]
    assert [row[1] for row in masks] == ["AP", "n/a", "12.5", "n/a"]


def test_the_table_has_every_group_of_lvis_in_its_order():
    figures = {"bbox": dict.fromkeys(["APf", "APc", "APr", "AR", "AP75", "AP50", "AP"], 1.0)}
    ((head, *_),) = tables(figures, figures).values()
    assert head == ["percent", "AP", "AP50", "AP75", "APr", "APc", "APf"]
