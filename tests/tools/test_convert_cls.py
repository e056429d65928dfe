"""Image classifiers of all origins: into disalign_cls's stage two, into timm and back, scores compared by hand."""

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

import re

import numpy as np
import timm
import torch
import torchvision
from mmengine.registry import MODELS
from torch import nn

import disalign_cls  # noqa: F401
from disalign import load_stage_one

from .convert_sources import (
    BACKBONE,
    CLASSES,
    WIDTH,
    assert_scores,
    below,
    calibration,
    classification_by_hand,
    confidence_by_hand,
    cosine_by_hand,
    cvpods_names,
    linear_by_hand,
    refused,
    run,
    saved,
    small_resnet,
    tiny,
)


def config(folder, kind="DisAlignClassifier", num_classes=CLASSES, backbone=BACKBONE, **options):
    path = folder / "config.py"
    path.write_text(f"model = {dict(type=kind, backbone=backbone, num_classes=num_classes, **options)}\n")
    return path


def stage_two(classifier="linear", **options):
    model = dict(type="DisAlignClassifier", backbone=BACKBONE, num_classes=CLASSES, classifier=classifier, **options)
    return MODELS.build(model)


def features():
    return torch.randn(7, WIDTH, dtype=torch.float64).relu()


def assert_same_trunk(model, source):
    """The backbone computes the source's feature, in eval mode."""
    source.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().backbone(images), source.eval()(images))


# --------------------------------------------------------------------------------------------- official DisAlign


def test_the_official_stage_two_loads_whole_and_scores_as_its_formula(tmp_path, capsys):
    source = small_resnet()
    state = cvpods_names(source.state_dict()) | below("network.linear", calibration(CLASSES, WIDTH))
    state["loss_evaluator.weight"] = torch.rand(CLASSES)  # a buffer of the official GRWCrossEntropyLoss
    path = saved(tmp_path, {"model": state, "optimizer": {"state": {}}, "iteration": 7})
    assert run(path, tmp_path / "out.pth", "--to", "cls", "--config", config(tmp_path)) == 0
    model = stage_two()
    model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"])
    x = features()
    assert re.search("dropped +1 +loss_evaluator.weight", capsys.readouterr().out)
    linear = {name.removeprefix("network.linear."): tensor for name, tensor in state.items() if "linear" in name}
    z = linear_by_hand(x, linear["weight"], linear["bias"])
    confidence = confidence_by_hand(x, linear["confidence_layer.weight"], linear["confidence_layer.bias"])
    expected = classification_by_hand(z, confidence, linear["logit_scale"], linear["logit_bias"])
    assert_same_trunk(model, source)
    assert_scores(model.classifier, x, expected)


def test_half_precision_keeps_the_digits_of_the_magnitude(tmp_path):
    state = cvpods_names(small_resnet().state_dict()) | below("network.linear", calibration(CLASSES, WIDTH))
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = saved(tmp_path, {"model": state})
    assert run(path, tmp_path / "out.pth", "--to", "cls") == 0
    result = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    scale = state["network.linear.logit_scale"].float()[0]
    torch.testing.assert_close(result["classifier.calibration.magnitude"], scale + 1, rtol=1e-7, atol=0)


