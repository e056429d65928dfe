"""scripts/make_tiny_ade.py: ADE20K's layout, every class, a long tail, and the same pixels from the same seed."""

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PATH = Path(__file__).parents[2] / "scripts" / "make_tiny_ade.py"
SPEC = importlib.util.spec_from_file_location("make_tiny_ade", PATH)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

SPLITS = {"training": ("train", 16), "validation": ("val", 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ade") / "new" / "set"
    start = time.perf_counter()
    assert script.main([str(out)]) == 0
    assert time.perf_counter() - start < 2
    return out


def masks(folder, split="training"):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "annotations" / split).iterdir())]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("split", SPLITS)
def test_images_and_annotations_are_named_as_ade20ks(folder, split):
    prefix, number = SPLITS[split]
    names = [f"ADE_{prefix}_{index:08d}" for index in range(1, number + 1)]
    assert sorted(os.listdir(folder / "images" / split)) == [f"{name}.jpg" for name in names]
    assert sorted(os.listdir(folder / "annotations" / split)) == [f"{name}.png" for name in names]
    sizes = set()
    for name in names:
        image = Image.open(folder / "images" / split / f"{name}.jpg")
        annotation = Image.open(folder / "annotations" / split / f"{name}.png")
        assert (image.mode, annotation.mode) == ("RGB", "L")
        assert image.size == annotation.size
        assert 64 <= image.size[0] <= 96
        assert 64 <= image.size[1] <= 80
        sizes.add(image.size)
    assert len(sizes) > 1


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_occurs_and_every_image_has_unlabelled_pixels(folder, split):
    found = masks(folder, split)
    assert set().union(*(mask.ravel().tolist() for mask in found)) == set(range(151))
    assert all((mask == 0).any() for mask in found)


def test_the_classes_have_a_long_tail(tmp_path):
    assert script.main([str(tmp_path / "set"), "--classes", "20", "--train", "40", "--val", "2"]) == 0
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks(tmp_path / "set")]))
    assert len(counts) == 21
    assert counts[1:4].sum() > counts[4:].sum() / 2
    assert counts[1] > 5 * counts[11:].mean()


def test_the_colour_tells_the_class(folder):
    """Nearest mean colour, learned on one split, on the other: far above chance, so a network can learn it."""

    def pixels(split):
        images = sorted((folder / "images" / split).iterdir())
        colours = np.concatenate([np.asarray(Image.open(path), dtype=float).reshape(-1, 3) for path in images])
        return colours, np.concatenate([mask.ravel() for mask in masks(folder, split)])

    colours, labels = pixels("training")
    means = np.stack([colours[labels == label].mean(axis=0) for label in range(1, 151)])
    colours, labels = pixels("validation")
    colours, labels = colours[labels > 0][::7], labels[labels > 0][::7]
    guesses = np.linalg.norm(colours[:, None] - means, axis=2).argmin(axis=1) + 1
    assert (guesses == labels).mean() > 0.3


def test_one_seed_gives_the_same_files_and_another_does_not(folder, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    assert script.main([str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == files(folder)
    assert script.main([str(tmp_path / "other"), "--seed", "1"]) == 0
    assert files(tmp_path / "other") != files(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--train", "0"], "expected at least 1 as --train, --val and --size and 0 as --seed, got 0, 8, 64 and 0"),
        (["--seed", "-1"], "and 0 as --seed"),
        (["--classes", "151"], "expected 1 to 150 --classes, got 151"),
        (["--classes", "0"], "expected 1 to 150 --classes, got 0"),
        (["--size", "8"], "expected 8 pixels or more for each of an image's 38 patches, got --size 8"),
    ],
)
def test_refused_options_leave_nothing(tmp_path, capsys, options, sentence):
    assert script.main([str(tmp_path / "set"), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    for out in (tmp_path, tmp_path / "note", tmp_path / "note" / "set"):
        assert script.main([str(out)]) == 2
        assert repr(str(out)) in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"note": "mine"}


def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch, capsys):
    real = script.make_split

    def break_off(rng, folder, split, *rest):
        if split == "validation":
            raise OSError("no space left on device")
        real(rng, folder, split, *rest)

    monkeypatch.setattr(script, "make_split", break_off)
    assert script.main([str(tmp_path / "set")]) == 2
    assert "no space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
