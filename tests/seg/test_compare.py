"""Related methods on the same network's scores: through the command, and image by image."""

import copy
import json
import math
import shlex
import statistics
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.runner import autocast
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS, MODELS
from torch import nn

import disalign
from disalign import AdaptiveCalibration, InputError
from disalign.comparison import BINS, METHODS, Candidate
from disalign.modules import with_calibration
from disalign.report import without_nan
from disalign_mmengine.checkpoints import load_checkpoint, load_whole
from disalign_mmengine.cli import load_config
from disalign_mmseg import collect
from disalign_mmseg import compare as compare_command
from disalign_mmseg.cli import linear_of
from disalign_mmseg.metrics import LongTailIoUMetric
from disalign_tools import compare as dispatched

from . import annotated
from .runs import left_behind, load, quick
from .test_fit import COUNTED, fit, results
from .toy_models import COUNTS, FCN, OCR, stage_two

GROUPS = ("head", "body", "tail")
#: Figure of a comparison -> that of a report.
NAMES = {
    **{"mIoU": "mIoU", "balanced": "mAcc", "average": "aAcc"},
    **{f"mIoU.{group}": f"mIoU.{group}" for group in GROUPS},
    **{group: f"mAcc.{group}" for group in GROUPS},
}
SLIDE = [f"model.test_cfg.{text}" for text in ("mode=slide", "crop_size=48,48", "stride=32,32")]


def compare(config, stage_ones, work_dir, *flags, options=(), main=compare_command.main):
    """Exit status of ``disalign_mmseg.compare``."""
    given = [str(config), "--stage-one", *map(str, stage_ones), "--out", str(work_dir), *map(str, flags)]
    return main([*given, "--cfg-options", *quick(), *options])


def comparison(folder):
    return json.loads((folder / "comparison.json").read_text())


def same_figures(found, report, rel=1e-6):
    """Whether a comparison's part of a method has a report's figures, of the classes and of all."""
    expected = {name: report["figures"].get(theirs) for name, theirs in NAMES.items()}
    assert {name: found["figures"].get(name) for name in NAMES} == pytest.approx(expected, rel=rel)
    for ours, theirs in (("iou", "IoU"), ("accuracy", "Acc")):
        for value, other in zip(found["per_class"][ours], report["per_class"][theirs], strict=True):
            assert (value is None) == (other is None)
            assert value is None or value == pytest.approx(other, rel=1e-9)


# Through the command.


@pytest.fixture(scope="module")
def features(configs, stage_one, tmp_path_factory):
    """A fit of rho 0.2, and its pass that comparisons start from."""
    folder = tmp_path_factory.mktemp("features")
    assert fit(configs.two, stage_one, folder / "fit", "--features", str(folder / "kept")) == 0
    return folder / "kept"


@pytest.fixture
def seen(monkeypatch):
    """What the network sees: images, or crops."""
    found, extract_feat = [], EncoderDecoder.extract_feat

    def counted(model, inputs):
        found.append(inputs.shape)
        return extract_feat(model, inputs)

    monkeypatch.setattr(EncoderDecoder, "extract_feat", counted)
    return found


