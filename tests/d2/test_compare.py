"""Methods compared by the command, against the commands that learn and evaluate one calibration."""

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest

detectron2 = pytest.importorskip("detectron2")

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from disalign import AdaptiveCalibration, Features, InputError
from disalign_d2 import compare as compare_command
from disalign_d2 import fit as fit_command
from disalign_d2.freezing import LeanRPN
from disalign_d2.replay import detector_of

from . import runs
from .annotations import unique
from .models import batch, random_calibration, stages
from .models import tiny_cfg as model_config
from .runs import figures, load, main
from .test_fit import PREDICTOR

FEW = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.trained(tmp_path_factory.getbasetemp() / "d2")


def compared(config, stage_ones, out, *options, flags=()) -> int:
    """Exit status of the command, in this process."""
    command = [config, "--stage-one", *stage_ones, "--out", out, *flags]
    with runs.quiet():
        return compare_command.main([*map(str, command), *(["--opts", *map(str, options)] if options else [])])


def fitted(config, stage_one, folder) -> Path:
    """The checkpoint of the command that learns DisAlign alone."""
    with runs.quiet():
        assert fit_command.main([str(config), "--stage-one", str(stage_one), "--opts", "OUTPUT_DIR", str(folder)]) == 0
    return folder / "fit_rho-0.8.pth"


def written(folder) -> dict:
    return json.loads((Path(folder) / "comparison.json").read_text())


def evaluated(config, weights, folder, *options) -> dict:
    """The figures of a checkpoint's boxes by train_net, which also has stage one's."""
    flags = ["--eval-only"]
    assert main(config, folder, "MODEL.WEIGHTS", weights, *options, flags=flags) == 0
    (found,) = figures(folder).values()
    return {stage: tasks["bbox"] for stage, tasks in found.items()}


@pytest.fixture(scope="module")
def cascade(tiny, tmp_path_factory):
    """A cascade's stage two, and a stage one for it."""
    folder = tmp_path_factory.mktemp("cascade")
    config_one = runs.write_config(folder, tiny.data, "one", cascade=True)
    steps = ["SOLVER.MAX_ITER", 40, "SOLVER.BASE_LR", 0.05, "DATASETS.TEST", "()"]
    assert main(config_one, folder / "one", *steps) == 0
    config_two = runs.write_config(folder, tiny.data, "two", cascade=True, calibrate=True)
    return config_two, folder / "one" / "model_final.pth"


@pytest.mark.parametrize("kind", ["one predictor", "cascade"])
def test_its_figures_are_those_of_an_evaluation_of_each(kind, tiny, cascade, tmp_path, capfd):
    config, weights = cascade if kind == "cascade" else (tiny.config_two, tiny.weights_one)
    few = ["TEST.DETECTIONS_PER_IMAGE", 3]
    assert compared(config, [weights], tmp_path / "out", *few, flags=["--methods", "disalign", "--sweep", "0"]) == 0
    assert "disalign report" in capfd.readouterr().out
    content = written(tmp_path / "out")
    (run,) = content["runs"]

    checkpoint = fitted(config, weights, tmp_path / "fit")
    # AP of the few detections that the config keeps; fixed AP of more.
    normal = evaluated(config, checkpoint, tmp_path / "normal", *few)
    many = evaluated(config, checkpoint, tmp_path / "many", "TEST.DETECTIONS_PER_IMAGE", 1000, "TEST.FIXED_AP", True)
    assert normal["disalign"] != normal["stage_one"]
    assert many["disalign"]["AP-fixed"] != normal["disalign"]["AP"] > 0
    for name in ("stage_one", "disalign"):
        found = run["methods"][name]["figures"]
        assert {key: found[key] for key in FEW} == {key: normal[name][key] for key in FEW}
        fixed = [key for key in many[name] if key.endswith("-fixed")]
        assert {key: found[key] for key in fixed} == {key: many[name][key] for key in fixed}
    (sweep,) = run["sweep"]
    assert sweep["value"] == 0
    assert sweep["figures"] == run["methods"]["rho_0"]["figures"] != run["methods"]["disalign"]["figures"]

    # Per class, as the evaluator left them for this set.
    disalign = run["methods"]["disalign"]
    per_class = json.loads((tmp_path / "normal" / "inference" / "lvis_results.json").read_text())["bbox"]["per_class"]
    assert disalign["per_class"]["AP"] == per_class["AP"]
    assert content["group_of"] == per_class["group"] == list("ffccr")
    state = load(checkpoint)["model"]
    last = PREDICTOR.replace("predictor.", "predictor.2.") if kind == "cascade" else PREDICTOR
    assert disalign["margin"] == state[last + "margin"].tolist()
    assert disalign["magnitude"] == state[last + "magnitude"].tolist()
    facts = {"task": "detection", "dataset": tiny.data["val"][0], "examples": 6, "rho": 0.8}
    assert facts.items() <= content.items()
    assert content["classes"] == runs.COLOURS
    assert content["class_counts"] == [12, 7, 3, 2, 2]
    assert content["columns"]["APr-fixed"] == "APr fixed"


