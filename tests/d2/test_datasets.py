import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import load_coco_json, load_lvis_json
from detectron2.data.transforms import Augmentation, AugmentationList
from pycocotools import mask as coco_mask

from disalign import InputError
from disalign.cli import sentence_of
from disalign_d2 import add_disalign_config
from disalign_d2.datasets import CheckedMapper, load_instances, load_records, register_from_config, register_instances

from .annotations import SIZE, box, coco, lvis, unique, write, write_images


def config(**datasets):
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (24,), 24
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.MASK_ON = True
    for key, value in datasets.items():
        cfg.DATASETS[key] = value
    return cfg


def registered(folder, content, image_root=None, name="set"):
    name = unique(name)
    register_instances(name, write(folder, content), str(image_root or folder / "images"))
    return name


# ------------------------------------------------------------------------------------------------- reading the file


@pytest.mark.parametrize("name", ["set", "tiny_v1_train", "lvis_v0.5_mine"])
def test_ids_with_gaps_become_classes_in_their_order_whatever_the_name(tmp_path, name):
    content = coco()
    name = registered(tmp_path, content, name=name)
    assert not hasattr(MetadataCatalog.get(name), "thing_classes")  # read only when used
    records = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["ant", "cat", "dog"]
    assert metadata.evaluator_type == "lvis"
    assert [record["image_id"] for record in records] == [3, 5, 9]
    # What LVISEvaluator does to get back to the file's ids.
    back = {label: id_ for id_, label in metadata.thing_dataset_id_to_contiguous_id.items()}
    for record in records:
        of_image = [entry for entry in content["annotations"] if entry["image_id"] == record["image_id"]]
        assert [back[one["category_id"]] for one in record["annotations"]] == [one["category_id"] for one in of_image]
        assert [one["bbox"] for one in record["annotations"]] == [one["bbox"] for one in of_image]


def test_the_same_as_detectron2s_coco_loader(tmp_path):
    content = coco()
    content["annotations"].append(box(17, 9, 7, segmentation={"counts": [700, 60, 8], "size": [24, 32]}))
    path = write(tmp_path, content)
    name = unique()
    expected = load_coco_json(path, "root", name)
    records = load_instances(path, "root")
    for record in expected:
        record.update(not_exhaustive_category_ids=[], neg_category_ids=[])
        for one in record["annotations"]:
            one.setdefault("iscrowd", 0)
    assert records == expected


def test_the_same_as_detectron2s_lvis_loader(tmp_path):
    path = write(tmp_path, lvis(3))
    expected = load_lvis_json(path, "root/")
    records = load_instances(path, "root")
    for record in records:
        for one in record["annotations"]:
            assert one.pop("iscrowd") == 0
    assert records == expected
    assert records[0]["not_exhaustive_category_ids"] == [2]
    assert records[1]["neg_category_ids"] == [1, 3]


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_image_without_file_name_is_where_its_url_says(tmp_path, slash):
    records = load_instances(write(tmp_path, lvis()), f"{tmp_path}/coco{slash}")
    assert [record["file_name"] for record in records] == [
        str(tmp_path / "coco/train2017/000000000001.jpg"),
        str(tmp_path / "coco/val2017/000000000002.jpg"),
    ]


def test_a_file_name_goes_before_the_url(tmp_path):
    content = lvis()
    content["images"][0]["file_name"] = "mine/a.jpg"
    assert load_instances(write(tmp_path, content), "root")[0]["file_name"] == "root/mine/a.jpg"


def test_lvis_classes_have_detectron2s_names(tmp_path):
    name = registered(tmp_path, lvis())
    load_records(name)
    assert MetadataCatalog.get(name).thing_classes == ["class 0", "class 1", "class 2"]


def test_crowds_and_ignored_annotations_stay_as_crowds(tmp_path):
    content = coco()
    content["annotations"][0]["ignore"] = 1
    records = load_instances(write(tmp_path, content), "")
    flags = {record["image_id"]: [one["iscrowd"] for one in record["annotations"]] for record in records}
    assert flags == {3: [1, 0, 0], 5: [0, 1], 9: [0]}