@pytest.mark.parametrize("options", [[], SLIDE], ids=["whole", "slide"])
def test_figures_are_those_of_the_test_command(options, features, configs, stage_one, tmp_path, capfd, seen):
    report = results(features.parent / "fit", "results_fit_rho-0.2")
    if options:
        assert fit(configs.two, stage_one, tmp_path / "fit", "--features", str(features), options=options) == 0
        whole, report = report, results(tmp_path / "fit", "results_fit_rho-0.2")
        assert report["stage_one"] != whole["stage_one"]
    del seen[:]
    capfd.readouterr()
    assert compare(configs.two, [stage_one], tmp_path, "--features", features, options=options) == 0
    content = comparison(tmp_path)
    given = [str(configs.two), "--stage-one", str(stage_one), "--out", str(tmp_path), "--features", str(features)]
    typed = [word for word in shlex.split(content["command"]) if not word.startswith("experiment_name=")]
    assert typed == ["python", "-m", "disalign_mmseg.compare", *given, "--cfg-options", *options]
    (run,) = content["runs"]
    dataset = DATASETS.build(load_config(str(configs.two), {}).test_dataloader.dataset)
    sizes = [dataset[number]["inputs"].shape[1:] for number in range(len(dataset))]
    windows = [math.prod(1 + max(math.ceil((side - 48) / 32), 0) for side in size) for size in sizes]
    # Once, whatever the number of methods; and a few images whose features are compared with those that are there.
    assert len(seen) == collect.COMPARED + (sum(windows) if options else len(dataset))
    same_figures(run["methods"]["stage_one"], report["stage_one"])
    same_figures(run["methods"]["disalign"], report)
    assert report["stage_one"]["figures"] != report["figures"]
    margin = load(features.parent / "fit" / "fit_rho-0.2.pth")["state_dict"]["decode_head.calibration.margin"]
    assert run["methods"]["disalign"]["margin"] == margin.tolist()
    ends = [one["figures"] for one in run["dial"] if one["value"] in (0, 1)]
    assert ends == [run["methods"][name]["figures"] for name in ("stage_one", "disalign")]
    assert content["group_of"] == report["per_class"]["group"]
    assert {key: content[key] for key in ("task", "dataset", "rho", "examples", "classes", "class_counts")} == {
        "task": "segmentation",
        "dataset": "ADE20KDataset",
        "rho": 0.2,
        "examples": report["images"],
        "classes": report["classes"],
        "class_counts": report["class_counts"],
    }
    lines = capfd.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("stage one ")]
    shown = ("mIoU", "balanced", "average", "mIoU.head", "mIoU.body", "mIoU.tail", "ece")
    own = run["methods"]["stage_one"]["figures"]
    assert row.split()[2:] == [*(f"{own[name]:.1f}" for name in shown), "+0.0", "0.0"]
    assert lines[-1] == f"written to {tmp_path / 'comparison.json'}; for pictures: disalign report {tmp_path}"


def stock_scores(config, path):
    """(K, H, W) scores and (H, W) labels of stage one's own model, by its own config."""
    config = load_config(str(config), {})
    model = MODELS.build(config.model)
    load_whole(model, load_checkpoint(path), str(path))
    model.eval()
    dataset = DATASETS.build(config.test_dataloader.dataset)
    with torch.no_grad():
        for number in range(len(dataset)):
            (sample,) = model.test_step(pseudo_collate([dataset[number]]))
            yield sample.seg_logits.data, sample.gt_sem_seg.data[0]


def test_logit_adjustment_by_another_route(features, configs, stage_one, tmp_path):
    assert compare(configs.two, [stage_one], tmp_path, "--features", features, "--methods", "logit_adjust") == 0
    content = comparison(tmp_path)
    shift = -torch.tensor(content["class_counts"]).log()[:, None, None]
    hits, pixels, union = torch.zeros(3, 150, dtype=torch.float64)
    loss = 0.0
    for scores, label in stock_scores(configs.one, stage_one):
        adjusted, valid = scores + shift, label != 255
        loss += float(F.cross_entropy(adjusted[None], label[None], ignore_index=255, reduction="sum"))
        predicted = adjusted.argmax(0)
        for label_, sums in ((j, (hits, pixels, union)) for j in range(150)):
            ours, theirs = (predicted == label_) & valid, label == label_
            for summed, area in zip(sums, (ours & theirs, theirs, ours | theirs), strict=True):
                summed[label_] += int(area.sum())
    there = pixels > 0
    figures = content["runs"][0]["methods"]["logit_adjust"]["figures"]
    assert figures["mIoU"] == pytest.approx(100 * float((hits / union)[there].mean()), rel=1e-3)
    assert figures["balanced"] == pytest.approx(100 * float((hits / pixels)[there].mean()), rel=1e-3)
    assert figures["average"] == pytest.approx(100 * float(hits.sum() / pixels.sum()), rel=1e-3)
    assert figures["nll"] == pytest.approx(loss / float(pixels.sum()), rel=1e-4)
    assert figures["mIoU"] != content["runs"][0]["methods"]["stage_one"]["figures"]["mIoU"]