def test_a_cvpods_stage_one_and_its_cosine_form_start_stage_two(tmp_path, capsys):
    state = cvpods_names(small_resnet().state_dict())
    assert run(saved(tmp_path, {"model": state}), tmp_path / "linear.pth", "--to", "cls") == 0
    model = stage_two()
    load_stage_one(model, tmp_path / "linear.pth", model.freeze_report.trainable)

    del state["network.linear.bias"]
    constant = saved(tmp_path, {"model": state}, "constant.pth")
    assert "--scale 20" in refused(capsys, tmp_path, constant, tmp_path / "out.pth", "--to", "cls")
    assert run(constant, tmp_path / "constant_out.pth", "--to", "cls", "--scale", "20") == 0
    learnt = saved(tmp_path, {"model": state | {"network.linear.scale": torch.tensor([11.0])}}, "learnt.pth")
    assert "no --scale" in refused(capsys, tmp_path, learnt, tmp_path / "out.pth", "--to", "cls", "--scale", "20")
    assert run(learnt, tmp_path / "learnt_out.pth", "--to", "cls") == 0
    x = features()
    for name, scale in (("constant_out", 20.0), ("learnt_out", 11.0)):
        model = stage_two("cosine")
        load_stage_one(model, tmp_path / f"{name}.pth", model.freeze_report.trainable)
        assert_scores(model.classifier, x, cosine_by_hand(x, state["network.linear.weight"], scale))


def test_the_official_cosine_stage_two_is_refused_and_its_stage_one_can_be_had(tmp_path, capsys):
    state = cvpods_names(small_resnet().state_dict())
    del state["network.linear.bias"]
    linear = calibration(CLASSES, WIDTH) | {"scale": torch.tensor([20.0])}
    path = saved(tmp_path, {"model": state | below("network.linear", linear)})
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")
    assert "DisAlignNormalizedLinear gives it the feature divided by its norm" in sentence
    drops = [word.strip("',") for word in sentence.split() if word.startswith("'network.linear.") and "*" in word]
    assert len(drops) == 2
    assert run(path, tmp_path / "out.pth", "--to", "cls", "--drop", drops[0], "--drop", drops[1]) == 0
    model = stage_two("cosine")
    load_stage_one(model, tmp_path / "out.pth", model.freeze_report.trainable)


# ------------------------------------------------------------------------------------------ other classification code


def balancing(folder, classifier, **entries):
    """As classifier-balancing saves it: two parts, each with DataParallel's prefix."""
    trunk = {f"module.{name}": t for name, t in small_resnet().state_dict().items() if not name.startswith("fc.")}
    best = {"feat_model": trunk, "classifier": {f"module.{name}": tensor for name, tensor in classifier.items()}}
    return saved(folder, {"state_dict_best": best, "epoch": 90, "centroids": None, **entries})


def test_classifier_balancing_starts_stage_two(tmp_path):
    fc = {"fc.weight": torch.randn(CLASSES, WIDTH), "fc.bias": torch.randn(CLASSES)}
    path = balancing(tmp_path, fc, best_acc=np.float64(0.5))
    assert run(path, tmp_path / "out.pth", "--to", "cls", "--config", config(tmp_path)) == 0
    model, x = stage_two(), features()
    load_stage_one(model, tmp_path / "out.pth", model.freeze_report.trainable)
    assert_scores(model.classifier, x, linear_by_hand(x, fc["fc.weight"], fc["fc.bias"]))


def test_of_classifier_balancings_weights_the_best_are_taken(tmp_path):
    fc = {"fc.weight": torch.randn(CLASSES, WIDTH), "fc.bias": torch.randn(CLASSES)}
    path = balancing(tmp_path, fc, state_dict={"feat_model": {}, "classifier": {}})
    assert run(path, tmp_path / "out.pth", "--to", "cls") == 0
    result = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert torch.equal(result["classifier.weight"], fc["fc.weight"])


def test_learnable_weight_scaling_is_a_magnitude_with_confidence_one(tmp_path):
    fc = {"fc.weight": torch.randn(CLASSES, WIDTH), "fc.bias": torch.randn(CLASSES), "scales": torch.rand(CLASSES) + 1}
    path = balancing(tmp_path, fc)
    x = features()
    z = linear_by_hand(x, fc["fc.weight"], fc["fc.bias"])
    expected = [[s * one for s, one in zip(fc["scales"].tolist(), scores, strict=True)] for scores in z]

    assert run(path, tmp_path / "two.pth", "--to", "cls") == 0
    model = stage_two(calibration=dict(learn_margin=False, confidence="one"))
    model.load_state_dict(torch.load(tmp_path / "two.pth", weights_only=True)["state_dict"])
    assert_scores(model.classifier, x, expected)

    assert run(path, tmp_path / "folded.pth", "--to", "timm", "--fold") == 0
    stock = small_resnet()
    stock.load_state_dict(torch.load(tmp_path / "folded.pth", weights_only=True))
    assert_scores(stock.fc, x, expected)


