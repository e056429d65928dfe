"""Stage two by one pass and a solver, through the command."""

import json
import shutil

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
from mmengine.dataset import pseudo_collate

import disalign
from disalign_mmengine.checkpoints import load_checkpoint, load_whole
from disalign_mmengine.cli import load_config
from disalign_mmseg import collect
from disalign_mmseg import fit as fit_command
from disalign_mmseg.collect import training_set
from disalign_mmseg.upsampling import upsampled_cross_entropy

from .runs import CALIBRATION, evaluate, left_behind, load, quick

COUNTED = "model.decode_head.loss_decode.class_counts=dataset"


def fit(config, stage_one, work_dir, *flags, options=()):
    """Exit status of ``disalign_mmseg.fit``."""
    given = [str(config), "--stage-one", str(stage_one), "--work-dir", str(work_dir), *flags]
    return fit_command.main([*given, "--cfg-options", *quick(), *options])


def results(folder, name="results_test"):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def features(configs, stage_one, tmp_path_factory):
    """A pass that further fits start from."""
    folder = tmp_path_factory.mktemp("features")
    assert fit(configs.two, stage_one, folder / "fit", "--features", str(folder / "kept"), "--rho", "0.2", "1") == 0
    return folder / "kept"


@pytest.fixture
def no_pass(monkeypatch):
    """The network sees only the few images whose rows are compared."""
    seen, pixel_rows = [], collect.pixel_rows
    monkeypatch.setattr(collect, "pixel_rows", lambda *given: seen.append(1) or pixel_rows(*given))
    yield
    assert len(seen) in (0, collect.COMPARED)


def test_its_checkpoint_is_one_of_stage_two(configs, stage_one, stage_two, tmp_path, capfd):
    assert fit(configs.two, stage_one, tmp_path / "fit") == 0
    out = capfd.readouterr().out
    assert "frozen tensors; new, starting at the identity" in out
    assert "pass over 1024 pixels" in out
    path = tmp_path / "fit" / "fit_rho-0.2.pth"
    one, two, trained = load(stage_one), load(path), load(stage_two)
    frozen = [name for name in one["state_dict"] if not name.startswith("auxiliary_head")]
    assert all(torch.equal(two["state_dict"][name], one["state_dict"][name]) for name in frozen)
    assert two["state_dict"].keys() == trained["state_dict"].keys() == {*frozen} | CALIBRATION
    assert two["meta"]["dataset_meta"] == trained["meta"]["dataset_meta"]
    facts = two["meta"]["disalign"]
    assert f"stage one gets {facts['fit']['train_accuracy']:.1f} % of its training set right" in out
    assert facts.pop("fit")["rho"] == 0.2
    assert facts == trained["meta"]["disalign"]
    assert evaluate(configs.two, path, tmp_path / "test") == 0
    report = results(tmp_path / "fit", "results_fit_rho-0.2")
    assert report == results(tmp_path / "fit" / "fit_rho-0.2")  # where the log says that it is
    assert report == results(tmp_path / "test")
    assert report["figures"] != report["stage_one"]["figures"]


def loss_of_whole_images(config, path, rho):
    """The exact weighted mean over all pixels of the training set, each image by itself."""
    config = load_config(str(config), {})
    model = fit_command.build_model(config).eval()
    load_whole(model, load_checkpoint(path), str(path))
    loss, dataset, total, denominator = model.decode_head.loss_decode, training_set(config), 0.0, 0.0
    weight = disalign.generalized_reweight(loss.class_counts, rho)
    for number in range(len(dataset)):
        batch = pseudo_collate([dataset[number]])
        label = batch["data_samples"][0].gt_sem_seg.data
        with torch.no_grad():
            logits = model(**model.data_preprocessor(batch), mode="tensor")
        total += upsampled_cross_entropy(logits, label, weight)
        denominator += weight[label[label != 255]].sum()
    return float(total / denominator)


def test_it_lowers_the_loss_of_all_pixels(features, configs, tmp_path):
    path = features.parent / "fit" / "fit_rho-1.pth"
    checkpoint = load(path)
    solution = checkpoint["meta"]["disalign"]["fit"]["solution"]
    head = "decode_head.calibration."
    checkpoint["state_dict"][f"{head}magnitude"].fill_(1)
    checkpoint["state_dict"][f"{head}margin"].zero_()
    torch.save(checkpoint, tmp_path / "identity.pth")
    before, after = (loss_of_whole_images(configs.two, name, 1) for name in (tmp_path / "identity.pth", path))
    assert solution["start"] == pytest.approx(before, rel=0.05)
    assert after < 0.95 * before


