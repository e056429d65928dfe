"""Stage two by one pass and a solver, through the command."""

import json

import numpy as np
import pytest
import torch

import disalign
from disalign import InputError
from disalign_cls import fit as fit_command
from disalign_cls.cli import load_model
from disalign_cls.collect import _describe, collect_features
from disalign_cls.datasets import DigitsLT
from disalign_mmengine.cli import load_config

from .runs import BASELINE, DISALIGN, PLAIN, evaluate, left_behind, train

CLASSIFIERS = pytest.mark.parametrize("classifier", ["linear", "cosine"])


def fit(config, stage_one, work_dir, *flags, options=()):
    """Exit status of ``disalign_cls.fit``."""
    given = ["--cfg-options", *options] if options else []
    return fit_command.main([config, "--stage-one", str(stage_one), "--work-dir", str(work_dir), *flags, *given])


def load(path):
    return torch.load(path, weights_only=True)


def results(folder, name="results_test.json"):
    return json.loads((folder / name).read_text())


@CLASSIFIERS
def test_its_checkpoint_is_one_of_stage_two(classifier, stage_ones, tmp_path, capfd):
    assert fit(DISALIGN[classifier], stage_ones[classifier], tmp_path / "fit") == 0
    out = capfd.readouterr()
    assert "frozen tensors; new, starting at the identity" in out.out
    assert "pass over 242 rows" in out.out
    path = tmp_path / "fit" / "fit_rho-1.5.pth"
    one, two = load(stage_ones[classifier])["state_dict"], load(path)
    assert all(torch.equal(two["state_dict"][name], tensor) for name, tensor in one.items())
    assert len(two["state_dict"]) == len(one) + 4
    assert two["meta"]["disalign"]["rho"] == 1.5
    assert two["meta"]["dataset_meta"]["classes"] == [str(digit) for digit in range(10)]
    seen = two["meta"]["disalign"]["fit"]["train_accuracy"]
    assert f"stage one gets {seen:.1f} % of its training set right, averaged over the classes" in out.out
    assert "seconds" not in two["meta"]["disalign"]["fit"]  # else no two checkpoints were the same
    assert two["meta"]["disalign"]["class_counts"] == DigitsLT("train").class_counts.tolist()
    assert evaluate(DISALIGN[classifier], path, tmp_path / "test") == 0
    report = results(tmp_path / "fit", "results_fit_rho-1.5.json")
    assert report == results(tmp_path / "test")
    assert report["figures"] != report["stage_one"]["figures"]


def test_several_rho_from_one_pass_and_folders_that_serve_again(stage_one, tmp_path, capfd):
    flags = ("--features", str(tmp_path / "features"), "--rho")
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "a", *flags, "0.5", "1") == 0
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "b", *flags, "1") == 0
    a, b = (load(tmp_path / name / "fit_rho-1.pth") for name in "ab")
    assert all(torch.equal(a["state_dict"][name], tensor) for name, tensor in b["state_dict"].items())
    other = load(tmp_path / "a" / "fit_rho-0.5.pth")
    assert other["meta"]["disalign"]["rho"] == 0.5
    margin = "classifier.calibration.margin"
    assert not torch.equal(other["state_dict"][margin], a["state_dict"][margin])
    assert len(disalign.Features.open(tmp_path / "features" / "train")) == 242


def test_features_of_another_stage_one_are_refused(stage_one, tmp_path, capfd):
    flags = ("--features", str(tmp_path / "features"))
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "a", *flags) == 0
    checkpoint = load(stage_one)
    checkpoint["state_dict"]["backbone.0.weight"] *= 1.01
    torch.save(checkpoint, tmp_path / "other.pth")
    assert fit(DISALIGN["linear"], tmp_path / "other.pth", tmp_path / "b", *flags) == 2
    assert "got some of another trunk; give another folder, or delete this one" in capfd.readouterr().err
    assert left_behind(tmp_path / "b") == []


def test_cross_fitting_and_its_anchor(stage_one, tmp_path, capfd):
    flags = ("--cross-fit", "3", "--anchor", "logit_adjust")
    options = ("model.calibration.confidence=one",)
    assert fit(DISALIGN["linear"], stage_one, tmp_path, *flags, options=options) == 0
    found = load(tmp_path / "fit_rho-1.5.pth")
    assert found["meta"]["disalign"]["fit"]["cross_fit"] == 3
    singles = [label for label, count in enumerate(found["meta"]["disalign"]["class_counts"]) if count == 1]
    assert list(found["meta"]["disalign"]["fit"]["left_out"]) == singles
    assert evaluate(DISALIGN["linear"], tmp_path / "fit_rho-1.5.pth", tmp_path / "test", *options) == 0