@pytest.mark.parametrize(
    ("classifier", "said"),
    [
        ({"weight": torch.randn(CLASSES, WIDTH)}, "divides by 1 + norm of the feature"),
        ({"fc_hallucinator.weight": torch.randn(CLASSES, WIDTH)}, "meta-embedding"),
        ({}, "got no tensors"),
    ],
    ids=["cosine", "meta-embedding", "nearest mean"],
)
def test_classifiers_of_another_function_are_refused(classifier, said, tmp_path, capsys):
    path = balancing(tmp_path, classifier)
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")
    assert said in sentence


def test_a_layer_beside_classifier_balancings_resnet_is_refused(tmp_path, capsys):
    state = {"feat_model": {"fc_add.weight": torch.ones(4, 4)}, "classifier": {"fc.weight": torch.ones(2, 4)}}
    state["classifier"]["fc.bias"] = torch.ones(2)
    path = saved(tmp_path, {"state_dict": state})
    assert "feat_model" not in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")
    assert "fc_add.weight" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")


@pytest.mark.parametrize("version", ["mmpretrain", "mmcls 0.x"])
def test_mmpretrain_and_its_class_names(version, tmp_path):
    source = small_resnet()
    state = {
        (f"head.{name}" if name.startswith("fc.") else f"backbone.{name}"): t for name, t in source.state_dict().items()
    }
    names = list("abcde")
    meta = {"dataset_meta": {"classes": tuple(names)}} if version == "mmpretrain" else {"CLASSES": names}
    path = saved(tmp_path, {"state_dict": state, "meta": meta})
    assert run(path, tmp_path / "out.pth", "--to", "cls", "--config", config(tmp_path, "ImageClassifier")) == 0
    result = torch.load(tmp_path / "out.pth", weights_only=True)
    assert result["meta"]["dataset_meta"]["classes"] == names
    model, x = stage_two(), features()
    load_stage_one(model, tmp_path / "out.pth", model.freeze_report.trainable)
    assert_scores(model.classifier, x, linear_by_hand(x, source.fc.weight, source.fc.bias))
    assert_same_trunk(model, source)


def test_mmpretrains_other_architectures_are_refused(tmp_path, capsys):
    state = {"backbone.layers.0.ln1.weight": torch.ones(4), "head.fc.weight": torch.ones(5, 4)}
    path = saved(tmp_path, {"state_dict": state})
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")
    assert "layers.0.ln1.weight" in sentence


# ------------------------------------------------------------------------------------------------- timm, torchvision