def test_a_huge_penalty_is_the_identity(features, configs, stage_one, tmp_path, no_pass):
    flags = ("--features", str(features), "--penalty", "1e12", "--rho", "1")
    assert fit(configs.two, stage_one, tmp_path, *flags) == 0
    report = results(tmp_path, "results_fit_rho-1")
    assert report["figures"] == report["stage_one"]["figures"]
    assert report["per_class"]["IoU"] == report["stage_one"]["per_class"]["IoU"]


def test_several_rho_from_one_pass(features, configs, stage_one, tmp_path, capfd, no_pass):
    flags = ("--features", str(features), "--rho", "0.2", "1")
    assert fit(configs.two, stage_one, tmp_path, *flags) == 0
    out = capfd.readouterr().out
    for rho in ("0.2", "1"):
        path = tmp_path / f"fit_rho-{rho}.pth"
        assert f"test it: python -m disalign_mmseg.test {configs.two} {path} --work-dir {path.with_suffix('')}" in out
        assert load(path)["meta"]["disalign"]["rho"] == float(rho)
    assert not list(tmp_path.rglob("results*"))
    margins = [load(path)["state_dict"]["decode_head.calibration.margin"] for path in sorted(tmp_path.glob("*.pth"))]
    assert len(margins) == 2
    assert not torch.equal(*margins)
    for path in tmp_path.glob("*.pth"):  # the same again, whichever others are fitted
        assert torch.equal(
            load(path)["state_dict"]["decode_head.calibration.margin"],
            load(features.parent / "fit" / path.name)["state_dict"]["decode_head.calibration.margin"],
        )


def test_several_rho_are_tested_on_demand(features, configs, stage_one, tmp_path, no_pass):
    flags = ("--features", str(features), "--rho", "0.2", "1", "--test")
    assert fit(configs.two, stage_one, tmp_path, *flags) == 0
    reports = [results(tmp_path, f"results_fit_rho-{rho}") for rho in ("0.2", "1")]
    assert reports[0]["stage_one"] == reports[1]["stage_one"]
    assert reports[0]["figures"] != reports[1]["figures"]
    assert [report["checkpoint"][-7:] for report in reports] == ["0.2.pth", "o-1.pth"]


def test_counted_pixels_are_kept_and_divide_the_loss(configs, stage_one, tmp_path):
    flags = ("--features", str(tmp_path / "kept"), "--images", "9", "--pixels", "20", "--dtype", "float32")
    assert fit(configs.two, stage_one, tmp_path, *flags, options=[COUNTED]) == 0
    record = json.loads((tmp_path / "class_counts.json").read_text())
    facts = load(tmp_path / "fit_rho-0.2.pth")["meta"]["disalign"]
    assert facts["class_counts"] == record["train_counts"]
    assert facts["total_pixels"] == record["total_pixels"]
    kept = disalign.Features.open(tmp_path / "kept")
    assert kept.totals.tolist() == record["train_counts"]
    assert kept.x.dtype == torch.float32
    assert kept.x.shape == (9 * 20, 4, 16)


OPTIONS = {
    "all": dict(),
    "margin alone": dict(confidence="one", learn_magnitude=False),
    "magnitude alone": dict(confidence="one", learn_margin=False),
}


@pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)
def test_the_heads_own_options(chosen, features, configs, stage_one, tmp_path, no_pass):
    options = [f"model.decode_head.calibration.{name}={value}" for name, value in chosen.items()]
    flags = ("--features", str(features), "--rho", "0.2", "1")
    assert fit(configs.two, stage_one, tmp_path, *flags, options=options) == 0
    found = load(tmp_path / "fit_rho-0.2.pth")["state_dict"]
    linear = torch.nn.Linear(16, 150)
    linear.load_state_dict({name: found[f"decode_head.conv_seg.{name}"].squeeze() for name in ("weight", "bias")})
    expected = disalign.fit(disalign.Features.open(features), linear, 0.2, **chosen)
    learnt = {name: tensor.squeeze() for name, tensor in found.items() if "calibration" in name}
    expected = expected.calibration.state_dict().items()
    assert learnt.keys() == {f"decode_head.calibration.{name}" for name, _ in expected}
    for name, tensor in expected:
        torch.testing.assert_close(learnt[f"decode_head.calibration.{name}"], tensor.squeeze(), rtol=1e-6, atol=1e-7)


def test_the_margin_is_drawn_to_logit_adjustment(features, configs, stage_one, tmp_path, no_pass):
    options = ["model.decode_head.calibration.confidence=one", "model.decode_head.calibration.learn_magnitude=False"]
    flags = ("--features", str(features), "--anchor", "logit_adjust", "--penalty", "1e9", "--rho", "1")
    assert fit(configs.two, stage_one, tmp_path, *flags, options=options) == 0
    found, facts = (load(tmp_path / "fit_rho-1.pth")[key] for key in ("state_dict", "meta"))
    weight = disalign.generalized_reweight(facts["disalign"]["class_counts"], 1.0)
    torch.testing.assert_close(found["decode_head.calibration.margin"], weight.log(), rtol=1e-4, atol=1e-4)
    assert evaluate(configs.two, tmp_path / "fit_rho-1.pth", tmp_path / "test", *options) == 0