def test_polygons_rle_and_boxes_alone(tmp_path):
    width, height = SIZE
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[4:10, 3:20] = 1
    columns = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(columns, prepend=0, append=1 - columns[-1]))
    uncompressed = {"counts": np.diff(edges, prepend=0).tolist(), "size": [height, width]}
    compressed = coco_mask.encode(np.asfortranarray(mask))
    compressed["counts"] = compressed["counts"].decode()
    content = coco()
    content["annotations"] = [
        box(1, 3, 7, segmentation=uncompressed),
        box(2, 3, 7, segmentation=compressed),
        box(3, 3, 7, x=3, y=4, w=17, h=6),
        box(4, 5, 2, segmentation=[]),
        {key: value for key, value in box(5, 5, 2).items() if key != "segmentation"},
    ]
    write_images(tmp_path / "images", "3.png", "5.png")
    records = load_instances(write(tmp_path, content), str(tmp_path / "images"))
    cfg = config()
    cfg.INPUT.MASK_FORMAT = "bitmask"
    mapper = CheckedMapper(cfg, True)
    masks = mapper(records[0])["instances"].gt_masks.tensor
    assert masks.shape == (3, height, width)
    assert all(torch.equal(one, torch.from_numpy(mask).bool()) for one in masks)
    boxes = mapper(records[1])["instances"]
    assert not boxes.has("gt_masks")
    assert boxes.gt_boxes.tensor.tolist() == [[2, 3, 12, 11]] * 2


def test_polygons_without_area_are_left_out_and_said(tmp_path, caplog):
    content = coco()
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
    content["annotations"][2]["segmentation"].append([1, 2])
    records = load_instances(write(tmp_path, content), "")
    assert len(records[0]["annotations"]) == 2
    assert [len(one["segmentation"]) for one in records[0]["annotations"]] == [1, 1]
    assert "Leaving out 1 annotations" in caplog.text


def broken(part, index, **changes):
    content = coco()
    entry = content[part][index]
    for key, value in changes.items():
        entry[key] = value
        if value is None:
            del entry[key]
    return content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"images": [', "expected annotations as JSON"),
        ("[]", "got no 'categories'"),
        ({**coco(), "annotations": None}, "got no 'annotations'"),
        ({**coco(), "categories": []}, "expected images and categories"),
        ({**coco(), "images": [], "annotations": []}, "expected images and categories"),
        ({**coco(), "images": ["a.png"]}, "of each image .* in entry 0"),
        (broken("annotations", 1, category_id=3), "1 have another category_id: 3 of annotation 12"),
        (broken("annotations", 1, category_id="7"), "another category_id: '7' of annotation 12"),
        (broken("annotations", 2, image_id=77), "1 have another image_id: 77 of annotation 13"),
        (broken("annotations", 2, id=11), "ids of the annotations .*, each once, got 11 again"),
        (broken("images", 2, id=5), "ids of the images .*, each once, got 5 again"),
        (broken("categories", 2, id=2), "ids of the categories .*, each once, got 2 again"),
        (broken("annotations", 1, bbox=None), "got no bbox in entry 1"),
        (broken("annotations", 1, bbox=[1, 2, 3]), r"got \[1, 2, 3\] in annotation 12"),
        (broken("annotations", 1, bbox=[1, 2, float("nan"), 3]), "in annotation 12"),
        (broken("annotations", 1, bbox=[1, 2, "3", 3]), "in annotation 12"),
        (broken("images", 1, width=None), "got no width in entry 1"),
        (broken("images", 1, id="three"), "ids of the images .*, each once, got 'three'"),
        (broken("images", 1, file_name=None), "file_name or coco_url of image 3 .* got neither"),
        (broken("categories", 0, name=None), "got no name in entry 0"),
        (broken("annotations", 1, segmentation=[1, 2, 3, 4, 5, 6]), "expected polygons .* annotation 12"),
        (broken("annotations", 1, segmentation={"counts": "a"}), "expected polygons .* annotation 12"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path, content, sentence):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=sentence) as caught:
        load_instances(path, "")
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_when_it_is_used():
    name = unique()
    register_instances(name, "nowhere.json", "images")
    with pytest.raises(InputError, match=r"^expected annotations at 'nowhere.json', but there is no such file$"):
        load_records(name)