def test_norcal_by_hand(tiny, tmp_path):
    (tmp_path / "instances.json").write_text("[90, 60, 30, 4, 4]")  # other than the images that show a class
    counts = ["MODEL.DISALIGN.CLASS_COUNTS", tmp_path / "instances.json"]
    assert compared(tiny.config_two, [tiny.weights_one], tmp_path / "out", *counts, flags=["--methods", "all"]) == 0
    methods = written(tmp_path / "out")["runs"][0]["methods"]
    assert {"tau_normalize", "vs", "marc", "disalign_anchor"} < set(methods)
    assert not {"crt", "ncm", "rebalance", "disalign_cross_fit", "bound"} & set(methods)

    checkpoint = load(tiny.weights_two)
    annotations = json.loads(Path(tiny.data["train"][1]).read_text())["annotations"]
    shown = [len({one["image_id"] for one in annotations if one["category_id"] == label}) for label in range(1, 6)]
    checkpoint["model"] = {name: one for name, one in checkpoint["model"].items() if ".confidence." not in name}
    checkpoint["model"][PREDICTOR + "magnitude"] = torch.ones(5)
    checkpoint["model"][PREDICTOR + "margin"] = -0.6 * torch.tensor(shown).double().log().float()
    torch.save(checkpoint, tmp_path / "norcal.pth")
    options = ["MODEL.DISALIGN.CONFIDENCE", "one"]
    by_hand = evaluated(tiny.config_two, tmp_path / "norcal.pth", tmp_path / "hand", *options)["disalign"]
    assert {key: methods["norcal"]["figures"][key] for key in FEW} == {key: by_hand[key] for key in FEW}


@pytest.mark.parametrize("cascade", [False, True])
def test_all_but_the_calibration_is_computed_once(cascade, monkeypatch):
    _, model = stages(cascade=cascade)
    predictors = model.roi_heads.box_predictors()
    own = [predictor.cls_score.calibration for predictor in predictors]
    random_calibration(model)
    inputs = [[{"image": image["image"], "height": 32, "width": 48}] for image in batch(3)]

    def another(t):
        return [one.strength(t) for one in own]

    # A calibration may also be one without a background or a confidence: the identity, as stage one's.
    candidates = [another(1), [AdaptiveCalibration(6, 16, confidence="one") for _ in own], another(-3), another(2)]
    expected = []
    for candidate in candidates:
        for predictor, calibration in zip(predictors, candidate, strict=True):
            predictor.cls_score.calibration = calibration
        with torch.no_grad():
            expected.append([model(images) for images in inputs])
    for predictor, calibration in zip(predictors, own, strict=True):
        predictor.cls_score.calibration = calibration

    counts = {}
    for kind in (FPN, LeanRPN, ROIPooler, FastRCNNConvFCHead):

        def counted(self, *given, kind=kind, forward=kind.forward):
            counts[kind] = counts.get(kind, 0) + 1
            return forward(self, *given)

        monkeypatch.setattr(kind, "forward", counted)
    model.train()
    with detector_of(model, candidates) as detect:
        found = [detect(images) for images in inputs]
    per_image = {FPN: 1, LeanRPN: 1, ROIPooler: len(own), FastRCNNConvFCHead: len(own)}
    assert counts == {kind: 3 * number for kind, number in per_image.items()}

    boxes = set()
    for number in range(len(candidates)):
        for image in range(3):
            ((ours,), (theirs,)) = found[image][number], expected[number][image]
            ours, theirs = ours["instances"], theirs["instances"]
            assert not ours.has("pred_masks")
            for name in ("scores", "pred_classes"):
                assert torch.equal(ours.get(name), theirs.get(name))
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
            boxes.add(tuple(ours.scores.tolist()))
    assert len(boxes) == 12  # they differ

    # The model is what it was.
    assert [predictor.cls_score.calibration for predictor in predictors] == own
    assert model.training
    counts.clear()
    with torch.no_grad():
        again = model.eval()(inputs[0])
    assert again[0]["instances"].has("pred_masks")
    assert counts[FPN] == 1