def test_features_of_another_stage_one_are_refused(features, configs, stage_one, tmp_path, capfd):
    checkpoint = load(stage_one)
    checkpoint["state_dict"]["backbone.stem.0.weight"] *= 1.01
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "other.pth")
    assert fit(configs.two, tmp_path / "other.pth", tmp_path / "w", "--features", str(features)) == 2
    assert "got some of another trunk; give another folder, or delete this one" in capfd.readouterr().err
    assert left_behind(tmp_path / "w") == []


def test_an_earlier_fit_is_kept_without_force(features, configs, stage_one, tmp_path, capfd):
    (tmp_path / "fit_rho-0.2.pth").write_text("mine")
    assert fit(configs.two, stage_one, tmp_path, "--features", str(features)) == 2
    assert "add --force to replace it" in capfd.readouterr().err
    assert (tmp_path / "fit_rho-0.2.pth").read_text() == "mine"
    assert fit(configs.two, stage_one, tmp_path, "--features", str(features), "--rho", "0.2", "1", "--force") == 0
    assert load(tmp_path / "fit_rho-0.2.pth")["meta"]["disalign"]["rho"] == 0.2


REFUSED = {
    "stage one's config": ("one", [], [], "whose model has no calibration"),
    "no stage one": (
        "two",
        ["--stage-one", ""],
        [],
        "expected the stage-one checkpoint, got none; give it: --stage-one",
    ),
    "no such file": ("two", ["--stage-one", "nowhere.pth"], [], "nowhere.pth"),
    "a negative rho": ("two", ["--rho", "-1"], [], "expected a finite rho >= 0"),
    "an infinite penalty": ("two", ["--penalty", "inf"], [], "expected a finite penalty >= 0"),
    "an anchor with a learnt confidence": ("two", ["--anchor", "logit_adjust"], [], "expected anchor 'zero', or"),
    "no pixels": ("two", ["--pixels", "0"], [COUNTED], "expected 1 or more pixels of each image, got 0"),
    "no images": ("two", ["--images", "0"], [COUNTED], "expected 1 or more images, got 0"),
    "no evaluation": ("two", [], ["test_dataloader=None"], "expected a config that can be built in"),
    "no images there": ("two", [], ["train_dataloader.dataset.data_root=nowhere"], "expected images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, configs, stage_one, tmp_path, capfd):
    config, flags, options, sentence = REFUSED[name]
    assert fit(getattr(configs, config), stage_one, tmp_path / "w", *flags, options=options) == 2
    error = capfd.readouterr().err
    assert sentence in error
    assert error.count("error: ") == 1
    assert left_behind(tmp_path / "w") == []


def test_another_loss_is_refused(configs, stage_one, tmp_path, capfd):
    loss = 'dict(_delete_=True, type="CrossEntropyLoss")'
    text = f"_base_ = {str(configs.two)!r}\nmodel = dict(decode_head=dict(loss_decode={loss}))\n"
    (tmp_path / "other.py").write_text(text)
    assert fit(tmp_path / "other.py", stage_one, tmp_path / "w") == 2
    assert "expected GRWCrossEntropyLoss as the head's loss_decode, got CrossEntropyLoss" in capfd.readouterr().err


def test_a_missing_annotation_is_refused_before_the_pass(ade, configs, stage_one, tmp_path, capfd, no_pass):
    shutil.copytree(ade, tmp_path / "data")
    (tmp_path / "data" / "annotations" / "training" / "ADE_train_00000009.png").unlink()
    options = [f"train_dataloader.dataset.data_root={tmp_path / 'data'}"]
    assert fit(configs.two, stage_one, tmp_path / "w", options=options) == 2
    assert "expected 16 annotations of ADE20KDataset, but 1 are missing" in capfd.readouterr().err


def test_a_stage_one_of_other_classes_is_refused(configs, stage_one, tmp_path, capfd):
    checkpoint = load(stage_one)
    checkpoint["meta"]["dataset_meta"]["classes"] = [*checkpoint["meta"]["dataset_meta"]["classes"][:-1], "other"]
    torch.save({"meta": checkpoint["meta"], "state_dict": checkpoint["state_dict"]}, tmp_path / "other.pth")
    assert fit(configs.two, tmp_path / "other.pth", tmp_path / "w") == 2
    assert "in the same order, but 1 differ: class 149" in capfd.readouterr().err
    assert left_behind(tmp_path / "w") == []
