"""The benchmarks that need the core alone, on small sizes, and the figures that the docs keep."""

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import disalign

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
            cell = f"{sum(values) / len(values):.1f}"
            if len(values) > 1:
                cell += f" +- {torch.tensor(values, dtype=torch.float64).std():.1f}"
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
    content = {
        "columns": {"average": "average"},
        "runs": [{"stage_one": "f", "train": {}, "methods": {"stage_one": method}}],
    }
    for place in ("a", "b"):
        (tmp_path / place).write_text(json.dumps(content))
    benchmark_module("results").main([str(tmp_path / "a"), str(tmp_path / "b"), "--keep", str(tmp_path / "kept")])
    kept = json.loads((tmp_path / "kept").read_text())
    del method["per_class"]
    assert kept["runs"] == [{"train": {}, "methods": {"stage_one": method}}] * 2
    assert capsys.readouterr().out.splitlines()[-1] == "| stage one |  | 50.0 +- 0.0 | +0.0 +- 0.0 | 0.0 |"


def test_kept_features_give_the_figures_in_the_docs(benchmark_module):
    """Stage one and logit adjustment by numpy, from the file in the repository."""
    with np.load(BENCHMARKS / "cifar100_lt_resnet32_60e.npz") as arrays:
        counts = np.bincount(arrays["train_y"])
        scores = arrays["test_x"].astype(np.float64) @ arrays["weight"].T + arrays["bias"]
        labels = arrays["test_y"]
    assert (counts.sum(), counts.max(), counts.min(), len(labels)) == (10847, 500, 5, 10000)
    content = json.loads((BENCHMARKS.parent / "docs" / "results" / "cifar100_lt_kept.json").read_text())
    methods = content["runs"][0]["methods"]
    for name, adjusted in (("stage_one", scores), ("logit_adjust", scores - np.log(counts / counts.sum()))):
        right = adjusted.argmax(1) == labels
        groups = {"average": labels >= 0, "many": counts[labels] > 100, "few": counts[labels] < 20}
        for group, part in groups.items():
            assert methods[name]["figures"][group] == pytest.approx(100 * right[part].mean(), abs=0.02)


def test_features_are_kept_with_their_classifier(benchmark_module, tmp_path, capsys):
    torch.manual_seed(0)
    x, y = torch.randn(40, 4).half(), torch.arange(40) % 4 % 3
    layer = torch.nn.Linear(4, 3)
    torch.save(
        {"state_dict": {f"classifier.{k}": v for k, v in layer.state_dict().items()}}, tmp_path / "stage_one.pth"
    )
    sets = [disalign.Features.from_arrays(x[part], y[part]) for part in (slice(30), slice(30, 40))]
    for name, features in zip(("train", "test"), sets, strict=True):
        features.save(tmp_path / name)
    place, out = tmp_path / "kept.npz", tmp_path / "out.json"
    options = ["--methods", "logit_adjust", "--rho", "0.7", "--out", str(out)]
    made = ["--make", str(tmp_path / "stage_one.pth"), str(tmp_path)]
    assert benchmark_module("kept_features").main([str(place), *made, *options]) == 0
    expected = disalign.compare(*sets, layer, ["logit_adjust"], rho=0.7)
    written = json.loads(out.read_text())
    assert written["rho"] == 0.7
    for name, method in expected["runs"][0]["methods"].items():
        assert written["runs"][0]["methods"][name]["figures"] == pytest.approx(method["figures"], nan_ok=True)
    assert "logit adjustment" in capsys.readouterr().out


def test_dealing_out_anew_keeps_rows_and_counts(benchmark_module):
    y = torch.tensor([0] * 7 + [1] * 3 + [2] * 5)
    x = torch.arange(15.0)[:, None]
    train, test = (disalign.Features.from_arrays(x[part], y[part]) for part in (slice(0, 15, 2), slice(1, 15, 2)))
    dealt = [benchmark_module("which_method").dealt_out_anew(train, test, seed) for seed in (0, 1)]
    assert not torch.equal(dealt[0][0].x, dealt[1][0].x)
    for learnt, seen in dealt:
        assert learnt.class_counts.tolist() == train.class_counts.tolist()
        assert sorted(torch.cat([learnt.x, seen.x]).flatten().tolist()) == list(range(15))
        for one in (learnt, seen):
            assert torch.equal(one.y, y[one.x.flatten().long()])


def test_which_method_of_probes(benchmark_module, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    module = benchmark_module("which_method")
    torch.manual_seed(0)
    y = torch.arange(120) % 20 % 4
    x = torch.randn(120, 8) + 2 * torch.eye(4, 8)[y]
    for name, part in (("train", slice(60)), ("test", slice(60, 120))):
        disalign.Features.from_arrays(x[part], y[part]).save(tmp_path / "features" / name)
    options = ["--c", "0.1", "--seeds", "0", "1", "--methods", *module.METHODS]
    module.main(["probes", str(tmp_path / "out" / "imagenet"), str(tmp_path / "features"), *options])
    assert "C 0.1" in capsys.readouterr().out

    monkeypatch.setattr(module, "DOCS", tmp_path)
    for folder in ("results", "images"):
        (tmp_path / folder).mkdir()
    point = {"train": {"balanced": 50.0}, "gain": dict.fromkeys(module.METHODS, 1.0)}
    earlier = [{"family": family, "stage_one": "C_0.1_seed_0", **point} for family in module.FAMILIES]
    earlier.append({"family": "imagenet", "stage_one": "C_1_seed_0", **point})
    (tmp_path / "results" / "which_method.json").write_text(json.dumps(earlier))
    module.main(["draw", str(tmp_path / "out")])
    found = json.loads((tmp_path / "results" / "which_method.json").read_text())
    own = found[-2:]
    assert [(one["family"], one["stage_one"]) for one in own] == [("imagenet", f"C_0.1_seed_{seed}") for seed in (0, 1)]
    replaced = {"family": "imagenet", "stage_one": "C_0.1_seed_0", **point}
    assert found[:-2] == [one for one in earlier if one != replaced]
    run = json.loads((tmp_path / "out" / "imagenet" / "C_0.1_seed_1.json").read_text())["runs"][0]
    reached = [run["methods"][name]["figures"]["balanced"] for name in ("disalign", "stage_one")]
    assert own[1]["gain"]["disalign"] == pytest.approx(reached[0] - reached[1], abs=0.006)
    assert (tmp_path / "images" / "which_method.png").read_bytes().startswith(b"\x89PNG")
