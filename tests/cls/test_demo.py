"""The demo, of one seed."""

import json

import pytest

from disalign_cls.demo import by_rank, main


@pytest.mark.slow
def test_a_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the demo sets it; this takes it back
    options = ["--out", str(tmp_path / "out"), "--seeds", "6", "--methods", "logit_adjust", "disalign"]
    assert main(options) == 0
    told = capsys.readouterr().out
    for classifier in ("linear", "cosine"):
        content = json.loads((tmp_path / "out" / classifier / "comparison.json").read_text())
        assert content["command"] == " ".join(["python", "-m", "disalign_cls.demo", *options])
        assert content["class_counts"] == sorted(content["class_counts"], reverse=True)
        (run,) = content["runs"]
        assert not {"crt", "lws"} & set(run["methods"])
        reached = {name: method["figures"]["average"] for name, method in run["methods"].items()}
        assert min(reached["logit_adjust"], reached["disalign"]) > reached["stage_one"] + 2
        assert f"{classifier} classifier, test accuracy in %" in told
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(run["seed"], run["classifier"]) for run in report["runs"]} == {(6, "linear"), (6, "cosine")}
    assert (tmp_path / "out" / "calibration.png").exists()


def test_from_many_images_to_few_all_that_belongs_to_a_class_moves_with_it():
    counts = [5, 80, 1, 30, 100, 2, 60, 10, 40, 20]
    method = {"per_class": {"accuracy": [n + 0.5 for n in counts]}, "margin": [-n for n in counts], "figures": {"x": 1}}
    found = by_rank(
        {"class_counts": counts, "group_of": [f"g{n}" for n in counts], "runs": [{"methods": {"a": method}}]}
    )
    ranks = [100, 80, 60, 40, 30, 20, 10, 5, 2, 1]
    assert found["class_counts"] == ranks
    assert found["group_of"] == [f"g{n}" for n in ranks]
    (moved,) = (run["methods"]["a"] for run in found["runs"])
    assert moved["per_class"]["accuracy"] == [n + 0.5 for n in ranks]
    assert moved["margin"] == [-n for n in ranks]
    assert "magnitude" not in moved