@pytest.mark.parametrize(
    ("architecture", "options", "classifier"),
    [
        ("resnet18", {}, "fc"),
        ("mnasnet_small", {}, "classifier"),
        ("vit_tiny_patch16_224", dict(depth=1), "head"),
        ("convnext_atto", dict(depths=(1, 1, 1, 1)), "head.fc"),
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1)), "head.fc"),
        ("densenet121", dict(block_config=(1, 1, 1, 1)), "classifier"),
        ("regnetx_002", {}, "head.fc"),
    ],
)
def test_timm_and_back(architecture, options, classifier, tmp_path, capsys):
    state = timm.create_model(architecture, num_classes=CLASSES, **options).state_dict()
    there, back = tmp_path / "there.pth", tmp_path / "back.pth"
    backbone = dict(name=architecture, **options)
    path = saved(tmp_path, state | {"layers.0.attn_mask": torch.ones(2)})  # which timm now computes
    fit = config(tmp_path, "ImageClassifier", backbone=backbone)
    assert run(path, there, "--to", "cls", "--config", fit) == 0
    model = MODELS.build(dict(type="ImageClassifier", backbone=backbone, num_classes=CLASSES))
    model.load_state_dict(torch.load(there, weights_only=True)["state_dict"])
    assert torch.equal(model.classifier.weight, state[f"{classifier}.weight"])
    if architecture == "resnet18":
        assert run(there, back, "--to", "timm") == 0
    else:  # the config's model has the name, and must fit
        assert "--classifier" in refused(capsys, tmp_path, there, back, "--to", "timm")
        named = ["--classifier", classifier] if options else ["--config", architecture]
        assert run(there, back, "--to", "timm", *named) == 0
    again = torch.load(back, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_torchvisions_resnet_fits_timms(tmp_path):
    source = torchvision.models.resnet18(num_classes=CLASSES)
    path, out = saved(tmp_path, source.state_dict()), tmp_path / "out.pth"
    assert run(path, out, "--to", "timm", "--config", "resnet18") == 0
    model = timm.create_model("resnet18", num_classes=CLASSES).eval()
    model.load_state_dict(torch.load(out, weights_only=True))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), source.eval()(images))
    # Under another name, the model's own is taken.
    renamed = {name.replace("fc.", "top."): tensor for name, tensor in source.state_dict().items()}
    path, again = saved(tmp_path, renamed), tmp_path / "again.pth"
    assert run(path, again, "--to", "timm", "--config", "resnet18", "--classifier", "top") == 0
    assert torch.load(again, weights_only=True).keys() == model.state_dict().keys()


def test_a_trunk_from_before_batch_counters_gets_them(tmp_path, capsys):
    state = {name: t for name, t in small_resnet().state_dict().items() if "num_batches" not in name}
    out = tmp_path / "out.pth"
    assert run(saved(tmp_path, state), out, "--to", "cls", "--config", config(tmp_path)) == 0
    assert "new" in capsys.readouterr().out
    assert torch.load(out, weights_only=True)["state_dict"]["backbone.bn1.num_batches_tracked"] == 0


def test_a_classifier_named_by_hand(tmp_path, capsys):
    state = {name.replace("fc.", "top."): tensor for name, tensor in tiny().items()}
    path, out = saved(tmp_path, state), tmp_path / "out.pth"
    assert "--classifier" in refused(capsys, tmp_path, path, out, "--to", "cls")
    for name in ("bottom", "conv1"):
        sentence = refused(capsys, tmp_path, path, out, "--to", "cls", "--classifier", name)
        assert f"one linear layer named {name}, got none" in sentence
        assert "top.weight, top.bias" in sentence
    assert run(path, out, "--to", "cls", "--classifier", "top") == 0
    assert run(out, tmp_path / "back.pth", "--to", "timm", "--classifier", "top") == 0
    assert torch.load(tmp_path / "back.pth", weights_only=True).keys() == state.keys()


def test_torchvisions_own_names_are_refused(tmp_path, capsys):
    state = torchvision.models.mobilenet_v3_small(num_classes=CLASSES).state_dict()
    path = saved(tmp_path, state)
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")
    assert "torchvision's of an architecture that timm names otherwise" in sentence


# ---------------------------------------------------------------------------------------------------- ours, folded


def calibrated_state(classifier="linear", **options):
    model = stage_two(classifier, calibration=dict(confidence="one", **options))
    with torch.no_grad():
        for name, parameter in model.classifier.calibration.named_parameters():
            parameter.copy_(torch.rand(CLASSES) + (1 if name == "magnitude" else 0))
    return model