def test_two_stage_ones_and_kept_features(tiny, tmp_path, capfd):
    changed = load(tiny.weights_one)
    changed["model"]["roi_heads.box_predictor.cls_score.weight"] *= torch.linspace(0.5, 2, 6)[:, None]
    torch.save(changed, other := tmp_path / "other.pth")
    weights, flags = [tiny.weights_one, other], ["--methods", "disalign", "--features", tmp_path / "rows"]
    assert compared(tiny.config_two, weights, tmp_path / "out", flags=flags) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.npy")}
    assert {path.parent.name for path in before} == {"stage_one_0", "stage_one_1"}
    capfd.readouterr()
    assert compared(tiny.config_two, weights, tmp_path / "again", flags=flags) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.npy")} == before

    content, again = written(tmp_path / "out"), written(tmp_path / "again")
    one, two = ([run["methods"][name]["figures"] for name in ("stage_one", "disalign")] for run in content["runs"])
    assert one != two
    assert [run["methods"]["disalign"]["figures"] for run in again["runs"]] == [one[1], two[1]]
    assert [run["stage_one"] for run in content["runs"]] == [str(path) for path in weights]
    for number, (run, path) in enumerate(zip(content["runs"], weights, strict=True)):
        rows, state = Features.open(tmp_path / "rows" / f"stage_one_{number}"), load(path)["model"]
        weight, bias = (state[f"roi_heads.box_predictor.cls_score.{name}"] for name in ("weight", "bias"))
        right = (rows.x.float() @ weight.T + bias).argmax(1) == rows.y
        shares = [right[rows.y == label].double().mean().item() for label in range(5) if label in rows.y]
        assert run["train"] == {"balanced": pytest.approx(100 * sum(shares) / len(shares), abs=1e-6)}
    ap = torch.tensor([one[1]["AP"], two[1]["AP"]])
    row = rf"^DisAlign +rho 0.8 +{ap.mean():.1f} \+- {ap.std():.1f} "
    assert re.search(row, capfd.readouterr().out, re.M)
    # Alone, the second gives the same.
    assert compared(tiny.config_two, [other], tmp_path / "alone", flags=["--methods", "disalign"]) == 0
    assert written(tmp_path / "alone")["runs"][0]["methods"]["disalign"]["figures"] == two[1]


def test_a_set_of_detectron2s_coco_evaluator_has_no_fixed_ap(tiny, tmp_path):
    content = json.loads(Path(tiny.data["val"][1]).read_text())
    content["annotations"] = [one | {"iscrowd": 0} for one in content["annotations"]]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    name = unique("coco")
    register_coco_instances(name, {}, str(tmp_path / "coco.json"), tiny.data["val"][2])
    options = ["DATASETS.TEST", (name,)]
    assert compared(tiny.config_two, [tiny.weights_one], tmp_path / "out", *options, flags=["--methods", "vs"]) == 0
    found = written(tmp_path / "out")
    stage_one = found["runs"][0]["methods"]["stage_one"]
    normal = evaluated(tiny.config_two, tiny.weights_two, tmp_path / "normal", *options)["stage_one"]
    assert list(found["columns"]) == ["AP", "AP50", "AP75"]
    assert stage_one["figures"] == {key: value for key, value in normal.items() if not key.startswith("AP-")}
    assert stage_one["per_class"]["AP"] == [normal[f"AP-{colour}"] for colour in runs.COLOURS]
    assert found["group_of"] == list("crrrr")  # 12 training images show the first


