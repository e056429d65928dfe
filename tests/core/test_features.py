"""Features: what they refuse, and how they are kept."""

import json
import os
import re

import numpy as np
import pytest
import torch

import disalign
from disalign import Features, InputError
from disalign.io.arrays import BLOCK


def arrays(rows=2500, width=6, classes=4, seed=0):
    random = np.random.default_rng(seed)
    labels = np.sort(random.integers(classes, size=rows))
    labels[:classes] = np.arange(classes)
    return random.normal(size=(rows, width)).astype(np.float32), labels


def test_counts_and_weights_come_from_the_labels():
    x, y = arrays()
    features = Features.from_arrays(x, y)
    assert len(features) == 2500
    assert features.class_counts.tolist() == [int((y == label).sum()) for label in range(4)]
    assert features.weights.dtype == torch.float64
    assert features.weights.tolist() == [1.0] * 2500
    assert features.x.data_ptr() == x.ctypes.data  # not copied


def test_a_part_keeps_the_counts_of_the_whole():
    x, y = arrays()
    y[[1, 3]] = 2, 3
    features = Features.from_arrays(x, y, np.linspace(1, 2, 2500), groups=range(2500))
    part = features.part(torch.tensor([3, 1]))
    assert part.y.tolist() == [3, 2]
    assert torch.equal(part.weights, features.weights[[3, 1]])
    assert part.class_counts is features.class_counts
    assert part.groups.tolist() == [3, 1]
    assert torch.equal(part.x, features.x[[3, 1]])


def test_a_background_is_the_label_behind_the_counted_ones():
    x, _ = arrays(4)
    features = Features.from_arrays(x, [0, 1, 2, 2], background=True)
    assert features.class_counts.tolist() == [1, 1]
    with pytest.raises(InputError, match=re.escape("expected labels in [0, 2), got 2, 2")):
        Features.from_arrays(x, [0, 1, 2, 2], class_counts=[1, 1])


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32, np.int64])
def test_labels_of_any_whole_dtype(kind):
    x, y = arrays()
    assert torch.equal(Features.from_arrays(x, y.astype(kind)).y, torch.from_numpy(y))


@pytest.mark.parametrize("layout", [lambda x: x[::-1], lambda x: x.astype(">f4"), np.asfortranarray])
def test_arrays_of_any_layout(layout):
    x, y = arrays()
    assert torch.equal(Features.from_arrays(layout(x), y).x, torch.tensor(layout(x).astype(np.float32).copy()))
    assert Features.from_arrays(x, y.astype(np.uint16)).y.tolist() == y.tolist()


def test_a_provenance_that_is_not_json_is_kept_as_text(tmp_path):
    Features.from_arrays(X, Y, provenance={"path": tmp_path}).save(tmp_path / "x")
    assert Features.open(tmp_path / "x").provenance == {"path": str(tmp_path)}


def with_nan(x, *rows):
    x = x.copy()
    x[list(rows), 1] = np.nan
    return x