@pytest.mark.parametrize(
    "options", [{}, {"learn_margin": False}, {"learn_magnitude": False}], ids=["both", "magnitude", "margin"]
)
def test_a_linear_stage_two_folds_into_timms_own_model(options, tmp_path):
    model, x = calibrated_state(**options).eval(), torch.randn(2, 3, 64, 64)
    meta = {"disalign": {"class_counts": [9, 5, 3, 2, 1], "rho": 1.2}, "dataset_meta": {"classes": list("abcde")}}
    path = saved(tmp_path, {"state_dict": model.state_dict(), "meta": meta, "message_hub": {}})
    out = tmp_path / "out.pth"
    assert run(path, out, "--to", "timm", "--fold") == 0
    stock = small_resnet().eval()
    stock.load_state_dict(torch.load(out, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(stock.double()(x.double()), model.double()(x.double()), rtol=1e-6, atol=1e-6)
    assert (
        run(path, tmp_path / "one.pth", "--to", "cls", "--fold", "--config", config(tmp_path, "ImageClassifier")) == 0
    )
    assert torch.load(tmp_path / "one.pth", weights_only=True)["meta"] == meta


def test_a_cosine_stage_two_folds_into_a_norm_and_a_linear_layer(tmp_path, capsys):
    model = calibrated_state("cosine")
    path, out = saved(tmp_path, {"state_dict": model.state_dict()}), tmp_path / "out.pth"
    assert "--fold" in refused(capsys, tmp_path, path, out, "--to", "timm")
    assert "no --config" in refused(capsys, tmp_path, path, out, "--to", "timm", "--fold", "--config", "resnet18")
    capsys.readouterr()
    assert run(path, out, "--to", "timm", "--fold") == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("before loading it: ")
    stock = small_resnet()
    exec(line, {"model": stock, "nn": nn})
    stock.load_state_dict(torch.load(out, weights_only=True))
    x = features()
    calibration = model.classifier.calibration
    z = cosine_by_hand(x, model.classifier.weight, float(model.classifier.scale))
    expected = [
        [
            a * one + b
            for a, one, b in zip(calibration.magnitude.tolist(), row, calibration.margin.tolist(), strict=True)
        ]
        for row in z
    ]
    assert_scores(stock.fc, x, expected)


def test_a_learnt_confidence_is_not_folded(tmp_path, capsys):
    path = saved(tmp_path, {"state_dict": stage_two().state_dict()})
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm", "--fold")
    assert "blends by the input as no stock layer does; export the model" in sentence
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm")
    drops = sentence[sentence.index("--drop") :].split()
    assert len(drops) == 8
    assert run(path, tmp_path / "out.pth", "--to", "timm", *drops) == 0


def test_a_stock_classifier_has_nothing_to_fold(tmp_path, capsys):
    path = saved(tmp_path, small_resnet().state_dict())
    assert "no --fold, since its classifier is a stock one" in refused(
        capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls", "--fold"
    )


# ------------------------------------------------------------------------------------------------------ fit check


def test_what_does_not_fit_is_said_and_nothing_is_written(tmp_path, capsys):
    path, out = saved(tmp_path, small_resnet().state_dict()), tmp_path / "out.pth"
    cosine = config(tmp_path, classifier="cosine")
    assert "lacks 1: classifier.scale" in refused(capsys, tmp_path, path, out, "--to", "cls", "--config", cosine)
    other = config(tmp_path, num_classes=6)
    assert "shapes" in refused(capsys, tmp_path, path, out, "--to", "cls", "--config", other)
    assert "lacks" in refused(capsys, tmp_path, path, out, "--to", "timm", "--config", "resnet18")
    assert "timm model" in refused(capsys, tmp_path, path, out, "--to", "timm", "--config", "nothing")
    assert "pretrained tag" in refused(capsys, tmp_path, path, out, "--to", "timm", "--config", "resnet18.nothing")
    distilled = "deit_tiny_distilled_patch16_224"
    assert "('head', 'head_dist')" in refused(capsys, tmp_path, path, out, "--to", "timm", "--config", distilled)
    assert "config" in refused(capsys, tmp_path, path, out, "--to", "cls", "--config", "nothing.py")