REFUSED = {
    "a stage one's config": (["one", "one"], [], [], "expected the config of a stage two"),
    "no stage one": (["two", ""], [], [], "expected stage-one checkpoints, got none"),
    "a stage two": (["two", "two"], [], [], "already holds a calibration"),
    "a method": (["two", "one"], ["--methods", "magic"], [], "expected methods among stage_one, logit_adjust, tau_"),
    "crt": (["two", "one"], ["--methods", "crt"], [], "'crt': its background is a sample of proposals"),
    "a rho": (["two", "one"], ["--rho", "-1"], [], "expected a finite rho >= 0, got -1"),
    "a sweep": (["two", "one"], ["--sweep", "1", "-2"], [], "expected a finite rho >= 0, got -2"),
    "a weightless background": (
        ["two", "one"],
        [],
        ["MODEL.DISALIGN.BACKGROUND_WEIGHT", "0.0"],
        "expected a background_weight > 0",
    ),
    "no test set": (
        ["two", "one"],
        [],
        ["DATASETS.TEST", "()"],
        "one dataset in DATASETS.TEST to compare on, got none",
    ),
    "two test sets": (["two", "one"], [], ["DATASETS.TEST", "('a', 'b')"], "compare on, got a, b; name one"),
    "no images": (["two", "one"], ["--images", "0"], [], "expected 1 or more images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tiny, tmp_path, capfd):
    (config, weights), flags, options, sentence = REFUSED[name]
    weights = vars(tiny)[f"weights_{weights}"] if weights else ""
    assert compared(vars(tiny)[f"config_{config}"], [weights], tmp_path / "out", *options, flags=flags) == 2
    (line,) = re.findall(r"^error: .*$", capfd.readouterr().err, re.M)
    assert sentence in line
    assert not (tmp_path / "out" / "comparison.json").exists()


@pytest.mark.parametrize(
    ("counts", "sentence"), [(None, "an unknown number"), (torch.tensor([12, 7, 3, 2, 0]), "none for class 4")]
)
def test_norcal_needs_the_images_of_each_class(counts, sentence, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(compare_command, "training_image_counts", lambda cfg: counts)
    flags = ["--methods", "norcal"]
    assert compared(tiny.config_two, [tiny.weights_one], tmp_path, flags=flags) == 2
    expected = f"got 'norcal': it needs training images of each class, and there are {sentence}"
    assert expected in capfd.readouterr().err


def test_the_losses_zero_count_is_the_methods():
    _, model = stages()
    cfg = model_config(calibrate=True)
    (predictor,) = model.roi_heads.box_predictors()
    classes = predictor.num_classes
    y = torch.tensor([*range(classes - 1), classes]).repeat(12)  # without the last, with the background
    x = torch.randn(len(y), predictor.cls_score.in_features, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(y)[:classes]
    rows = Features.from_arrays(x, y, class_counts=counts, background=True)
    names, args = ["stage_one", "logit_adjust", "rho_0"], Namespace(seed=0, sweep=())
    with pytest.raises(InputError, match=f"got none for class {classes - 1}"):
        compare_command.learn(model, cfg, [rows], names, 0.8, None, args)
    predictor.loss.zero_count = "exclude"
    found, _, _ = compare_command.learn(model, cfg, [rows], names, 0.8, None, args)
    assert [one.name for one in found] == names


def test_what_would_only_show_after_the_passes_is_refused_before(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(compare_command, "learn", lambda *_: pytest.fail("it has run a pass"))
    weightless = ["MODEL.DISALIGN.BACKGROUND_WEIGHT", "0.0"]
    for flags, options in ((["--sweep", "1", "-2"], []), ([], weightless)):
        assert compared(tiny.config_two, [tiny.weights_one], tmp_path / "out", *options, flags=flags) == 2
    (tmp_path / "broken.pth").write_text("no checkpoint")
    assert compared(tiny.config_two, [tiny.weights_one, tmp_path / "broken.pth"], tmp_path / "out") == 2
    assert "broken.pth" in capfd.readouterr().err

    bare = json.loads(Path(tiny.data["val"][1]).read_text()) | {"annotations": []}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    data = tiny.data | {"val": [unique("bare"), str(tmp_path / "bare.json"), tiny.data["val"][2]]}
    config = runs.write_config(tmp_path, data, calibrate=True)
    assert compared(config, [tiny.weights_one], tmp_path / "out") == 2
    assert f"expected annotations in '{data['val'][0]}' to compare on, got none" in capfd.readouterr().err

    name = unique("another")
    DatasetCatalog.register(name, lambda: DatasetCatalog.get(tiny.data["val"][0]))
    MetadataCatalog.get(name).set(evaluator_type="cityscapes_instance")
    assert compared(tiny.config_two, [tiny.weights_one], tmp_path / "out", "DATASETS.TEST", (name,)) == 2
    assert "of type 'cityscapes_instance'" in capfd.readouterr().err


def test_an_earlier_comparison_is_kept_without_force(tiny, tmp_path, capfd):
    place = tmp_path / "out" / "compare" / "comparison.json"
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    # Without --out it is below OUTPUT_DIR.
    command = [tiny.config_two, "--stage-one", tiny.weights_one, "--methods", "stage_one"]
    options = ["--opts", "OUTPUT_DIR", tmp_path / "out"]
    with runs.quiet():
        assert compare_command.main([*map(str, [*command, *options])]) == 2
    assert "add --force to replace it" in capfd.readouterr().err
    assert place.read_text() == "mine"
    with runs.quiet():
        assert compare_command.main([*map(str, [*command, "--force", *options])]) == 0
    content = written(place.parent)
    assert list(content["runs"][0]["methods"]) == ["stage_one", "logit_adjust", "rho_0"]
    assert shlex.split(content["command"]) == [
        *("python", "-m", "disalign_d2.compare"),
        *map(str, [*command, "--force", *options]),
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare"}
    assert {path.name for path in place.parent.iterdir()} == {"comparison.json", "evaluations"}
    assert "Evaluating rho_0" in (place.parent / "evaluations" / "log.txt").read_text()