@pytest.fixture(scope="module")
def other(stage_one, tmp_path_factory):
    """Another stage one, whose classifier differs."""
    checkpoint = load(stage_one)
    checkpoint["state_dict"]["decode_head.conv_seg.weight"] *= 1.5
    path = tmp_path_factory.mktemp("other") / "other.pth"
    torch.save({key: checkpoint[key] for key in ("meta", "state_dict")}, path)
    return path


def test_two_stage_ones(configs, stage_one, other, tmp_path, capfd, monkeypatch, seen):
    learn = compare_command.candidates
    monkeypatch.setattr(compare_command, "candidates", lambda *a, **b: (learn(*a, **b)[0], ["take care"]))
    flags = ["--features", tmp_path / "kept", "--methods", "disalign", "--rho", "0.5", "--sweep", "1"]
    flags += ["--pixels", "8", "--images", "9", "--force"]
    options = [COUNTED, "test_evaluator.class_counts=None", "test_evaluator.groups=None"]
    assert compare(configs.two, [stage_one, other], tmp_path, *flags, options=options) == 0
    out, error = capfd.readouterr()
    content = comparison(tmp_path)
    assert [run["stage_one"] for run in content["runs"]] == [str(stage_one), str(other)]
    values = [run["methods"]["stage_one"]["figures"]["ece"] for run in content["runs"]]
    assert f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}" in out
    assert "mean +- standard deviation of 2 stage ones" in out
    assert "% of its training set right, averaged over the classes" in out
    assert [run["notes"] for run in content["runs"]] == [["take care"]] * 2
    assert error.count("warning: take care\n") == 2
    both = [disalign.Features.open(tmp_path / "kept" / f"stage_one_{number}") for number in (0, 1)]
    assert [(one.x.shape, one.x.dtype) for one in both] == [((72, 4, 16), torch.float16)] * 2
    for run, path, kept in zip(content["runs"], (stage_one, other), both, strict=True):
        weights = load(path)["state_dict"]
        linear = nn.Linear(16, 150)
        linear.load_state_dict({name: weights[f"decode_head.conv_seg.{name}"].squeeze() for name in ("weight", "bias")})
        cells = kept.x.float() @ linear.weight.detach().T + linear.bias.detach()
        right = torch.einsum("nck,nc->nk", cells, kept.bilinear.float()).argmax(1) == kept.y
        shares = [np.average(right[kept.y == one], weights=kept.weights[kept.y == one]) for one in kept.y.unique()]
        assert run["train"] == {"balanced": pytest.approx(100 * statistics.mean(shares), abs=1e-6)}
        for name, rho in (("rho_0", 0.0), ("disalign", 0.5)):
            expected = disalign.fit(kept, linear, rho).calibration.margin.tolist()
            assert run["methods"][name]["margin"] == pytest.approx(expected, abs=1e-5)
        (swept,) = run["sweep"]
        assert swept["value"] == 1
        assert swept["figures"] != run["methods"]["disalign"]["figures"]
    first = len(seen)
    assert compare(configs.two, [stage_one, other], tmp_path, *flags, options=options) == 0
    assert len(seen) - first == first - 2 * (9 - collect.COMPARED)  # the features are there
    again = comparison(tmp_path)["runs"]
    assert again[1]["methods"]["rho_0"]["figures"] == content["runs"][1]["methods"]["rho_0"]["figures"]
    record = json.loads((tmp_path / "class_counts.json").read_text())
    assert content["class_counts"] == record["train_counts"] == both[0].totals.tolist()
    assert record["total_pixels"] > sum(record["train_counts"])
    shares = [count / record["total_pixels"] for count in record["train_counts"]]
    groups = ["head" if share > 0.01 else "tail" if share <= 0.001 else "body" for share in shares]
    assert content["group_of"] == groups
    assert content["groups_text"]["head"] == "more than 1 % of all training pixels"