# ------------------------------------------------------------------------------------------------------ registration


def test_own_datasets_of_a_config(tmp_path):
    first, second = unique(), unique()
    path = write(tmp_path, coco())
    cfg = config(OWN=[[first, path, "a"], (second, path, "b")])
    register_from_config(cfg)
    register_from_config(cfg)  # as every process and every run in one interpreter does
    assert MetadataCatalog.get(first).json_file == path
    assert load_records(second)[0]["file_name"] == "b/3.png"


def test_a_name_is_not_given_twice(tmp_path):
    name = registered(tmp_path, coco(), "images")
    register_instances(name, tmp_path / "annotations.json", Path("images"))
    with pytest.raises(InputError, match="choose another name"):
        register_instances(name, tmp_path / "other.json", "images")
    with pytest.raises(InputError, match="choose another name"):
        register_instances(name, tmp_path / "annotations.json", "others")
    with pytest.raises(InputError, match="choose another name"):
        register_instances("lvis_v1_train", tmp_path / "annotations.json", "images")


@pytest.mark.parametrize(
    "entry", ["name", ["name", "file"], ["name", "file", "folder", "x"], ["name", 3, "f"], ["", "", ""]]
)
def test_a_malformed_entry_is_refused(entry):
    with pytest.raises(InputError, match=r"expected entries \[name, annotation file, image folder\]"):
        register_from_config(config(OWN=[entry]))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, coco())
    name = unique()
    register_instances(name, "~/annotations.json", "~/images")
    assert load_records(name)[0]["file_name"] == str(tmp_path / "images/3.png")


def test_an_unknown_name_lists_the_known_ones():
    name = unique("mine")
    register_instances(name, "a.json", "b")
    with pytest.raises(InputError, match="got 'lvis_v2_train'") as caught:
        load_records("lvis_v2_train")
    # The youngest first, and no more than twenty: Detectron2's own LVIS sets come last.
    assert f"known are {name}, " in str(caught.value)
    assert "coco_2017" not in str(caught.value)


def test_detectron2s_own_datasets_stay_and_say_where_they_are_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    if MetadataCatalog.get("lvis_v1_val").json_file != "datasets/lvis/lvis_v1_val.json":
        pytest.skip("DETECTRON2_DATASETS was set at import")
    with pytest.raises(InputError, match=r"in 'datasets/lvis/lvis_v1_val.json', but: .* DETECTRON2_DATASETS names"):
        load_records("lvis_v1_val")
    write(tmp_path / "datasets/lvis", lvis(), "lvis_v1_val.json")
    records = load_records("lvis_v1_val")
    assert records[0]["file_name"] == "datasets/coco/train2017/000000000001.jpg"
    assert len(MetadataCatalog.get("lvis_v1_val").thing_classes) == 1203
    write(tmp_path / "datasets/lvis", '{"images": ', "lvis_v1_val.json")
    with pytest.raises(InputError, match=r"annotations of 'lvis_v1_val' in 'datasets/lvis/lvis_v1_val.json', but"):
        load_records("lvis_v1_val")


# ------------------------------------------------------------------------------------------------------------ images


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("training", [True, False])
def test_the_mapper_changes_nothing_of_a_whole_image(tmp_path, training):
    write_images(tmp_path / "images", "3.png")
    record = load_instances(write(tmp_path, coco()), str(tmp_path / "images"))[0]
    ours, stock = (mapper(config(), training)(record) for mapper in (CheckedMapper, DatasetMapper))
    assert torch.equal(ours["image"], stock["image"])
    assert ours.keys() == stock.keys()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "ppm", "tif"])
