import json

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from disalign import InputError
from disalign.counts import bundled
from disalign_d2 import add_disalign_config
from disalign_d2.class_counts import class_counts_from_config, count_annotations, training_image_counts
from disalign_d2.datasets import register_instances

from .annotations import box, coco, unique, write


def config(classes, source="", unit="instances", train=()):
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.DISALIGN.CLASS_COUNTS = source
    cfg.MODEL.DISALIGN.COUNT_UNIT = unit
    cfg.DATASETS.TRAIN = train
    return cfg


def registered(folder, content):
    name = unique()
    register_instances(name, write(folder, content, f"{name}.json"), "")
    return name


def random_records(images=60, classes=9):
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    return [
        {"annotations": [{"category_id": draw(classes - 1), "iscrowd": draw(2)} for _ in range(draw(8))]}
        for _ in range(images)
    ]


def test_counting_against_a_loop():
    records = random_records()
    instances, images = [0] * 9, [0] * 9
    for label in range(9):
        for record in records:
            shown = sum(one["category_id"] == label and not one["iscrowd"] for one in record["annotations"])
            instances[label] += shown
            images[label] += shown > 0
    counted = count_annotations(records, 9)
    assert counted.dtype == torch.int64
    assert counted.tolist() == instances
    assert count_annotations(records, 9, "images").tolist() == images
    assert instances != images
    assert instances[8] == 0


def test_records_without_crowd_flags_or_annotations():
    records = [{"annotations": [{"category_id": 1}, {"category_id": 1}]}, {"annotations": []}, {}]
    assert count_annotations(records, 3).tolist() == [0, 2, 0]
    assert count_annotations(records, 3, "images").tolist() == [0, 1, 0]
    assert count_annotations([], 2).tolist() == [0, 0]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_out_of_range_is_refused(label):
    with pytest.raises(InputError, match=rf"classes 0..2, got {label}"):
        count_annotations([{"annotations": [{"category_id": label}]}], 3)


def test_an_unknown_unit_is_refused():
    with pytest.raises(InputError, match="COUNT_UNIT among instances, images, got 'pixels'"):
        class_counts_from_config(config(1203, "lvis_v1", "pixels"))


@pytest.mark.parametrize(("name", "classes"), [("lvis_v0.5", 1230), ("lvis_v1", 1203)])
def test_bundled_counts_are_the_files(name, classes):
    record = bundled(name)
    instances = class_counts_from_config(config(classes, name))
    images = class_counts_from_config(config(classes, name, "images"))
    assert instances.tolist() == record["train_counts"]
    assert images.tolist() == record["image_counts"]
    assert instances.dtype == images.dtype == torch.int64
    assert (instances >= images).all()
    assert (instances > images).any()


def test_counted_from_the_training_data(tmp_path):
    name = registered(tmp_path, coco())
    assert class_counts_from_config(config(3, train=(name,))).tolist() == [1, 3, 1]
    assert class_counts_from_config(config(3, unit="images", train=(name,))).tolist() == [1, 2, 1]


def test_several_training_sets_are_added(tmp_path):
    names = (registered(tmp_path, coco()), registered(tmp_path, coco()))
    assert class_counts_from_config(config(3, train=names)).tolist() == [2, 6, 2]


def test_the_annotations_are_read_once(tmp_path):
    name, reads = unique(), []

    def records():
        reads.append(1)
        return [{"annotations": [{"category_id": label} for label in (0, 0, 1)]}]

    DatasetCatalog.register(name, records)
    first = class_counts_from_config(config(2, train=(name,)))
    first[0] = 77  # what the caller does with it is the caller's
    assert class_counts_from_config(config(2, train=(name,))).tolist() == [2, 1]
    assert len(reads) == 1


@pytest.mark.parametrize("value", [[4, 2, 1], {"train_counts": [4, 2, 1], "image_counts": [3, 2, 1]}])
def test_counts_of_a_file(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "counts.json").write_text(json.dumps(value))
    assert class_counts_from_config(config(3, "~/counts.json")).tolist() == [4, 2, 1]
    if isinstance(value, dict):
        assert class_counts_from_config(config(3, "~/counts.json", "images")).tolist() == [3, 2, 1]
    else:
        with pytest.raises(InputError, match="counts only one unit"):
            class_counts_from_config(config(3, "~/counts.json", "images"))


@pytest.mark.parametrize(
    ("classes", "source", "sentence"),
    [
        (1203, "lvis_v0.5", "expected 1203 class counts.*got 1230 from lvis_v0.5; set NUM_CLASSES or"),
        (1230, "lvis_v1", "expected 1230 class counts.*got 1203 from lvis_v1; set NUM_CLASSES or"),
        (80, "lvis_v1", "expected 80 class counts.*1203 from lvis_v1; set"),
        (1203, "nowhere", "got 'nowhere'"),
    ],
)
def test_counts_of_another_set_are_refused(classes, source, sentence):
    with pytest.raises(InputError, match=sentence):
        class_counts_from_config(config(classes, source))


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_classes_is_refused(tmp_path, classes):
    name = registered(tmp_path, coco())
    with pytest.raises(InputError, match=rf"expected {classes} class counts.*got 3 from the annotations of {name}"):
        class_counts_from_config(config(classes, train=(name,)))


def test_a_class_without_examples_is_named(tmp_path):
    content = coco()
    content["categories"] += [{"id": 50, "name": "eel"}, {"id": 1, "name": "ape"}]
    content["annotations"].append(box(99, 3, 1, iscrowd=1))
    name = registered(tmp_path, content)
    with pytest.raises(InputError, match=r"got none of 2 classes in .*: ape, eel; drop these categories, or give"):
        class_counts_from_config(config(5, train=(name,)))
    path = tmp_path / "counts.json"
    path.write_text("[3, 0, 2]")
    with pytest.raises(InputError, match=r"got none of 1 classes in .*counts.json: 1; drop"):
        class_counts_from_config(config(3, str(path)))


def test_no_training_data_and_unknown_training_data_are_refused():
    with pytest.raises(InputError, match=r"a dataset in DATASETS.TRAIN .*got none"):
        class_counts_from_config(config(3))
    with pytest.raises(InputError, match="expected a registered dataset, got 'nothing'"):
        class_counts_from_config(config(3, train=("nothing",)))


def test_training_images_are_counted_not_their_instances(tmp_path):
    content = coco()
    name = registered(tmp_path, content)
    ids = [category["id"] for category in sorted(content["categories"], key=lambda category: category["id"])]
    twice = [dict(one, id=one["id"] + 1000) for one in content["annotations"]]
    doubled = registered(tmp_path, {**content, "annotations": [*content["annotations"], *twice]})
    shown = [
        len({one["image_id"] for one in content["annotations"] if one["category_id"] == id_ and not one.get("iscrowd")})
        for id_ in ids
    ]
    for dataset in (name, doubled):
        assert training_image_counts(config(len(ids), train=(dataset,))).tolist() == shown
    assert count_annotations(DatasetCatalog.get(doubled), len(ids)).tolist() != shown
    assert training_image_counts(config(len(ids))) is None
    assert training_image_counts(config(len(ids), train=("unknown",))) is None