X, Y = arrays(1500)
REFUSED = {
    "NaN rows by number": ((with_nan(X, 2, 1400), Y), "NaN or infinity in 2 rows: 2, 1400"),
    "beyond fp16": (
        (np.full((1500, 6), np.inf, np.float16), Y),
        "in 1500 rows: 0, 1, 2, 3, 4 and 1495 more",
    ),
    "one row": ((X[0], Y), "expected features of shape (N, d) in fp16, fp32 or fp64"),
    "whole numbers": ((X.astype(int), Y), "got torch.int64"),
    "tokens": ((X.reshape(1500, 3, 2), Y), "of shape (1500, 3, 2); pool or flatten them"),
    "no rows": ((X[:0], Y[:0]), "one row an example"),
    "fewer labels": ((X, Y[:-1]), "expected 1500 labels, one for each row of the features, got shape (1499,)"),
    "one-hot labels": ((X, np.eye(4)[Y]), "got shape (1500, 4)"),
    "a negative label": ((X, np.where(Y == 1, -1, Y)), "expected labels in [0, 4), got -1"),
    "an ignored label": ((X, np.where(Y == 1, -100, Y)), "expected labels in [0, 4), got -100"),
    "soft labels": ((X, Y / 2), "expected one whole label per sample"),
    "a label of three thousand million": ((X, np.where(Y == 1, 3_000_000_000, Y)), "got 3000000000"),
    "negative weights": ((X, Y, np.where(Y == 1, -1, 1)), "expected weights that are finite, not negative"),
    "words as labels": ((X, [str(label) for label in Y]), "expected arrays of numbers, got list"),
    "ragged rows": (([[1.0], [1.0, 2.0]], [0, 1]), "expected arrays of numbers, got list"),
    "fractions as groups": ((X, Y, None, None, Y + 0.5), "expected whole numbers as groups"),
    "infinite weights": ((X, Y, np.where(Y == 1, np.inf, 1)), "expected weights that are finite"),
    "fewer weights": ((X, Y, np.ones(1499)), "expected 1500 weights, one for each row of the features"),
    "fewer groups": ((X, Y, None, None, Y[:-1]), "expected 1500 groups, one for each row of the features"),
    "no weight": ((X, Y, np.zeros(1500)), "not all zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    given, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        Features.from_arrays(*given)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_saved_and_opened_they_are_the_same(dtype, tmp_path):
    x, y = arrays()
    options = {"weights": np.linspace(0, 2, 2500), "groups": np.arange(2500) // 5, "class_counts": [900, 900, 900, 900]}
    features = Features.from_arrays(x.astype(dtype), y, **options, provenance={"trunk": "abc"})
    features.save(tmp_path / "here")
    found = Features.open(tmp_path / "here")
    for name in ("x", "y", "weights", "groups", "class_counts"):
        assert torch.equal(getattr(found, name), getattr(features, name)), name
    assert found.provenance == {"trunk": "abc"}
    with pytest.raises(InputError, match="expected a new or empty folder"):
        features.save(tmp_path / "here")


def test_a_background_is_kept(tmp_path):
    Features.from_arrays(X[:3], [0, 1, 2], background=True).save(tmp_path)
    assert Features.open(tmp_path).background


def test_cells_and_totals_are_kept(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    bilinear, totals = np.full((3, 4), 0.25, np.float32), [5.0, 0.0, 2.5]
    features = Features.from_arrays(x, [0, 1, 2], bilinear=bilinear, totals=totals)
    features.save(tmp_path)
    found = Features.open(tmp_path)
    assert torch.equal(found.x, features.x)
    assert found.bilinear.tolist() == bilinear.tolist()
    assert found.totals.tolist() == totals
    part = found.part(torch.tensor([2]))
    assert part.x.tolist() == x[2:].tolist()
    assert part.bilinear.shape == (1, 4)
    assert part.totals is None  # its own rows' sums
    assert repr(found) == "Features(3 x 4 x 6 float32, 3 classes)"


CELLS = {
    "cells without weights": ({}, "expected features of shape (N, d) in"),
    "weights of other cells": ({"bilinear": np.ones((3, 5))}, "expected bilinear weights of shape (3, 4)"),
    "weights that are NaN": ({"bilinear": np.full((3, 4), np.nan)}, "expected finite features, got NaN or infinity"),
    "totals of other classes": ({"bilinear": np.ones((3, 4)), "totals": [1.0]}, "expected totals of 3 labels"),
    "no totals": ({"bilinear": np.ones((3, 4)), "totals": [0.0] * 3}, "expected totals of 3 labels"),
    "NaN in totals": ({"bilinear": np.ones((3, 4)), "totals": [1, 1, np.nan]}, "expected totals of 3 labels"),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_that_do_not_fit_are_refused(name):
    options, sentence = CELLS[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        Features.from_arrays(np.zeros((3, 4, 6), np.float32), [0, 1, 2], **options)


def test_what_is_opened_never_writes_to_its_files(tmp_path):
    Features.from_arrays(X, Y).save(tmp_path)
    before = (tmp_path / "x.npy").read_bytes()
    Features.open(tmp_path).x.fill_(0)
    assert (tmp_path / "x.npy").read_bytes() == before


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def set_record(folder, **values):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGED = {
    "a flipped bit of a feature": lambda f: flip(f / "x.npy", -1),
    "a flipped bit of a label": lambda f: flip(f / "y.npy", -8),
    "a flipped bit of a block's last row": lambda f: flip(f / "x.npy", -(1500 - BLOCK) * 24 - 1),
    "a flipped bit of a block's first row": lambda f: flip(f / "x.npy", -(1500 - BLOCK) * 24),
    "a flipped bit of a header": lambda f: flip(f / "x.npy", 3),
    "a truncated file": lambda f: os.truncate(f / "x.npy", 1000),
    "an empty file": lambda f: os.truncate(f / "y.npy", 0),
    "a missing file": lambda f: (f / "weights.npy").unlink(),
    "a missing record": lambda f: (f / "record.json").unlink(),
    "a truncated record": lambda f: os.truncate(f / "record.json", 50),
    "another record": lambda f: (f / "record.json").write_text("[]"),
    "a record of another version": lambda f: set_record(f, format=2),
    "a record of blocks of another size": lambda f: set_record(f, block=512),
    "a record of another dtype": lambda f: set_record(f, arrays={"x": ["<f8", 6], "y": ["<i8"], "weights": ["<f8"]}),
    "a record of odd types": lambda f: set_record(f, arrays={"x": 3}),
    "a record of more rows": lambda f: set_record(f, rows=10**12),
    "a record of infinitely many rows": lambda f: set_record(f, rows=float("inf")),
    "a record of an odd provenance": lambda f: set_record(f, facts={"class_counts": None, "provenance": 5}),
    "a record of other arrays": lambda f: set_record(f, arrays={"z": ["<i8"]}, checksums={}),
    "an unfinished record": lambda f: set_record(f, checksums={}),
    "a pickle": lambda f: np.save(f / "y.npy", np.array([None] * 1500), allow_pickle=True),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(name, tmp_path):
    Features.from_arrays(X, Y).save(tmp_path)
    DAMAGED[name](tmp_path)
    with pytest.raises(InputError, match="expected "):
        Features.open(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        Features.open(tmp_path / "nowhere")


def test_blocks_are_what_this_test_supposes():
    assert 1500 > BLOCK > 1000
    assert repr(disalign.Features.from_arrays(X, Y)) == "Features(1,500 x 6 float32, 4 classes)"