@pytest.mark.parametrize("share", [0, 0.002, 0.1, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    write_images(tmp_path, path.name)
    cut(path, share)
    record = {"file_name": str(path), "image_id": 1, "width": SIZE[0], "height": SIZE[1], "annotations": []}
    with pytest.raises(InputError, match="expected a whole image of 32 x 24 pixels") as caught:
        CheckedMapper(config(), True)(record)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_and_a_missing_one_are_named(tmp_path):
    write_images(tmp_path / "images", "3.png", size=(10, 24))
    records = load_instances(write(tmp_path, coco()), str(tmp_path / "images"))
    mapper = CheckedMapper(config(), True)
    with pytest.raises(InputError, match=r"images/3.png', but: Mismatched image shape.*correct its entry"):
        mapper(records[0])
    with pytest.raises(InputError, match=r"images/5.png', but: .*No such file"):
        mapper(records[1])


class Faulty(Augmentation):
    def get_transform(self, image):
        raise ValueError("a fault in an augmentation of one's own")


def test_an_error_in_code_of_ones_own_keeps_its_traceback_and_names_the_image(tmp_path):
    write_images(tmp_path / "images", "3.png")
    record = load_instances(write(tmp_path, coco()), str(tmp_path / "images"))[0]
    mapper = CheckedMapper(config(), True)
    mapper.augmentations = AugmentationList([Faulty()])
    with pytest.raises(ValueError, match=r"^a fault in an augmentation") as caught:
        mapper(record)
    assert not isinstance(caught.value, InputError)
    assert caught.traceback[-1].name == "get_transform"
    assert caught.value.__notes__ == [f"while loading {str(tmp_path / 'images/3.png')!r}"]

    def records():
        return {}["no such key"]

    name = unique()
    DatasetCatalog.register(name, records)
    with pytest.raises(KeyError, match="no such key") as caught:
        load_records(name)
    assert caught.traceback[-1].name == "records"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_stops_the_loaders_with_its_sentence(tmp_path, workers):
    write_images(tmp_path / "images", "3.png", "5.png", "9.png")
    name = registered(tmp_path, coco())
    bad = tmp_path / "images/5.png"
    cut(bad, 0.5)
    cfg = config(TRAIN=(name,))
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.SOLVER.IMS_PER_BATCH = 1
    train = build_detection_train_loader(cfg, mapper=CheckedMapper(cfg, True))
    test = build_detection_test_loader(cfg, name, mapper=CheckedMapper(cfg, False))
    for loader in (train, test):
        with pytest.raises(InputError) as caught:
            for _, _ in zip(range(10), loader, strict=False):
                pass
        sentence = sentence_of(caught.value)
        assert sentence.startswith(f"expected a whole image of 32 x 24 pixels at {str(bad)!r}, but: ")
        assert sentence.endswith("correct its entry in the annotations")


def test_a_file_name_of_2014_leads_to_where_the_url_says(tmp_path):
    # LVIS v0.5: COCO_train2014_... in file_name, the images in train2017.
    content = coco()
    for image in content["images"]:
        image["coco_url"] = f"http://images.example.org/train2017/{image['file_name']}"
        image["file_name"] = f"COCO_train2014_{image['file_name']}"
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "3.png").touch()
    found = {
        record["image_id"]: Path(record["file_name"]).relative_to(tmp_path).as_posix()
        for record in load_instances(str(write(tmp_path, content)), str(tmp_path))
    }
    assert found == {3: "train2017/3.png", 5: "COCO_train2014_5.png", 9: "COCO_train2014_9.png"}


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"expected an image in a file, got '.*a\.png', a device or a pipe"):
        CheckedMapper(config(), True)({"file_name": str(tmp_path / "a.png"), "width": 8, "height": 8})