def test_a_class_without_pixels_is_left_out_if_the_loss_says_so(configs, stage_one, tmp_path, capfd, seen, caplog):
    (tmp_path / "counts.json").write_text(json.dumps([0, *range(1, 150)]))
    loss = "model.decode_head.loss_decode"
    options = [f"{loss}.class_counts={tmp_path / 'counts.json'}"]
    assert compare(configs.two, [stage_one], tmp_path / "w", options=options) == 2
    assert "expected at least one training example per class, got none for class 0" in capfd.readouterr().err
    options += [f"{loss}.zero_count=exclude"]
    assert compare(configs.two, [stage_one], tmp_path / "w", "--methods", "vs", options=options) == 2
    assert (
        "got 'vs': it needs training examples of each class, and there are none for class 0" in capfd.readouterr().err
    )
    assert not seen
    flags = ["--methods", "all", "--pixels", "8", "--images", "9"]
    assert compare(configs.two, [stage_one], tmp_path / "w", *flags, options=options) == 0
    methods = comparison(tmp_path / "w")["runs"][0]["methods"]
    assert not {"vs", "disalign_shrunk"} & methods.keys()
    assert methods["logit_adjust"]["margin"][0] == 0
    assert "vs is left out: it needs training examples" in caplog.text


def test_an_earlier_comparison_is_kept_without_force(features, configs, stage_one, tmp_path, capfd):
    (tmp_path / "comparison.json").write_text("mine")
    flags = ("--features", features, "--methods", "stage_one")
    assert compare(configs.two, [stage_one], tmp_path, *flags) == 2
    assert "add --force to replace it" in capfd.readouterr().err
    assert (tmp_path / "comparison.json").read_text() == "mine"
    assert compare(configs.two, [stage_one], tmp_path, *flags, "--force") == 0
    assert comparison(tmp_path)["runs"]


