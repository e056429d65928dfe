"""The three packages count the same, and take the file."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")

from PIL import Image

from disalign import InputError
from disalign.io.images import mask_files
from disalign_tools.count_classes import count, main

CLASSES = ("sky", "road", "car", "bird")


@pytest.fixture
def out(tmp_path):
    """The function that counts by the command and returns the file and its content."""

    def counted(*argv):
        path = tmp_path / "counts.json"
        assert main([*map(str, argv), "--out", str(path), "--force"]) == 0
        return str(path), json.loads(path.read_text())

    return counted


# --------------------------------------------------------------------------------------------------- classification


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in (
        "dog/1.png",
        "dog/b/2.PNG",
        "dog/a/3.tif",
        "cat/1.png",
        "Zebra/1.webp",
        ".hidden/1.png",
        "cat/._1.png",
        "dog/.a/1.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name, format="PNG")
    (folder / "ant").mkdir()
    (folder / "dog/notes.gif").write_text("no image for FolderDataset")
    return folder


def test_the_image_datasets_count_the_same(photos, tmp_path, out):
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    datasets = pytest.importorskip("disalign_cls.datasets")
    dataset = datasets.FolderDataset(str(photos))
    _, record = out(photos)
    assert record["train_counts"] == dataset.class_counts.tolist()
    assert record["class_names"] == dataset.metainfo["classes"] == ["Zebra", "ant", "cat", "dog"]
    assert record["train_counts"] == [1, 0, 1, 3]

    lines = [f"{path} {label}\n" for path, label in zip(dataset.images, dataset.labels.tolist(), strict=True)]
    (tmp_path / "list.txt").write_text("".join(lines))
    _, record = out(tmp_path / "list.txt", "--num-classes", 7)
    assert (
        record["train_counts"] == datasets.ListDataset(str(tmp_path / "list.txt"), num_classes=7).class_counts.tolist()
    )


# -------------------------------------------------------------------------------------------------------- detection


def entries(categories, images, seed=0):
    """Random annotations: crowds, ignored ones, polygons with and without an area, RLE, boxes alone."""
    rng = np.random.default_rng(seed)
    masks = [None, [], [[1, 1, 5, 1, 5, 5]], [[1, 2, 3, 4]], [[1, 2, 3], [1, 1, 5, 1, 5, 5]], [[1, 2, 3, 4, 5, 6, 7]]]
    masks.append({"size": [9, 9], "counts": [3, 78]})
    for id_ in range(400):
        entry = {
            "id": id_,
            "image_id": int(rng.choice(images)),
            "category_id": int(rng.choice(categories)),
            "bbox": [1, 1, 4, 4],
            "area": 16,
        }
        flags = {"iscrowd": int(rng.random() < 0.2), "ignore": int(rng.random() < 0.1)}
        entry |= {key: value for key, value in flags.items() if rng.random() < 0.7}
        mask = masks[rng.integers(len(masks))]
        yield entry if mask is None else entry | {"segmentation": mask}


@pytest.fixture
def annotations(tmp_path):
    ids = [90, 3, 17, 4, 1, 55]
    images = list(range(30, 0, -1))
    content = {
        "categories": [{"id": id_, "name": f"name {id_}", "synonyms": [f"class {id_}"]} for id_ in ids],
        "images": [{"id": id_, "file_name": f"{id_}.png", "width": 9, "height": 9} for id_ in images],
        "annotations": list(entries(ids[:5], images)),  # none of 55
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return path


def test_the_detector_counts_the_same(annotations, out):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.data import MetadataCatalog

    from disalign_d2.class_counts import UNITS, count_annotations
    from disalign_d2.datasets import load_instances

    records = load_instances(str(annotations), "", name="counted_by_the_tool")
    instances, images = (count_annotations(records, 6, unit).tolist() for unit in UNITS)
    _, record = out(annotations)
    assert record["train_counts"] == instances
    assert record["image_counts"] == images
    assert record["class_names"] == MetadataCatalog.get("counted_by_the_tool").thing_classes
    assert instances[4] == 0  # id 55
    assert instances != images
    assert record["left_out"] + sum(instances) == 400


def test_the_detectors_config_takes_the_file_in_both_units(annotations, out, tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg

    from disalign_d2 import add_disalign_config
    from disalign_d2.class_counts import class_counts_from_config

    content = json.loads(annotations.read_text())
    content["categories"] = [one for one in content["categories"] if one["id"] != 55]
    annotations.write_text(json.dumps(content))
    path, record = out(annotations)
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.DISALIGN.CLASS_COUNTS = path
    for unit, key in (("instances", "train_counts"), ("images", "image_counts")):
        cfg.MODEL.DISALIGN.COUNT_UNIT = unit
        assert class_counts_from_config(cfg).tolist() == record[key]

    # Counts of zero are written, and refused where they would be used.
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != 17]
    annotations.write_text(json.dumps(content))
    out(annotations)
    with pytest.raises(InputError, match="got none of 1 classes"):
        class_counts_from_config(cfg)


# ----------------------------------------------------------------------------------------------------- segmentation


@pytest.fixture
def masks(tmp_path):
    """The folder of a data set: grey-scale, palette and two-colour PNGs, ignored pixels among them."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(60):
        folder = tmp_path / "masks" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / folder.name).mkdir(exist_ok=True)
        labels = rng.choice((0, 1, 1, 2, 4, 255), rng.integers(2, 20, 2)).astype(np.uint8)
        image = Image.fromarray(labels)
        if number % 4 == 1:
            image = image.convert("P")
            image.putpalette(rng.integers(0, 256, 768).tolist())
        elif number % 4 == 2:
            image = Image.fromarray(labels < 2)
        image.save(folder / f"{number}.png")
        Image.new("RGB", image.size).save(tmp_path / "images" / folder.name / f"{number}.jpg")
    return tmp_path


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_segmentation_counts_the_same(masks, reduce_zero_label, out):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from disalign_mmseg.pixel_counts import count_pixels

    num_classes = 4 if reduce_zero_label else 5
    dataset = dataset_of(masks, num_classes, reduce_zero_label=reduce_zero_label)
    expected = count_pixels(dataset, num_classes, workers=0)
    options = ["--reduce-zero-label"] if reduce_zero_label else []
    _, record = out(masks / "masks", "--kind", "masks", *options)
    same = ("train_counts", "image_counts", "total_pixels", "files", "unit")
    assert {key: record[key] for key in same} == {key: expected[key] for key in same}
    assert set(expected) <= set(record)


