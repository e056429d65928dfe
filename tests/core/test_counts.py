"""Class counts from every kind of source, and the shipped benchmarks' known facts."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from disalign import (
    InputError,
    frequent_common_rare,
    head_body_tail,
    load_class_counts,
    many_medium_few,
    wrap_classifier,
)
from disalign.counts import BUNDLED, bundled

COUNTS = [7, 0, 3]


def sizes(groups):
    return {name: int(members.sum()) for name, members in groups.items()}


@pytest.mark.parametrize(
    "source",
    [
        COUNTS,
        tuple(COUNTS),
        [7.0, 0.0, 3.0],
        np.array(COUNTS),
        np.array(COUNTS, dtype=np.uint8),
        torch.tensor(COUNTS),
        torch.tensor(COUNTS, dtype=torch.float16),
        {0: 7, 1: 0, 2: 3},
        {2: 3, 0: 7, 1: 0},
        {"2": 3, "0": 7, "1": 0},
    ],
    ids=str,
)
def test_every_kind_of_source_gives_one_int64_tensor(source):
    counts = load_class_counts(source)
    assert counts.dtype == torch.int64
    assert counts.tolist() == COUNTS


@pytest.mark.parametrize(
    "content", [COUNTS, {"0": 7, "1": 0, "2": 3}, {"train_counts": COUNTS, "source": "counted"}], ids=str
)
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_json_file_holds_one_of_these(tmp_path, content, kind):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(content))
    assert load_class_counts(kind(path)).tolist() == COUNTS


def test_a_file_may_count_images_too(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"train_counts": [9, 9], "image_counts": [4, 5]}))
    assert load_class_counts(path).tolist() == [9, 9]
    assert load_class_counts(path, unit="images").tolist() == [4, 5]


# As it is published: tabs, a header, spaces after some fields, and no line end at the end.
TABLE = (
    "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall  \n2 \t0.0010 \t9\t1\ta, b\n3\t0.0002\t421\t56\tflag"
)


def test_ade20ks_table_gives_shares_of_all_pixels_in_ten_thousandths(tmp_path):
    path = tmp_path / "info.txt"  # told by its content, not by its name
    path.write_text(TABLE)
    assert load_class_counts(path).tolist() == [1576, 10, 2]
    assert load_class_counts(str(path), unit="images").tolist() == [11664, 9, 421]
    path.write_text(TABLE.replace("\n", "\r\n") + "\r\n\r\n")
    assert load_class_counts(path).tolist() == [1576, 10, 2]


def test_the_published_table_agrees_with_the_bundled_ratios():
    folder = os.environ.get("DISALIGN_SHARED_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DISALIGN_SHARED_DATA names no folder with the public lists")
    path = Path(folder) / "lists" / "ade20k_objectInfo150.txt"
    counts = load_class_counts(path)
    assert counts.tolist() == [round(ratio * 10_000) for ratio in bundled("ade20k")["pixel_ratio"]]
    assert sizes(head_body_tail(counts, total=10_000)) == {"head": 20, "body": 55, "tail": 75}
    assert load_class_counts(path, unit="images")[0] == 11_664


@pytest.mark.parametrize(
    "text",
    [
        "Idx\tRatio\tTrain",
        "Idx\tRatio\n1\t0.1576",
        "Idx\tShare\tTrain\n1\t0.1576\t3",
        TABLE.replace("0.0010", "0.001"),
        TABLE.replace("0.0010", "-0.001"),
        TABLE.replace("0.0010", "0.00100"),
        TABLE.replace("0.0010", "nan"),
        TABLE.replace("2 \t", "3\t"),
        TABLE.replace("2 \t", "\t"),
        TABLE.replace("\t421", "\tmany"),
        TABLE.replace("\t56", ""),
        TABLE.replace("1\t0.1576", "0\t0.1576"),
    ],
)
def test_a_table_with_anything_else_is_refused(tmp_path, text):
    path = tmp_path / "objectInfo150.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"^expected the columns Idx .* in '.*objectInfo150\.txt', .*; take the file"):
        load_class_counts(path)


def test_a_changed_tensor_does_not_change_its_source():
    source = np.array(COUNTS)
    load_class_counts(source)[0] = 99
    assert source[0] == 7


def test_large_counts_stay_exact():
    assert load_class_counts([2**53 + 1]).item() == 2**53 + 1


# ------------------------------------------------------------------------------------------------ the benchmarks

FACTS = {
    "imagenet_lt": (1000, 115_846),
    "inaturalist2018": (8142, 437_513),
    "places_lt": (365, 62_500),
    "lvis_v0.5": (1230, 693_958),
    "lvis_v1": (1203, 1_270_141),
    "ade20k": (150, None),
}


def test_every_bundled_name_is_checked_here():
    assert set(FACTS) == set(BUNDLED)


@pytest.mark.parametrize("name", FACTS)
def test_bundled_counts_have_their_known_size(name):
    counts = load_class_counts(name)
    classes, total = FACTS[name]
    assert counts.dtype == torch.int64
    assert len(counts) == len(bundled(name)["class_names"]) == classes
    assert (counts > 0).all()
    assert total is None or counts.sum() == total


@pytest.mark.parametrize("name", FACTS)
def test_bundled_counts_name_their_unit_and_source(name):
    record = bundled(name)
    assert record["unit"] in ("images", "instances", "pixels")
    assert record["source"]


@pytest.mark.parametrize(
    ("name", "many", "medium", "few"),
    [("imagenet_lt", 385, 479, 136), ("inaturalist2018", 842, 4076, 3224), ("places_lt", 131, 163, 71)],
)
def test_classification_groups_have_their_known_sizes(name, many, medium, few):
    assert sizes(many_medium_few(name)) == {"many": many, "medium": medium, "few": few}


@pytest.mark.parametrize(("name", "r", "c", "f"), [("lvis_v0.5", 454, 461, 315), ("lvis_v1", 337, 461, 405)])
def test_lvis_groups_have_their_known_sizes_and_letters(name, r, c, f):
    groups = frequent_common_rare(load_class_counts(name, unit="images"))
    assert sizes(groups) == {"r": r, "c": c, "f": f}
    for letter, members in groups.items():
        assert members.tolist() == [given == letter for given in bundled(name)["frequency"]]


def test_ade20ks_printed_ratios_give_its_known_groups():
    assert sizes(head_body_tail(bundled("ade20k")["pixel_ratio"])) == {"head": 20, "body": 55, "tail": 75}


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "source", [[3, -1], [3, 1.5], [3, float("nan")], [3, float("inf")], [True, False], torch.tensor([2.5])], ids=str
)
def test_counts_that_are_no_whole_numbers_are_refused(source):
    with pytest.raises(InputError, match=r"whole numbers >= 0, got .* at class"):
        load_class_counts(source)


@pytest.mark.parametrize("source", [[], [[1, 2]], 5, None, {}], ids=str)
def test_anything_but_one_count_per_class_is_refused(source):
    with pytest.raises(InputError, match=r"expected one (count|number) per class"):
        load_class_counts(source)


@pytest.mark.parametrize("source", [["a", "b"], [[1], [1, 2]], object()], ids=["words", "ragged", "object"])
def test_what_is_no_number_is_refused(source):
    with pytest.raises(InputError, match="expected one number per class"):
        load_class_counts(source)


@pytest.mark.parametrize(("source", "gap"), [({0: 1, 2: 1}, "1, 2"), ({1: 1, 2: 1}, "0, 2"), ({0: 1, "0": 2}, "1")])
def test_labels_with_gaps_are_refused(source, gap):
    with pytest.raises(InputError, match=f"without gaps .* out of place: {gap}; give an absent class"):
        load_class_counts(source)


def test_labels_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match=r"labels 0\.\.K-1 as keys of the class counts, got cat"):
        load_class_counts({"cat": 3})


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"bundled name among imagenet_lt, .*ade20k, got 'imagenet'"):
        load_class_counts("imagenet")
    with pytest.raises(InputError, match="bundled name among imagenet_lt"):
        bundled("imagenet")


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe"])
def test_a_malformed_file_is_refused(tmp_path, content):
    path = tmp_path / "counts.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"expected class counts as JSON in .*counts\.json"):
        load_class_counts(path)


def test_an_unknown_unit_is_refused():
    with pytest.raises(InputError, match="unit None or 'images', got 'pixels'"):
        load_class_counts("ade20k", unit="pixels")


def test_a_unit_that_the_source_does_not_count_is_refused():
    with pytest.raises(InputError, match="expected 'image_counts' in 'places_lt'"):
        load_class_counts("places_lt", unit="images")


class Series:
    """What a pandas Series shows of itself, where pandas is not installed."""

    def __init__(self, values, index):
        self.values, self.index = values, index

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def __len__(self):
        return len(self.values)

    def to_dict(self):
        return dict(zip(self.index, self.values, strict=True))


@pytest.fixture(params=["pandas", "alike"])
def series(request):
    return pytest.importorskip("pandas").Series if request.param == "pandas" else Series


def test_a_series_counts_by_its_index(series):
    # value_counts() of labels 0 (5 times), 1 (100 times) and 2 (20 times): the most frequent comes first.
    assert load_class_counts(series([100, 20, 5], index=[1, 2, 0])).tolist() == [5, 100, 20]


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (["dog", "cat", "owl"], "expected labels 0..K-1 as keys of the class counts, got dog, cat, owl"),
        ([1, 2, 3], "without gaps"),
        ([0, 0.5, 1], "without gaps"),
        ([0, 1, float("nan")], "expected labels 0..K-1 as keys"),
    ],
)
@pytest.mark.parametrize("kind", ["series", "dict"])
def test_an_index_that_is_no_label_is_refused(kind, index, sentence, series):
    counts = [100, 20, 5]
    source = series(counts, index=index) if kind == "series" else dict(zip(index, counts, strict=True))
    with pytest.raises(InputError, match=sentence):
        load_class_counts(source)


def test_wrap_classifier_takes_value_counts(series):
    _, loss = wrap_classifier(torch.nn.Linear(4, 3), series([100, 20, 5], index=[1, 2, 0]))
    assert loss.class_counts.tolist() == [5, 100, 20]
    assert loss.weight.argsort().tolist() == [1, 2, 0]