KNOWN = ", ".join(METHODS)
REFUSED = {
    "an unknown method": ("two", ["--methods", "nonsense"], [], f"expected methods among {KNOWN}, got nonsense"),
    "pixels are no examples": (
        "two",
        ["--methods", "crt"],
        [],
        "got 'crt': a row is a pixel interpolated from four cells, not an example",
    ),
    "stage one's config": ("one", [], [], "whose model has no calibration"),
    "the second one missing": ("two", ["--stage-one", "STAGE_ONE", "nowhere.pth"], [], "nowhere.pth"),
    "twice the same": ("two", ["--stage-one", "STAGE_ONE", "STAGE_ONE"], [], "expected every stage one once"),
    "a negative rho": ("two", ["--rho", "-1"], [], "expected a finite rho >= 0"),
    "a negative rho in the sweep": ("two", ["--sweep", "0", "-1"], [], "expected a finite rho >= 0"),
    "no pixels": ("two", ["--pixels", "0"], [COUNTED], "expected 1 or more pixels of each image, got 0"),
    "no evaluator": ("two", [], ["test_evaluator.type=Nothing"], "expected a config that can be built in"),
    "other classes": (
        "two",
        [],
        ["test_dataloader.dataset.metainfo.classes=wall,sky"],
        "expected the 150 classes of the training set in the test set",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_pass(name, configs, stage_one, tmp_path, capfd, seen):
    config, flags, options, sentence = REFUSED[name]
    flags = [str(stage_one) if flag == "STAGE_ONE" else flag for flag in flags]
    # By the command of all frameworks, which finds this one.
    given = {"options": options, "main": dispatched.main}
    assert compare(getattr(configs, config), [stage_one], tmp_path / "w", *flags, **given) == 2
    error = capfd.readouterr().err
    assert sentence in error
    assert error.count("error: ") == 1
    assert left_behind(tmp_path / "w") == []
    assert not seen


# Image by image.

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
FLIPPED = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=0.5, keep_ratio=True),
    dict(type="RandomFlip", prob=1.0),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
DA = {**FCN, "decode_head": {**FCN["decode_head"], "type": "DAHead", "pam_channels": 4}}
DA["decode_head"].pop("num_convs")
WINDOW = dict(mode="slide", crop_size=(24, 24), stride=(16, 16))
CASES = {
    "whole": dict(),
    "padded": dict(divisor=32),
    "smaller and flipped": dict(pipeline=FLIPPED, divisor=16),
    "sliding window": dict(config={**FCN, "test_cfg": WINDOW}),
    "cascade, sliding window": dict(config={**OCR, "test_cfg": WINDOW}),
    "a head of three outputs": dict(config=DA),
    "fp16": dict(fp16=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images with pixels to ignore; the last has no others."""
    path = tmp_path_factory.mktemp("data")
    sizes = ((40, 56), (56, 40), (40, 40), (64, 48), (24, 32))
    annotated.write(path, [0, 1, 2, 3, 255], sizes, "abcdf")
    annotated.put(path, "f.png", np.full(sizes[4], 255, np.uint8))
    return path


def toy(batch, config=FCN, divisor=None):
    """A stage two at the identity, whose scores differ from pixel to pixel of a batch."""
    torch.manual_seed(0)
    padding = None if divisor is None else dict(size_divisor=divisor)
    preprocessor = dict(type="SegDataPreProcessor", mean=MEAN, std=STD, bgr_to_rgb=True, test_cfg=padding)
    model = stage_two({**config, "data_preprocessor": preprocessor}).eval()
    with torch.no_grad():
        conv, scores = model.calibrated_head.conv_seg, model(**model.data_preprocessor(batch), mode="tensor")
        scores = scores[0] if isinstance(scores, tuple) else scores
        spread, mean = torch.std_mean(scores, dim=(0, 2, 3))
        conv.weight *= (2 / spread)[:, None, None, None]
        conv.bias.copy_(2 * (conv.bias - mean) / spread)
    return model


def batches(folder, pipeline=annotated.PIPELINE):
    data = annotated.dataset(folder, classes=tuple("abcde"), pipeline=pipeline)
    return [pseudo_collate([data[number]]) for number in range(len(data))]


def metric_of(counts=COUNTS):
    metric = LongTailIoUMetric(counts, groups=dict(head=0.4, tail=0.1))
    metric.dataset_meta = {"classes": list("abcde")}
    return metric


def candidates_of(model):
    """Stage one's classifier and some far from it: tensors that are learnt, and that are not."""
    linear = linear_of(model.calibrated_head.conv_seg)
    found = []
    for number, options in enumerate(({}, {"confidence": "one", "learn_margin": False}, {"learn_magnitude": False})):
        calibration = AdaptiveCalibration(5, linear.in_features, **options).requires_grad_(False)
        generator = torch.Generator().manual_seed(number)
        for tensor in (*calibration.parameters(), *calibration.buffers()):
            tensor.copy_(tensor + torch.randn(tensor.shape, generator=generator) / 2)
        found.append(Candidate("disalign", with_calibration(linear, calibration), 0.2, 0.0, METHODS["disalign"]))
    plain = Candidate("stage_one", linear, 0.0, 0.0, METHODS["stage_one"])
    return [plain, *found, replace(found[0], role="dial")]


def put_in(head, calibration):
    """Give a head a calibration's numbers, whichever it was built to learn."""
    own = head.calibration
    own.magnitude.data, own.margin.data = calibration.magnitude.clone(), calibration.margin.clone()
    if calibration.confidence is None:
        own.confidence = None
    else:
        own.confidence = nn.Conv2d(calibration.confidence.in_features, 1, 1)
        own.confidence.weight.data = calibration.confidence.weight.detach()[..., None, None]
        own.confidence.bias.data = calibration.confidence.bias.detach()


def by_its_own(model, loader, calibration, fp16):
    """The metric's report of a model with the calibration in it; the likelihood, and the confidences on the grid."""
    model, metric, confidences = copy.deepcopy(model), metric_of(), []
    head = model.calibrated_head
    put_in(head, calibration)
    head.calibration.register_forward_hook(lambda own, inputs, _: confidences.append(own.confidence_score(inputs[1])))
    loss, pixels = 0.0, 0
    for batch in loader:
        with torch.no_grad(), autocast(enabled=fp16):
            (sample,) = model.test_step(copy.deepcopy(batch))
        metric.process(batch, [sample.to_dict()])
        label = sample.gt_sem_seg.data.long()
        scores = sample.seg_logits.data.float()[None]
        loss += float(F.cross_entropy(scores, label, ignore_index=255, reduction="sum"))
        pixels += int((label != 255).sum())
    metric.evaluate(len(loader))
    return metric.report, loss / pixels, torch.cat([one.flatten() for one in confidences])


@pytest.mark.parametrize("name", CASES)
def test_all_are_evaluated_as_the_framework_does(name, folder, seen):
    case = dict(CASES[name])
    fp16, loader = case.pop("fp16", False), batches(folder, case.pop("pipeline", annotated.PIPELINE))
    model = toy(loader[0], **case)
    found = candidates_of(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    del seen[:]
    records = compare_command.evaluate(model, copy.deepcopy(loader), found, metric_of(), fp16)
    times = len(seen)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [one["role"] for one in records] == ["method"] * 4 + ["dial"]
    assert len({record["figures"]["nll"] for record in records}) == 4
    assert min(max(record["per_class"]["accuracy"][:4]) for record in records) < 90  # several classes are predicted
    for record, candidate in zip(without_nan(records), found, strict=True):
        report, loss, confidences = by_its_own(model, loader, candidate.calibration, fp16)
        same_figures(record, report)
        assert record["figures"]["nll"] == pytest.approx(loss, rel=1e-5)
        learnt = candidate.calibration.confidence is not None and candidate.role == "method"
        assert ("confidence" in record) == learnt
        if learnt:
            edges = torch.linspace(0, 1, BINS + 1)
            assert record["confidence"]["count"] == torch.histogram(confidences.float(), edges).hist.tolist()
            assert record["confidence"]["mean"] == pytest.approx(float(confidences.double().mean()))
    assert len(seen) == times * (1 + len(found))


def out_of_range(sample):
    sample.gt_sem_seg.data[0, 0, 0] = 7


def of_another_size(sample):
    sample.gt_sem_seg = PixelData(data=sample.gt_sem_seg.data[:, 1:])


WRONG = {
    "labels out of range": (out_of_range, "expected labels of the dataset's 5 classes, got class 7 for"),
    "another size": (of_another_size, r"expected an annotation as large as its image, got \[55, 40\] and \[56, 40\]"),
    "no ground truth": (lambda sample: delattr(sample, "gt_sem_seg"), "expected ground truth for"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ground_truth_is_refused(name, folder):
    change, sentence = WRONG[name]
    loader = batches(folder)
    model = toy(loader[0])
    change(loader[1]["data_samples"][0])
    with pytest.raises(InputError, match=sentence):
        compare_command.evaluate(model, loader, candidates_of(model), metric_of())


def test_scores_that_change_behind_the_classifier_are_refused(folder, monkeypatch):
    model = toy(batches(folder)[0])
    forward = type(model.decode_head).forward
    monkeypatch.setattr(type(model.decode_head), "forward", lambda head, inputs: 2 * forward(head, inputs))
    with pytest.raises(InputError, match="expected DisAlignFCNHead to score by its classifier alone, but it changes"):
        compare_command.evaluate(model, batches(folder), candidates_of(model), metric_of())
