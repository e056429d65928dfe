"""scripts/make_long_tail_shapes.py: a set in LVIS v1's format, and the same one again from the same seed."""

import filecmp
import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import cv2
import numpy as np
from detectron2.data.datasets import load_lvis_json
from lvis import LVIS
from PIL import Image
from pycocotools import mask as coco_mask

PATH = Path(__file__).parents[2] / "scripts" / "make_long_tail_shapes.py"
SPEC = importlib.util.spec_from_file_location("make_long_tail_shapes", PATH)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

TINY = ["--images", "13", "--most", "6", "--val-per-class", "1"]


def make(out, *options):
    return script.main(["--out", str(out), *TINY, *options])


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set large enough to have frequent classes."""
    out = tmp_path_factory.mktemp("shapes") / "set"
    assert make(out, "--images", "120", "--most", "120", "--val-per-class", "3") == 0
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "set"
    assert make(out) == 0
    return out


@pytest.fixture(params=["train", "val"])
def split(request):
    return request.param


@pytest.fixture
def content(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def test_one_seed_gives_the_same_files_and_another_does_not(tiny, tmp_path):
    assert make(tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(tiny)
    for name in files(tiny):
        one, two = tiny / name, tmp_path / "again" / name
        assert one.is_dir() or filecmp.cmp(one, two, shallow=False)
    assert make(tmp_path / "other", "--seed", "1") == 0
    assert not filecmp.cmp(tiny / "train.json", tmp_path / "other" / "train.json", shallow=False)


def test_the_training_set_is_long_tailed(folder):
    content = json.loads((folder / "train.json").read_text())
    counts = Counter(annotation["category_id"] for annotation in content["annotations"])
    falling = sorted(counts.values(), reverse=True)
    assert len(falling) == 20
    assert (falling[0], falling[-1]) == (120, 2)
    # Geometric: 60 to the 19th root between neighbours, up to rounding.
    assert falling == [round(120 * 60 ** (-rank / 19)) for rank in range(20)]
    # In no order that a class's shape, texture or id could tell.
    assert [counts[label] for label in range(1, 21)] not in (falling, falling[::-1])


def test_the_validation_set_is_balanced(folder):
    content = json.loads((folder / "val.json").read_text())
    assert Counter(a["category_id"] for a in content["annotations"]) == dict.fromkeys(range(1, 21), 3)


def test_categories_tell_what_is_in_the_training_set(folder, content):
    train = json.loads((folder / "train.json").read_text())
    assert content["categories"] == train["categories"]
    for category in content["categories"]:
        instances = [a["image_id"] for a in train["annotations"] if a["category_id"] == category["id"]]
        assert category["instance_count"] == len(instances)
        images = category["image_count"] = len(set(instances))
        assert category["frequency"] == ("r" if images <= 10 else "c" if images <= 100 else "f")
        assert category["synonyms"] == [category["name"]]
    assert [category["id"] for category in content["categories"]] == list(range(1, 21))
    assert len({category["name"] for category in content["categories"]}) == 20


def test_ids_are_unique_and_valid(folder, content):
    images = [image["id"] for image in content["images"]]
    assert len(set(images)) == len(images)
    annotations = [annotation["id"] for annotation in content["annotations"]]
    assert len(set(annotations)) == len(annotations)
    assert {annotation["image_id"] for annotation in content["annotations"]} <= set(images)
    other = json.loads((folder / ("val.json" if content["images"][0]["id"] == 1 else "train.json")).read_text())
    assert not {image["id"] for image in other["images"]} & set(images)


def test_every_image_is_there(folder, split, content):
    assert len(list((folder / split).iterdir())) == len(content["images"])
    for image in content["images"]:
        with Image.open(folder / split / image["coco_url"].split("/")[-1]) as picture:
            assert picture.size == (image["width"], image["height"]) == (128, 128)


def test_boxes_and_areas_are_those_of_the_masks(content):
    for annotation in content["annotations"]:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
        assert points.min() >= 0
        assert points.max() <= 128
        left, top, width, height = annotation["bbox"]
        assert np.array_equal([left, top], points.min(axis=0))
        assert np.allclose([left + width, top + height], points.max(axis=0), atol=1e-9)
        # Rasterised, an outline's pixels are its area, but for those that the edge cuts.
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], 128, 128)))
        assert abs(mask.sum() - annotation["area"]) <= 0.5 * (width + height)
        assert annotation["area"] > 20


def test_a_mask_is_what_is_seen_of_a_shape(folder, split, content):
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: folder / split / image["coco_url"].split("/")[-1] for image in content["images"]}
    covered = {image: np.zeros((128, 128), dtype=int) for image in files}
    spreads = {"solid": [], "striped": []}
    for annotation in content["annotations"]:
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], 128, 128)))
        covered[annotation["image_id"]] += mask
        inner = np.logical_and.reduce([np.roll(mask, step, axis) for step in (-1, 1) for axis in (0, 1)])
        picture = np.asarray(Image.open(files[annotation["image_id"]]), dtype=float)
        texture = names[annotation["category_id"]].split("_")[0]
        spreads[texture].append(np.abs(picture[inner] - np.median(picture[inner], axis=0)).mean())
    # Within a solid shape nothing varies but the noise: 12 levels, 0.8 of it as the mean deviation. Stripes vary more.
    assert np.quantile(spreads["solid"], 0.9) < 12
    assert np.quantile(spreads["striped"], 0.1) > 20
    # Where shapes overlap, only the front one has the pixels: two masks share edges alone.
    masks = np.stack(list(covered.values()))
    assert (masks > 1).sum() < 0.01 * (masks > 0).sum()


def test_negatives_are_absent_and_not_exhaustive_ones_present(content):
    present = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    for image in content["images"]:
        assert not present[image["id"]] & set(image["neg_category_ids"])
        assert set(image["not_exhaustive_category_ids"]) <= present[image["id"]]
        assert set(image["neg_category_ids"]) <= set(range(1, 21))
    assert all(present.values())
    assert any(image["not_exhaustive_category_ids"] for image in content["images"])
    negatives = np.mean([len(image["neg_category_ids"]) for image in content["images"]])
    # Half of the 14 to 19 absent classes: some are neither present nor negative.
    assert 6 < negatives < 10


def test_shapes_overlap_and_every_one_can_be_seen():
    rng = np.random.default_rng(0)
    circle = script.CLASSES.index(("circle", "solid"))
    visible = []
    for _ in range(15):
        for polygons in script.draw(rng, [circle] * 8)[1]:
            points = np.concatenate(polygons).astype(np.float32)
            radius = cv2.minEnclosingCircle(points)[1]
            visible.append(sum(cv2.contourArea(p.astype(np.float32)) for p in polygons) / (np.pi * radius**2))
    # The least circle around what is seen is no larger than the whole, so a share of 60 % is one of 60 % here too.
    assert min(visible) > 0.57
    assert np.mean(np.array(visible) < 0.9) > 0.2


def test_shapes_are_those_of_their_names():
    corners = {"square": 4, "triangle": 3, "pentagon": 5, "cross": 12, "tee": 8, "arrow": 7, "star": 10}
    for name, outline in script.SHAPES.items():
        assert np.linalg.norm(outline, axis=1).max() == pytest.approx(1)
        assert len(outline) == corners.get(name, len(outline))
        # All turn one way round, without crossing themselves: the outline's area is the filled one's.
        large = np.round(outline * 1000 + 1000).astype(np.int32)
        filled = cv2.fillPoly(np.zeros((2001, 2001), np.uint8), [large], 1).sum()
        assert cv2.contourArea(large) == pytest.approx(filled, rel=0.01)


def test_lvis_and_detectron2_read_it(folder, split):
    api = LVIS(str(folder / f"{split}.json"))
    assert len(api.get_cat_ids()) == 20
    dicts = load_lvis_json(str(folder / f"{split}.json"), f"{folder}/")
    assert all(Path(record["file_name"]).is_file() for record in dicts)
    assert {a["category_id"] for record in dicts for a in record["annotations"]} == set(range(20))


def test_the_same_again_is_fine_and_anything_else_is_refused(tiny, capsys):
    before = (tiny / "train.json").stat().st_mtime_ns
    assert make(tiny) == 0
    assert (tiny / "train.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert make(tiny, "--seed", "1") == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected a new folder" in sentence
    assert str(tiny) in sentence
    assert (tiny / "train.json").stat().st_mtime_ns == before
    assert [path.name for path in tiny.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("found", ["empty", "file", "more", "less", "changed"])
def test_another_folder_or_file_is_refused_and_kept(tiny, tmp_path, found):
    out = tmp_path / "out"
    if found == "empty":
        out.mkdir()
    elif found == "file":
        out.write_text("mine")
    else:
        shutil.copytree(tiny, out)
        image = next((out / "val").iterdir())
        if found == "more":
            (out / "val" / "mine.txt").write_text("mine")
        elif found == "less":
            image.unlink()
        else:
            image.write_bytes(image.read_bytes()[:-1] + b"?")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert make(out) == 2
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_nothing_stays_behind_when_it_breaks_off(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "make_categories", interrupted)
    assert make(tmp_path / "out") == 130
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [["--images", "0"], ["--most", "1"], ["--val-per-class", "0"], ["--seed", "-1"], ["--images", "9999"]],
)
def test_numbers_that_make_no_set_are_refused(tmp_path, options, capsys):
    assert make(tmp_path / "new" / "out", *options) == 2
    assert "expected" in capsys.readouterr().err
    assert files(tmp_path) == []