def test_sgd_over_features_is_the_runner_without_transforms(stage_one, tmp_path):
    assert (
        train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", PLAIN, "train_cfg.val_interval=9", epochs=5) == 0
    )
    runner = load(tmp_path / "epoch_5.pth")["state_dict"]
    config = load_config(DISALIGN["linear"], {})
    model, _ = load_model(load_config(BASELINE["linear"], {}), str(stage_one))
    features, _ = collect_features(model, config)
    recipe = {"batch_size": 64, "lr": 0.1, "nesterov": True, "weight_decay": 5e-3, "schedule": 60}
    found = disalign.fit(features, model.classifier, 1.5, solver="sgd", epochs=5, **recipe)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, runner[f"classifier.{name}"], rtol=1e-5, atol=1e-5)


def test_views_of_an_image_share_its_weight_and_its_fold(stage_one):
    config = load_config(DISALIGN["linear"], {})
    model, _ = load_model(load_config(BASELINE["linear"], {}), str(stage_one))
    features, dataset = collect_features(model, config, views=3)
    assert len(features) == 3 * 242
    assert float(features.weights.sum()) == pytest.approx(242)
    assert features.class_counts.tolist() == dataset.class_counts.tolist()
    assert features.groups.tolist() == [*range(242)] * 3
    assert not torch.equal(features.x[:242], features.x[242:484])  # random crops


REFUSED = {
    "stage one's config": (lambda: [BASELINE["linear"]], "whose model has no calibration"),
    "no stage one": (lambda: [DISALIGN["linear"], "--stage-one", ""], "work_dirs/baseline_cnn"),
    "an anchor with a learnt confidence": (
        lambda: [DISALIGN["linear"], "--anchor", "logit_adjust"],
        "expected anchor 'zero', or 'logit_adjust' with confidence='one'",
    ),
    "one fold": (lambda: [DISALIGN["linear"], "--cross-fit", "1"], "expected cross_fit 0, or 2 or more folds"),
    "a negative number of views": (lambda: [DISALIGN["linear"], "--views", "-1"], "expected 0 views"),
    "a negative rho": (lambda: [DISALIGN["linear"], "--rho", "-1"], "expected a finite rho >= 0"),
    "an infinite penalty": (lambda: [DISALIGN["linear"], "--penalty", "inf"], "expected a finite penalty >= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, stage_one, tmp_path, capfd):
    arguments, sentence = REFUSED[name]
    config, *flags = arguments()
    assert fit_command.main([config, "--stage-one", str(stage_one), "--work-dir", str(tmp_path / "w"), *flags]) == 2
    assert sentence in capfd.readouterr().err
    assert left_behind(tmp_path / "w") == []


def test_an_earlier_fit_is_kept_without_force(stage_one, tmp_path, capfd):
    assert fit(DISALIGN["linear"], stage_one, tmp_path) == 0
    before = (tmp_path / "fit_rho-1.5.pth").read_bytes()
    assert fit(DISALIGN["linear"], stage_one, tmp_path, "--cross-fit", "3") == 2
    assert "add --force to replace it" in capfd.readouterr().err
    assert (tmp_path / "fit_rho-1.5.pth").read_bytes() == before
    assert fit(DISALIGN["linear"], stage_one, tmp_path, "--force") == 0


def learnt(stage_one, rho, views=0, **options):
    """The state of the classifier that :func:`disalign.fit` finds."""
    model, _ = load_model(load_config(BASELINE["linear"], {}), str(stage_one))
    features, _ = collect_features(model, load_config(DISALIGN["linear"], {}), views=views)
    return {
        f"classifier.{name}": tensor
        for name, tensor in disalign.fit(features, model.classifier, rho, **options).state_dict().items()
    }


@pytest.mark.filterwarnings("ignore:classifiers get:UserWarning")
def test_its_options_are_those_of_fit(stage_one, tmp_path, capfd):
    anchored = {"anchor": "logit_adjust", "confidence": "one"}
    given = {
        "penalty": (["--penalty", "0.5", "--rho", "0.7"], [], learnt(stage_one, 0.7, penalty=0.5)),
        "anchor": (
            ["--anchor", "logit_adjust", "--cross-fit", "3"],
            ["model.calibration.confidence=one"],
            learnt(stage_one, 1.5, cross_fit=3, **anchored),
        ),
    }
    for name, (flags, options, expected) in given.items():
        assert fit(DISALIGN["linear"], stage_one, tmp_path / name, *flags, options=options) == 0
        (path,) = (tmp_path / name).glob("*.pth")
        found = load(path)["state_dict"]
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_views_and_half_precision(stage_one, tmp_path, capfd):
    flags = ("--views", "2", "--dtype", "float16", "--features", str(tmp_path / "features"))
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "a", *flags) == 0
    assert "pass over 484 rows" in capfd.readouterr().out
    assert disalign.Features.open(tmp_path / "features" / "train").x.dtype == torch.float16
    assert len(disalign.Features.open(tmp_path / "features" / "test")) == 500
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "b", *flags) == 0  # the views are not drawn again
    a, b = (load(tmp_path / name / "fit_rho-1.5.pth")["state_dict"] for name in "ab")
    assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_images_without_views_come_out_again_or_are_refused(stage_one, tmp_path, monkeypatch):
    config = load_config(DISALIGN["linear"], {})
    model, _ = load_model(load_config(BASELINE["linear"], {}), str(stage_one))
    collect_features(model, config, out=tmp_path)
    drawn = DigitsLT.__getitem__

    def inverted(self, index):
        example = drawn(self, index)
        return example | {"inputs": 255 - example["inputs"]}

    monkeypatch.setattr(DigitsLT, "__getitem__", inverted)
    with pytest.raises(InputError, match="to come out again, but some differ"):
        collect_features(model, config, out=tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_in_another_order_are_refused(split, stage_one, tmp_path, capfd):
    options = (f"{split}_dataloader.dataset.classes={[str(digit) for digit in reversed(range(10))]}",)
    assert fit(DISALIGN["linear"], stage_one, tmp_path, options=options) == 2
    assert f"expected the 10 classes of the training set in the {split} set, in the same order" in (
        capfd.readouterr().err
    )


def test_the_config_names_stage_one_and_the_folder(stage_one, tmp_path, capfd):
    options = ["--cfg-options", f"stage_one={stage_one}", f"work_dir={tmp_path}", "val_dataloader.dataset.split=train"]
    assert fit_command.main([DISALIGN["linear"], *options]) == 0
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "b") == 0
    name = "results_fit_rho-1.5.json"
    assert results(tmp_path, name) == results(tmp_path / "b", name)  # of the test set, whatever validation sees
    assert "warning: " not in capfd.readouterr().err