def dataset_of(folder, num_classes=5, **options):
    from mmengine.registry import DefaultScope
    from mmseg.datasets import BaseSegDataset

    # Whatever ran before in this process, names are looked up as within a segmentation run.
    with DefaultScope.overwrite_default_scope("mmseg"):
        return BaseSegDataset(
            data_root=str(folder),
            data_prefix=dict(img_path="images", seg_map_path="masks"),
            metainfo=dict(classes=[f"class {label}" for label in range(num_classes)]),
            pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")],
            serialize_data=False,
            **options,
        )


def test_segmentation_checks_and_counts_the_files_that_mmsegmentation_lists(masks, out, monkeypatch):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from disalign_mmseg import data_check
    from disalign_mmseg.pixel_counts import Annotations

    elsewhere = masks.parent / "elsewhere"
    for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
        (elsewhere / kind / "deep" / "er").mkdir(parents=True)
        tree = masks / kind
        for name in (
            tree / "a" / "._0",
            tree / ".hidden" / "h",
            elsewhere / kind / "x",
            elsewhere / kind / "deep/er/y",
        ):
            name.parent.mkdir(exist_ok=True)
            Image.new("L", (3, 2), color=len(name.name)).save(f"{name}{suffix}")
        (tree / "linked").symlink_to(elsewhere / kind, target_is_directory=True)
        (tree / f"link{suffix}").symlink_to(elsewhere / kind / f"x{suffix}")
        (tree / "notes.txt").write_text("neither")
    dataset = dataset_of(masks)
    listed = [dataset.get_data_info(index)["seg_map_path"] for index in range(len(dataset))]
    names = {os.path.relpath(path, masks / "masks") for path in listed}
    assert {".hidden/h.png", "linked/x.png", "linked/deep/er/y.png", "link.png", "a/0.png"} < names
    assert not names & {"a/._0.png", "notes.txt"}

    assert sorted(mask_files(str(masks / "masks"))) == sorted(listed)
    _, record = out(masks / "masks", "--kind", "masks")
    assert record["files"] == len(listed)

    read = []
    stock = Annotations.__getitem__
    monkeypatch.setattr(
        Annotations,
        "__getitem__",
        lambda self, place: read.append(self.plain.get_data_info(place)["seg_map_path"]) or stock(self, place),
    )
    assert data_check.dataset_problems(dataset, 5, labels=None, workers=0) == []
    assert sorted(read) == sorted(listed)


