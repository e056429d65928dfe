"""Before and after: what is not available is null and n/a, never 0, and the gain is after less before."""

import json
import math
from collections import OrderedDict

import numpy as np
import pytest

from disalign.report import report, shown, table, text_table, without_nan

NAN = math.nan


def test_a_report_of_one_stage_has_no_other():
    assert report({"top1": 45.5, "few": None}, dataset="digits", images=360) == {
        "dataset": "digits",
        "images": 360,
        "unit": "percent",
        "figures": {"top1": 45.5, "few": None},
    }


def test_a_report_of_both_stages_has_one_shape_for_both():
    content = report(
        OrderedDict(top1=50.0, few=NAN),
        {"top1": 45.5, "few": 0.0},
        per_class={"top1": [1.0, NAN], "group": ["many", None]},
        stage_one_per_class={"top1": (0.0, 2.0)},
        groups={"many": [0], "few": []},
    )
    assert content == {
        "groups": {"many": [0], "few": []},
        "unit": "percent",
        "figures": {"top1": 50.0, "few": None},
        "per_class": {"top1": [1.0, None], "group": ["many", None]},
        "stage_one": {"figures": {"top1": 45.5, "few": 0.0}, "per_class": {"top1": [0.0, 2.0]}},
    }
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_a_report_does_not_change_what_it_is_made_from():
    figures, per_class = {"top1": NAN}, {"top1": [NAN]}
    report(figures, figures, per_class=per_class, stage_one_per_class=per_class)
    assert math.isnan(figures["top1"])
    assert math.isnan(per_class["top1"][0])


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (NAN, None),
        (np.float64("nan"), None),
        (0.0, 0.0),
        (math.inf, math.inf),
        ("nan", "nan"),
        ({"a": [NAN, (1, NAN)]}, {"a": [None, [1, None]]}),
    ],
)
def test_nan_becomes_null_wherever_it_is(value, plain):
    assert without_nan(value) == plain


def rows(text):
    return [line.split() for line in text.splitlines() if not line.startswith("-")]


def test_a_table_of_both_stages_ends_with_the_gain():
    content = report(
        {"all": 50.04, "many": 60.0, "medium": 0.0, "few": None},
        {"all": 45.5, "many": 62.25, "medium": None, "few": 0.0},
    )
    assert rows(table(content)) == [
        ["percent", "all", "many", "medium", "few"],
        ["stage", "one", "45.5", "62.2", "n/a", "0.0"],
        ["DisAlign", "50.0", "60.0", "0.0", "n/a"],
        ["gain", "+4.5", "-2.2", "n/a", "n/a"],
    ]


def test_the_gain_is_taken_before_the_rounding():
    # 45.6 and 45.6 in the table, though a tenth apart once rounded
    assert rows(table(report({"a": 45.649}, {"a": 45.551})))[1:] == [
        ["stage", "one", "45.6"],
        ["DisAlign", "45.6"],
        ["gain", "+0.1"],
    ]


@pytest.mark.parametrize("change", [0.0, 0.04, -0.04])
def test_no_gain_has_no_minus(change):
    assert rows(table(report({"a": 45.5 + change}, {"a": 45.5})))[-1] == ["gain", "+0.0"]


def test_a_table_of_one_stage_is_one_row():
    assert rows(table(report({"all": 50.0, "few": NAN}))) == [["percent", "all", "few"], ["50.0", "n/a"]]


def test_columns_are_chosen_ordered_and_titled():
    content = report({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert rows(table(content, ["c", "a"])) == [
        ["percent", "c", "a"],
        ["stage", "one", "1.0", "1.0"],
        ["DisAlign", "3.0", "1.0"],
        ["gain", "+2.0", "+0.0"],
    ]
    titled = rows(table(content, {"c": "AP_c", "b": "AP"}))
    assert titled[0] == ["percent", "AP_c", "AP"]
    assert titled[-1] == ["gain", "+2.0", "+1.0"]


@pytest.mark.parametrize(
    ("value", "text"), [(45.67, "45.7"), (0.0, "0.0"), (100.0, "100.0"), (7, "7.0"), (None, "n/a"), (NAN, "n/a")]
)
def test_a_figure_has_one_decimal_or_is_not_available(value, text):
    assert shown(value) == text


def test_a_text_table_is_aligned():
    assert text_table([["class", "n"], ["cat", 10], ["a lion", 7.5]]) == "\n".join(
        ["class     n", "------  ---", "cat      10", "a lion  7.5"]
    )


def test_a_text_table_of_a_header_alone():
    assert text_table([["class", "n"]]) == "class  n\n-----  -"


def test_rows_of_other_lengths_are_no_table():
    with pytest.raises(ValueError, match="zip"):
        text_table([["a", "b"], ["c"]])