def test_a_fit_never_replaces_its_own_stage_one(stage_one, tmp_path, capfd):
    path = tmp_path / "fit_rho-1.5.pth"
    path.write_bytes(stage_one.read_bytes())
    assert fit(DISALIGN["linear"], path, tmp_path, "--force") == 2
    assert "which is read; name another" in capfd.readouterr().err
    assert path.read_bytes() == stage_one.read_bytes()


def test_what_the_solver_says_is_printed(stage_one, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(disalign.fitting, "MEMORISED", 1.0)
    assert fit(DISALIGN["linear"], stage_one, tmp_path) == 0
    assert "warning: stage one gets " in capfd.readouterr().err


def test_a_class_without_images_is_left_out_where_the_loss_leaves_it_out(stage_one, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(DigitsLT, "profile", (*DigitsLT.profile[:-1], 0))
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "a") == 2
    assert "expected at least one training example per class, got none for class" in capfd.readouterr().err
    assert fit(DISALIGN["linear"], stage_one, tmp_path / "b", options=("model.loss.zero_count=exclude",)) == 0
    meta = load(tmp_path / "b" / "fit_rho-1.5.pth")["meta"]["disalign"]
    assert list(meta["fit"]["left_out"]) == [meta["class_counts"].index(0)]


class Listed:
    """Of a data set what tells it from others."""

    def __init__(self, folder="/a", images=("0.png", "1.png"), labels=(0, 1)):
        self.images, self.labels = [f"{folder}/{name}" for name in images], torch.tensor(labels)

    def __len__(self):
        return len(self.images)


class Kept(Listed):
    def __init__(self, value, labels):
        super().__init__(labels=labels)
        self.images = np.full((2, 8, 8), value, np.uint8)


def test_images_labels_transforms_and_views_tell_one_pass_from_another():
    def told(dataset, transforms=(), copies=1):
        return _describe(dataset, {"transforms": transforms}, copies)

    one = told(Listed())
    assert one == told(Listed("/b/c"))  # wherever they lie
    others = [
        Listed(images=("0.png", "2.png")),
        Listed(labels=(1, 0)),
        Kept(0, (0, 1)),
        Kept(1, (0, 1)),
        Kept(0, (1, 0)),
    ]
    described = [one, *map(told, others), told(Listed(), ["crop"]), told(Listed(), copies=2)]
    assert len(set(described)) == 8


def test_a_split_without_a_number_of_views():
    with pytest.raises(InputError, match="expected 0 views"):
        collect_features(None, load_config(DISALIGN["linear"], {}), views=-2)