def test_segmentation_counts_a_list_of_images_and_no_others(masks, tmp_path):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from disalign_mmseg.pixel_counts import count_pixels

    (tmp_path / "train.txt").write_text("a/0\na/3\nb/1\n")
    record = count_pixels(dataset_of(masks, ann_file=str(tmp_path / "train.txt")), 5, workers=0)
    labels = [np.asarray(Image.open(masks / "masks" / f"{name}.png")).astype(int) for name in ("a/0", "a/3", "b/1")]
    assert record["files"] == 3
    assert record["train_counts"] == [sum(int((one == label).sum()) for one in labels) for label in range(5)]


def test_the_detectors_checks_and_counts_are_of_the_records_that_train(annotations, out, caplog):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.data import get_detection_dataset_dicts

    from disalign_d2 import add_disalign_config
    from disalign_d2.class_counts import training_image_counts
    from disalign_d2.data_check import check_data
    from disalign_d2.datasets import register_instances

    register_instances("of_the_records_that_train", annotations, annotations.parent)
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("of_the_records_that_train",), ()
    records = get_detection_dataset_dicts("of_the_records_that_train", filter_empty=False)
    trained = [[one["category_id"] for one in record["annotations"] if not one["iscrowd"]] for record in records]
    _, record = out(annotations)
    assert record["train_counts"] == [sum(labels.count(label) for labels in trained) for label in range(6)]
    shown = [sum(label in labels for labels in trained) for label in range(6)]
    assert record["image_counts"] == training_image_counts(cfg).tolist() == shown != record["train_counts"]
    # Whether the images are there is asked of the records' files, each of them and no other.
    absent = [one["file_name"] for one in records[3:10:3]]
    for one in records:
        if one["file_name"] not in absent:
            Image.new("RGB", (9, 9)).save(one["file_name"])
    (problem,) = [problem for problem in check_data(cfg) if "missing" in problem]
    assert f"expected {len(records)} images of 'of_the_records_that_train', but 3 are missing" in problem
    assert f": {', '.join(absent)};" in problem


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_detectron2s_own_loaders_see_the_annotations_that_count(kind, tmp_path, out):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    pytest.importorskip("lvis", reason="lvis is not installed")
    from detectron2.data.datasets import load_coco_json
    from detectron2.data.datasets.lvis import load_lvis_json

    ids, images = [1, 2, 3, 4, 5], list(range(30, 0, -1))
    content = {
        "categories": [{"id": id_, "name": f"name {id_}"} for id_ in ids],
        "images": [
            {"id": id_, "file_name": f"{id_}.png", "width": 9, "height": 9, "neg_category_ids": []}
            | {"not_exhaustive_category_ids": [], "coco_url": f"http://x.org/train2017/{id_}.png"}
            for id_ in images
        ],
        # Detectron2 refuses ignored ones; LVIS has polygons of at least three points, and no crowds.
        "annotations": [dict(one, ignore=0) for one in entries(ids[:4], images)],
    }
    if kind == "lvis":
        content["annotations"] = [
            dict(one, iscrowd=0, segmentation=[[1, 1, 5, 1, 5, 5]]) for one in content["annotations"]
        ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    records = (load_coco_json if kind == "coco" else load_lvis_json)(str(path), str(tmp_path))
    # Without a dataset's name the ids stay those of the file; LVIS's become 0, 1, ...
    first = 1 if kind == "coco" else 0
    trained = [[one["category_id"] - first for one in r["annotations"] if not one.get("iscrowd")] for r in records]
    _, record = out(path)
    assert record["images"] == len(records)
    assert record["train_counts"] == [sum(labels.count(label) for labels in trained) for label in range(5)]
    assert record["image_counts"] == [sum(label in labels for labels in trained) for label in range(5)]
    assert record["left_out"] + sum(map(len, trained)) == 400


def test_segmentations_loss_and_metric_take_the_file(masks, out):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    from disalign_mmseg.losses import GRWCrossEntropyLoss
    from disalign_mmseg.metrics import LongTailIoUMetric

    path, record = out(masks / "masks", "--kind", "masks", "--reduce-zero-label")
    assert 0 in record["train_counts"]  # label 3 is nowhere
    with pytest.raises(InputError, match="count"):
        GRWCrossEntropyLoss(class_counts=path)
    counts = GRWCrossEntropyLoss(class_counts=path, zero_count="exclude").class_counts
    assert counts.tolist() == record["train_counts"]
    metric = LongTailIoUMetric(class_counts=path)
    assert metric.class_counts.tolist() == record["train_counts"]
    assert metric.total_pixels == record["total_pixels"] > sum(record["train_counts"])


def test_the_record_of_python_is_the_files(masks, out):
    _, record = out(masks / "masks", "--kind", "masks")
    again = count([str(masks / "masks")], "masks")
    assert {**again, "date": ""} == {**record, "date": ""}
