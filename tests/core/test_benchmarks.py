"""benchmarks/classifier_overhead.py and benchmarks/fit.py's largest fit, on small sizes."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_turns_alternate_and_warm_up_does_not_count(benchmark_module):
    order = []
    found = benchmark_module("timing").turns(2, {name: lambda name=name: order.append(name) for name in "ab"}, 1)
    assert order == list("ababab")
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}


def test_what_the_overhead_compares(benchmark_module):
    args = argparse.Namespace(width=6, classes=4, compile=False)
    calls = benchmark_module("classifier_overhead").cases(5, args, False)
    plain, calibrated = (calls["training step", kind].args[0] for kind in ("plain", "calibrated"))
    assert type(plain) is torch.nn.Linear
    assert calls["scores", "plain"]().shape == calls["scores", "calibrated"]().shape == (5, 4)
    assert not calls["scores", "calibrated"]().requires_grad
    for call in calls.values():
        call()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    trained = {name for name, parameter in calibrated.named_parameters() if parameter.grad is not None}
    assert trained == {
        f"calibration.{name}" for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
    }


def test_overhead_table(benchmark_module, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--rows", "8", "16", "--width", "6", "--classes", "4", "--calls", "2", "--repeats", "3"]
    assert benchmark_module("classifier_overhead").main([*options, "--out", str(out)]) == 0
    output, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    assert [(row["rows"], "autocast" in row["dtype"], row["call"]) for row in rows] == [
        (size, amp, call) for size in (8, 16) for amp in (False, True) for call in ("scores", "training step")
    ]
    for row, line in zip(rows, output.splitlines()[-8:], strict=True):
        ratios = sorted(ours / theirs for ours, theirs in zip(row["calibrated"], row["plain"], strict=True))
        assert [row["least"], row["ratio"], row["most"]] == ratios
        assert f"| {1e6 * sorted(row['plain'])[1]:.4g} | {1e6 * sorted(row['calibrated'])[1]:.4g} | " in line


def test_fit_of_imagenet_lt_in_small(benchmark_module, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--classes", "4", "--width", "8", "--turns", "2", "--kept", "host", "float16"]
    assert benchmark_module("fit").main(["imagenet", *options, "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [row["features"] for row in written["rows"]] == ["host", "float16"]
    host, half = written["rows"]
    assert half["least"] == min(ours / theirs for ours, theirs in zip(half["turns"], host["turns"], strict=True))
    assert all(row["evaluations"] > 1 for row in written["rows"])
    assert written["about"].startswith(capsys.readouterr().out.partition(";")[0])


def test_the_tables_of_the_docs_are_those_of_the_kept_figures(benchmark_module, capsys):
    """Of every kept comparison the figures of stage one and DisAlign, recomputed here, stand in docs/results.md."""
    pages = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    kept = [path for path in (BENCHMARKS.parent / "docs" / "results").glob("*.json") if "columns" in path.read_text()]
    assert len(kept) >= 4
    for path in kept:
        content = json.loads(path.read_text())
        first = next(iter(content["columns"]))
        assert not benchmark_module("results").main([str(path)])
        printed = capsys.readouterr().out
        for name in ("stage_one", "disalign"):
            values = [run["methods"][name]["figures"][first] for run in content["runs"]]
            cell = f"{sum(values) / len(values):.1f} +- {torch.tensor(values, dtype=torch.float64).std():.1f}"
            assert f"| {cell} |" in printed
            assert f"| {cell} |" in pages, (path.name, name)


def test_kept_figures_of_several_comparisons(benchmark_module, tmp_path, capsys):
    method = {
        "title": "stage one",
        "setting": {},
        "seconds": 0.0,
        "figures": {"average": 50.0},
        "per_class": {"a": [1]},
    }
    content = {"columns": {"average": "average"}, "runs": [{"stage_one": "f", "methods": {"stage_one": method}}]}
    for place in ("a", "b"):
        (tmp_path / place).write_text(json.dumps(content))
    benchmark_module("results").main([str(tmp_path / "a"), str(tmp_path / "b"), "--keep", str(tmp_path / "kept")])
    kept = json.loads((tmp_path / "kept").read_text())
    del method["per_class"]
    assert kept["runs"] == [{"methods": {"stage_one": method}}] * 2
    assert capsys.readouterr().out.splitlines()[-1] == "| stage one |  | 50.0 +- 0.0 | +0.0 +- 0.0 | 0.0 |"
