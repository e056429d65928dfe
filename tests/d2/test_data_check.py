import logging
import os

import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from disalign import InputError
from disalign_d2 import add_disalign_config
from disalign_d2.data_check import check_data, missing_files, require_data
from disalign_d2.datasets import register_instances

from .annotations import box, coco, lvis, unique, write, write_images


def config(train=(), test=(), classes=3, calibrate=True):
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.DISALIGN.CALIBRATE = calibrate
    return cfg


def registered(folder, content, name="set"):
    name = unique(name)
    register_instances(name, write(folder, content, f"{name}.json"), folder / "images")
    return name


@pytest.fixture
def whole(tmp_path):
    """A folder with the images of ``coco()``."""
    write_images(tmp_path / "images", "3.png", "5.png", "9.png")
    return tmp_path


def only(problems):
    assert len(problems) == 1, problems
    assert "\n" not in problems[0]
    return problems[0]


def test_nothing_to_say_of_whole_data(whole, caplog):
    caplog.set_level(logging.INFO)
    train, test = registered(whole, coco()), registered(whole, coco())
    cfg = config((train,), (test,))
    assert check_data(cfg, decode=True) == []
    require_data(cfg, training=True)
    require_data(cfg, training=False)
    assert f"{train}: 3 images and 5 annotations of 3 classes" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_missing_files_against_one_look_at_each(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png", "b/c.png", "b/d.png")
    paths = [str(tmp_path / name) for name in ("a.png", "x.png", "b/d.png", "b/a.png", "no/a.png", "b")]
    assert missing_files(paths) == [path for path in paths if not os.path.exists(path)]
    monkeypatch.chdir(tmp_path)
    assert missing_files(["a.png", "b/c.png", "c.png"]) == ["c.png"]


def test_unknown_datasets_and_missing_annotations(whole):
    name = unique()
    register_instances(name, whole / "no.json", whole)
    problems = check_data(config(("what",), (name,)))
    assert len(problems) == 2
    assert "got 'what'" in problems[0]
    assert "no.json', but there is no such file" in problems[1]


def test_missing_images_are_counted_and_named(whole):
    (whole / "images/3.png").unlink()
    (whole / "images/9.png").unlink()
    name = registered(whole, coco())
    problem = only(check_data(config((name,))))
    folder = str(whole / "images")
    assert (
        f"expected 3 images of {name!r}, but 2 are missing: {folder}/3.png, {folder}/9.png; check the path" in problem
    )


def test_lvis_val_wants_train2017(tmp_path):
    write_images(tmp_path / "images", "val2017/000000000002.jpg")
    name = registered(tmp_path, lvis())
    folder = str(tmp_path / "images/train2017")
    assert f"1 are missing: {folder}/000000000001.jpg; check the path" in only(check_data(config((name,))))
    write_images(tmp_path / "images", "train2017/000000000001.jpg")
    assert check_data(config((name,))) == []


def test_detectron2s_lvis_val_wants_train2017(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if MetadataCatalog.get("lvis_v1_val").json_file != "datasets/lvis/lvis_v1_val.json":
        pytest.skip("DETECTRON2_DATASETS was set at import")
    write(tmp_path / "datasets/lvis", lvis(), "lvis_v1_val.json")
    write_images(tmp_path / "datasets/coco", "val2017/000000000002.jpg")
    with pytest.raises(InputError, match=r"1 are missing: datasets/coco/train2017/.*DETECTRON2_DATASETS names"):
        require_data(config(test=("lvis_v1_val",), classes=1203), training=False)


def test_the_number_of_classes(whole):
    name = registered(whole, coco())
    problem = only(check_data(config((name,), classes=80)))
    assert f"expected MODEL.ROI_HEADS.NUM_CLASSES 3, the classes of {name!r}, got 80" in problem


def test_a_class_out_of_range_in_a_dataset_that_others_registered(whole):
    name = unique()
    records = [{"file_name": str(whole / "images/3.png"), "annotations": [{"category_id": 5}]}]
    DatasetCatalog.register(name, lambda: records)
    assert f"in {name!r}: expected annotations of classes 0..2, got 5" in only(check_data(config((name,))))


def test_training_and_test_must_have_the_same_classes(whole):
    train = registered(whole, coco())
    content = coco()
    content["categories"][0]["name"] = "emu"
    other = registered(whole, content)
    problem = only(check_data(config((train,), (other,))))
    assert f"the 3 classes of {train!r} in {other!r}" in problem
    assert "1 differ: class 2 is 'emu', not 'dog'" in problem
    content["categories"].append({"id": 1, "name": "ape"})
    longer = registered(whole, content)
    assert f"expected the 3 classes of {train!r} in {longer!r}, in the same order, got 4" in only(
        check_data(config((train,), (longer,)))
    )


def test_other_ids_of_the_same_classes_are_fine(whole):
    content = coco()
    for entry in content["categories"]:
        entry["id"] += 100
    for entry in content["annotations"]:
        entry["category_id"] += 100
    assert check_data(config((registered(whole, coco()),), (registered(whole, content),))) == []


@pytest.mark.parametrize(("calibrate", "source"), [(True, ""), (True, "counts"), (False, "")])
def test_classes_without_training_instances(whole, caplog, calibrate, source):
    content = coco()
    content["categories"].append({"id": 1, "name": "ape"})
    content["annotations"].append(box(99, 3, 1, iscrowd=1))
    cfg = config((registered(whole, content),), classes=4, calibrate=calibrate)
    if source:
        cfg.MODEL.DISALIGN.CLASS_COUNTS = write(whole, [1, 2, 3, 4], "counts.json")
    problems = check_data(cfg)
    if calibrate and not source:
        assert "expected at least one of the instances per class, got none of 1 classes" in only(problems)
        assert ": ape; drop these categories" in only(problems)
    else:
        assert problems == []
    assert "1 of 4 classes have no training instance: ape; 2 of 7 annotations are crowds" in caplog.text
    assert ("differs from the counts" in caplog.text) == bool(source)


def test_no_training_instances_at_all(whole):
    content = {**coco(), "annotations": []}
    name = registered(whole, content)
    sentence = f"expected training instances in {name}, got none; check the annotations"
    assert only(check_data(config((name,), calibrate=False))) == sentence


def test_instances_are_summed_over_the_training_sets(whole):
    first, second = coco(), coco()
    first["annotations"] = [entry for entry in first["annotations"] if entry["category_id"] == 7]
    second["annotations"] = [entry for entry in second["annotations"] if entry["category_id"] != 7]
    assert check_data(config((registered(whole, first), registered(whole, second)))) == []


def test_counts_of_another_length(whole):
    cfg = config((registered(whole, coco()),))
    cfg.MODEL.DISALIGN.CLASS_COUNTS = "lvis_v1"
    assert "expected 3 class counts" in only(check_data(cfg))
    cfg.MODEL.DISALIGN.CALIBRATE = False
    assert check_data(cfg) == []


def test_rle_masks_need_bitmasks(whole):
    content = coco()
    content["annotations"][0]["segmentation"] = {"counts": [700, 60, 8], "size": [24, 32]}
    name = registered(whole, content)
    cfg = config((name,), (name,))
    assert "1 masks are RLE; set it to 'bitmask'" in only(check_data(cfg))
    require_data(cfg, training=False)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    assert check_data(cfg) == []


def test_boxes_alone(whole):
    mixed, bare = coco(), coco()
    del mixed["annotations"][0]["segmentation"]
    for entry in bare["annotations"]:
        del entry["segmentation"]
    mixed, bare = registered(whole, mixed), registered(whole, bare)
    # Stage one needs masks of all; stage two needs none, but Detectron2 wants all or none of an image.
    assert "but 1 have none" in only(check_data(config((mixed,), calibrate=False)))
    assert "but 1 have none" in only(check_data(config((mixed,))))
    assert "but 5 have none" in only(check_data(config((bare,), calibrate=False)))
    assert check_data(config((bare,))) == []
    cfg = config((mixed,), calibrate=False)
    cfg.MODEL.MASK_ON = False
    assert check_data(cfg) == []


def test_boxes_without_area_are_detectron2s_to_leave_out(whole):
    content = coco()
    content["annotations"][0]["bbox"] = [1, 2, 0, 5]
    content["annotations"][1]["bbox"] = [1, 2, 5, -1]
    assert check_data(config((registered(whole, content),))) == []


def test_broken_images_are_found_by_decoding(whole):
    path = whole / "images/5.png"
    path.write_bytes(path.read_bytes()[:-100])
    write_images(whole / "images", "9.png", size=(8, 8))
    cfg = config((registered(whole, coco()),))
    assert check_data(cfg) == []
    problems = check_data(cfg, decode=True)
    assert len(problems) == 2
    assert f"at {str(path)!r}, but: " in problems[0]
    assert "9.png', but: Mismatched image shape" in problems[1]
    path.unlink()
    problems = check_data(cfg, decode=True)
    assert [("missing" in problem, "Mismatched" in problem) for problem in problems] == [(True, False), (False, True)]


def test_training_needs_both_sets_and_evaluation_only_its_own(whole):
    good = registered(whole, coco())
    require_data(config(("what",), (good,)), training=False)
    with pytest.raises(InputError, match="got 'what'"):
        require_data(config(("what",), (good,)), training=True)
    with pytest.raises(InputError, match="got 'what'") as caught:
        require_data(config((good,), ("what",)), training=True)
    assert "data-check" not in str(caught.value)
    with pytest.raises(InputError, match=r"dataset in DATASETS.TRAIN, got none"):
        require_data(config((), (good,)), training=True)
    with pytest.raises(InputError, match=r"dataset in DATASETS.TEST, got none"):
        require_data(config((good,), ()), training=False)
    require_data(config((good,), ()), training=True)


def test_all_problems_are_counted():
    with pytest.raises(InputError, match=r"got 'a'.*\(and 2 more, see --data-check\)$"):
        require_data(config(("a", "b"), ("c", "a")), training=True)


def test_require_data_opens_no_image(whole):
    for path in (whole / "images").iterdir():
        path.write_bytes(b"")
    require_data(config((registered(whole, coco()),)), training=True)


def boxed(whole, *boxes, **more):
    content = coco()
    for annotation, given in zip(content["annotations"], boxes, strict=False):
        annotation["bbox"] = list(given)
    for annotation in content["annotations"]:
        annotation.update(more)
    return registered(whole, content)


def test_boxes_beyond_their_image_are_mentioned(whole, caplog):
    width, height = (coco()["images"][0][key] for key in ("width", "height"))
    corners, touching = (width - 5, height - 5, width - 1, height - 1), (0, 0, width + 1, height + 1)
    name = boxed(whole, corners, touching)
    assert check_data(config((name,))) == []
    assert f"{name}: 1 of 6 boxes reach beyond their image: [" in caplog.text
    assert "a box is [x, y, width, height], not two corners" in caplog.text
    assert "fractions" not in caplog.text


@pytest.mark.parametrize("side", [(-2, 3, 9, 9), (2, -2, 9, 9), (25, 3, 9, 9), (2, 17, 9, 9)], ids=str)
def test_a_box_beyond_one_side_is_mentioned(side, whole, caplog):
    assert check_data(config((boxed(whole, side),))) == []
    assert f"1 of 6 boxes reach beyond their image: {list(side)} in 32 x 24 pixels of " in caplog.text


def test_boxes_that_are_fractions_are_mentioned(whole, caplog):
    name = boxed(whole, *[(0.1, 0.2, 0.3, 0.4)] * 6)
    assert check_data(config((name,))) == []
    assert f"{name}: all boxes lie within one pixel; are they fractions of the image?" in caplog.text
    caplog.clear()
    assert check_data(config((boxed(whole, *[(0.1, 0.2, 0.3, 0.4)] * 5),))) == []
    assert "fractions" not in caplog.text


def test_crowds_alone_are_named_as_the_reason(whole):
    problem = check_data(config((boxed(whole, iscrowd=1),)))[0]
    assert problem.startswith("expected training instances in ")
    assert "; 6 of 6 annotations are crowds, which do not train: " in problem
    assert "(CVAT marks RLE masks so), set their iscrowd to 0" in problem
