"""The command itself: wrappings, averaged weights, what is left out, the table, every refusal with its sentence."""

import argparse
import collections
import errno
import os
import pickle
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from core.malicious import Malicious

from disalign import CosineClassifier, calibrate_classifier, folding
from disalign.cli import find_config
from disalign_tools.convert import command, formulas, main, resnet, targets
from disalign_tools.convert.sources import SOURCES
from disalign_tools.convert.sources.frame import linear

from .convert_sources import (
    assert_scores,
    below,
    calibration,
    cosine_by_hand,
    cvpods_names,
    refused,
    run,
    saved,
    small_resnet,
    tiny,
)

ROOT = Path(__file__).parents[2]


def converted(path, folder, *options, to="timm"):
    out = folder / "out.pth"
    assert run(path, out, "--to", to, "--force", *options) == 0
    return torch.load(out, weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": {"model": state}},
        lambda state: collections.OrderedDict((f"module.{name}", tensor) for name, tensor in state.items()),
        lambda state: {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "callbacks": {}},
        lambda state: {"state_dict": state, "best_acc": np.float64(0.7)},
        lambda state: {"net": state, "acc": 3, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state},
        lambda state: {**state, "version": 3},
        lambda state: {"state_dict": tiny(), "state_dict_best": state},
    ],
    ids=[
        *("flat", "state_dict", "model", "both", "DDP", "compiled in DDP", "compiled DDP", "Lightning", "numpy scalar"),
        *("net", "model_state_dict", "a number", "best"),
    ],
)
def test_wrappings_are_opened(wrap, tmp_path):
    state = tiny()
    path = saved(tmp_path, wrap(state))
    before = path.read_bytes()
    assert same(converted(path, tmp_path), state)
    assert path.read_bytes() == before


def averaged(kind, plain, mean):
    """As each loop saves them."""
    module = {f"module.{name}": tensor for name, tensor in mean.items()}
    if kind == "torchvision":
        return {"model": plain, "model_ema": {"n_averaged": torch.tensor(9), **module}}
    if kind == "timm":
        return {"state_dict": plain, "state_dict_ema": mean}
    if kind == "mixed":
        return {"state_dict": plain, "model_ema": mean}
    if kind == "net":
        return {"net": plain, "ema": mean}
    if kind == "BasicSR":
        return {"params": plain, "params_ema": mean}
    # mmengine's EMAHook swaps them on saving.
    raw = {f"module.{name}": tensor for name, tensor in plain.items()}
    return {"state_dict": mean, "ema_state_dict": {"steps": torch.tensor(9), **raw}, "message_hub": {}}


@pytest.mark.parametrize("kind", ["torchvision", "timm", "mmengine", "mixed", "net", "BasicSR"])
def test_trained_and_averaged_weights_need_a_choice(kind, tmp_path, capsys):
    plain, mean = tiny(), tiny()
    path = saved(tmp_path, averaged(kind, plain, mean))
    sentence = refused(capsys, tmp_path, path, tmp_path / "new.pth", "--to", "timm")
    names = {
        "torchvision": ("model_ema", "model"),
        "timm": ("state_dict_ema", "state_dict"),
        "mmengine": ("state_dict", "ema_state_dict"),
        "mixed": ("model_ema", "state_dict"),
        "net": ("ema", "net"),
        "BasicSR": ("params_ema", "params"),
    }[kind]
    assert f"--ema for the averaged ones ({names[0]}) or --no-ema for the trained ones ({names[1]})" in sentence
    assert same(converted(path, tmp_path, "--no-ema"), plain)
    assert same(converted(path, tmp_path, "--ema"), mean)


def test_mmengines_hook_saves_the_two_as_this_reads_them(tmp_path):
    hooks = pytest.importorskip("mmengine.hooks")
    checkpoint = {"state_dict": {"fc.weight": torch.tensor(1.0)}}  # what trains
    hook = hooks.EMAHook()
    hook.ema_model = torch.nn.Module()
    hook.ema_model.register_buffer("steps", torch.tensor(3))
    hook.ema_model.module = torch.nn.ParameterDict({"fc_weight": torch.tensor(2.0)})  # its average
    hook.ema_model.state_dict = lambda: {"steps": torch.tensor(3), "module.fc.weight": torch.tensor(2.0)}
    hook.before_save_checkpoint(None, checkpoint)
    assert checkpoint["state_dict"]["fc.weight"] == 2
    assert checkpoint["ema_state_dict"]["module.fc.weight"] == 1


def test_the_buffers_of_mmcvs_hook_are_dropped_by_name(tmp_path, capsys):
    state = {f"backbone.{name}": tensor for name, tensor in tiny().items()}
    state = {name.replace("backbone.fc", "head.fc"): tensor for name, tensor in state.items()}
    second = {f"ema_{name.replace('.', '_')}": tensor + 1 for name, tensor in state.items()}
    converted(saved(tmp_path, {"state_dict": state | second}), tmp_path, "--verbose", to="cls")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[2] for line in lines if line[0] == "dropped"} == set(second)
    path = saved(tmp_path, {"state_dict": state | {"ema_other_weight": torch.ones(2)}})
    assert "1 have none: ema_other_weight" in refused(capsys, tmp_path, path, tmp_path / "o.pth", "--to", "cls")


def test_ema_where_there_is_none(tmp_path, capsys):
    path = saved(tmp_path, tiny())
    assert "leave out --ema" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm", "--ema")


def test_safetensors(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    path, state = tmp_path / "model.safetensors", tiny()
    safetensors.save_file(state, path)
    assert same(converted(path, tmp_path), state)
    path.write_bytes(b"nothing")
    out = tmp_path / "new.pth"
    assert "whole .safetensors" in refused(capsys, tmp_path, path, out, "--to", "timm")
    assert "No such file" in refused(capsys, tmp_path, tmp_path / "none.safetensors", out, "--to", "timm")


class Unknown:
    """Neither tensors nor plain values, and nothing bad either."""


def test_more_than_tensors_needs_trust(tmp_path, capsys):
    state = tiny()
    path, out = saved(tmp_path, {"state_dict": state, "hook": Unknown()}), tmp_path / "new.pth"
    sentence = refused(capsys, tmp_path, path, out, "--to", "timm")
    assert "Unknown" in sentence
    assert "--trust-checkpoint" in sentence
    assert same(converted(path, tmp_path, "--trust-checkpoint"), state)
    assert "is unpickled in full" in capsys.readouterr().out
    pickled = tmp_path / "source.pkl"
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    pickled.write_bytes(pickle.dumps({"model": arrays, "hook": Unknown()}))
    assert "--trust-checkpoint" in refused(capsys, tmp_path, pickled, out, "--to", "timm")
    assert same(converted(pickled, tmp_path, "--trust-checkpoint"), state)


@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_a_model_saved_whole_needs_trust(entry, tmp_path, capsys):
    model = small_resnet()
    path = saved(tmp_path, {entry: model} if entry else model)
    assert "--trust-checkpoint" in refused(capsys, tmp_path, path, tmp_path / "new.pth", "--to", "timm")
    assert same(converted(path, tmp_path, "--trust-checkpoint"), model.state_dict())


def test_other_containers_are_read_with_trust(tmp_path, capsys):
    state, out = tiny(), tmp_path / "new.pth"
    path = tmp_path / "pickled.pth"
    path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    assert "--trust-checkpoint" in refused(capsys, tmp_path, path, out, "--to", "timm")
    assert same(converted(path, tmp_path, "--trust-checkpoint"), state)
    script, model = tmp_path / "script.pth", small_resnet().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, and still found
        torch.jit.trace(model, torch.ones(1, 3, 32, 32)).save(script)
        assert "--trust-checkpoint" in refused(capsys, tmp_path, script, out, "--to", "timm")
        result = converted(script, tmp_path, "--trust-checkpoint")
    assert all(torch.equal(result[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}, lambda state: {"net": state}])
@pytest.mark.parametrize("which", [["conv1.weight"], None], ids=["one", "all"])
def test_numpy_arrays_among_the_weights_are_never_left_out(which, wrap, tmp_path, capsys):
    state = tiny()
    arrays = {name: state[name].numpy().astype(">f4") for name in which or state}
    path = saved(tmp_path, wrap(state | arrays))
    sentence = refused(capsys, tmp_path, path, tmp_path / "new.pth", "--to", "timm")
    assert "--trust-checkpoint" in sentence
    assert same(converted(path, tmp_path, "--trust-checkpoint"), state)


@pytest.mark.parametrize("other", [{"a": torch.ones(2)}, [torch.ones(2)], argparse.Namespace(a=1)])
def test_other_things_among_the_weights_are_refused_trusted_or_not(other, tmp_path, capsys):
    path = saved(tmp_path, {"state_dict": tiny(more=other)})
    for trust in ([], ["--trust-checkpoint"]):
        sentence = refused(capsys, tmp_path, path, tmp_path / "new.pth", "--to", "timm", *trust)
        assert "1 are not: more" in sentence
    path = saved(tmp_path, {"state_dict": tiny(model=tiny())})
    assert "1 are not: model" in refused(capsys, tmp_path, path, tmp_path / "new.pth", "--to", "timm")


def test_what_can_not_be_kept_of_the_classes_is_said(tmp_path, capsys):
    meta = {"dataset_meta": {"classes": list("abcde"), "palette": np.ones((5, 3)), "tree": {1: 2}}}
    path = saved(tmp_path, {"state_dict": tiny(), "meta": meta})
    assert converted(path, tmp_path, to="cls")["meta"] == {"dataset_meta": {"classes": list("abcde")}}
    assert "left out: dataset_meta.palette, dataset_meta.tree\n" in capsys.readouterr().out
    meta = {"disalign": {"class_counts": np.ones(5)}, "dataset_meta": {"classes": ("a", "b")}}
    path = saved(tmp_path, {"state_dict": tiny(), "meta": meta})
    assert converted(path, tmp_path, to="cls")["meta"] == {"dataset_meta": {"classes": ["a", "b"]}}
    assert "left out: disalign\n" in capsys.readouterr().out
    counts = {"class_counts": [9, 5, 3, 2, 1], "rho": 1.5}
    meta["disalign"] = counts | {"class_counts": torch.tensor(counts["class_counts"])}
    path = saved(tmp_path, {"state_dict": tiny(), "meta": meta})
    assert converted(path, tmp_path, to="cls")["meta"]["disalign"] == counts
    assert "kept beside the weights: dataset_meta, disalign\n" in capsys.readouterr().out
    converted(path, tmp_path, to="timm")
    said = capsys.readouterr().out
    assert "left out: dataset_meta, disalign\n" in said
    assert "kept beside" not in said


@pytest.mark.parametrize("name", ["source.pth", "source.pkl"])
def test_a_malicious_pickle_executes_nothing(name, tmp_path, capsys):
    path, folder = tmp_path / name, tmp_path / "made"
    content = {"model": tiny(), "payload": Malicious(str(folder))}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps({"payload": content["payload"]}))
    else:
        torch.save(content, path)
    refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm")
    assert not folder.exists()


class Getattr:
    """Pickled as a call of ``getattr``, which the stand-ins take the place of."""

    def __reduce__(self):
        return getattr, ("abc", "upper")


def test_the_stand_ins_keep_nothing_and_call_nothing(tmp_path):
    path = saved(tmp_path, {"state_dict": tiny(), "records": [argparse.Namespace(a=1), Getattr(), np.float64(3)]})
    assert same(converted(path, tmp_path), torch.load(path, weights_only=False)["state_dict"])
    with pytest.raises(pickle.UnpicklingError):  # what made it readable is gone again
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "truncated or of another format"),
        (b"PK\x03\x04 not a zip", "truncated or of another format"),
        ([1, 2], "got a list"),
        ({}, "expected tensors"),
        ({"state_dict": {}}, "expected tensors"),
        ({"epoch": 3}, "expected tensors in '{path}', got epoch;"),
        ({"something.weight": torch.ones(2)}, "are of none"),
        ({"a": tiny(), "b": tiny()}, "got several: a, b"),
        (
            {"state_dict": 3, "state_dict_ema": tiny()},
            "got averaged ones; add --ema for the averaged ones (state_dict_ema)",
        ),
        ({"ema_state_dict": tiny()}, "got averaged ones; add --ema for the averaged ones (ema_state_dict)"),
        ({"fc.weight": torch.ones(5, 4), "fc.bias": torch.ones(5)}, "expected a trunk beside the classifier"),
    ],
    ids=[
        "missing",
        "empty",
        "truncated",
        "a list",
        "nothing",
        "no weights",
        "an epoch",
        "another model",
        "two",
        "half",
        "the other half",
        "no trunk",
    ],
)
def test_what_can_not_be_read(content, said, tmp_path, capsys):
    path = tmp_path / "source.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    said = said.format(path=path) if "{path}" in said else said
    assert said in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm")


# ------------------------------------------------------------------------------------------------- formats, targets


def test_from_overrides_and_a_wrong_one_is_refused(tmp_path, capsys):
    path, out = saved(tmp_path, tiny()), tmp_path / "new.pth"
    assert same(converted(path, tmp_path, "--from", "timm"), tiny_of(path))
    sentence = refused(capsys, tmp_path, path, out, "--to", "cls", "--from", "cvpods")
    assert "a checkpoint of cvpods" in sentence
    assert "are of timm; correct --from" in sentence


def tiny_of(path):
    return torch.load(path, weights_only=True)


def test_a_target_that_does_not_fit_names_the_one_that_does(tmp_path, capsys):
    path, out = saved(tmp_path, tiny()), tmp_path / "out.pth"
    sentence = refused(capsys, tmp_path, path, out, "--to", "mmseg")
    assert "--to cls or timm or d2" in sentence


def test_the_documented_table_is_the_codes():
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    header = next(row for row in rows if "`--from`" in row)
    columns = {name.strip("`"): index for index, name in enumerate(header)}
    documented = {}
    for row in rows:
        names = row[columns["--from"]].strip("`") if len(row) == len(header) else ""
        if names in SOURCES:
            documented[names] = {name for name in targets.TARGETS if row[columns[f"--to {name}"]] != "-"}
    assert documented == {name: set(source.targets) for name, source in SOURCES.items()}


def test_the_two_names_of_a_resnet():
    state = small_resnet(name="resnet26", layers=(1, 1, 1, 1)).state_dict()
    by_hand = cvpods_names(state)
    for (name, tensor), theirs in zip(state.items(), by_hand, strict=True):
        if name.startswith("fc."):
            assert resnet.to_detectron2(name) is None
            continue
        assert resnet.to_detectron2(name) == theirs.removeprefix("network.")
        assert resnet.to_torchvision(theirs.removeprefix("network.")) == name
        assert by_hand[theirs] is tensor
    assert resnet.to_torchvision("res2.x.conv1.weight") is None
    assert resnet.to_torchvision("res6.0.conv1.weight") is None


def test_every_documented_command_can_be_given():
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith("python scripts/convert_checkpoint.py ")]
    assert len(lines) > 10
    for line in lines[1:]:  # the first one is the pattern
        args = command.arguments(shlex.split(line)[2:])
        if args.config and args.to != "timm":
            find_config(args.config)


# -------------------------------------------------------------------------------------------- mapped, new and dropped


def test_a_tensor_without_a_place_is_an_error_until_it_is_dropped(tmp_path, capsys):
    state = tiny()
    names = {f"backbone.{name}" for name in state if not name.startswith("fc.")}
    state = cvpods_names(state) | {"network.se.weight": torch.ones(4)}
    path = saved(tmp_path, {"model": state})
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")
    assert "1 have none: network.se.weight" in sentence
    assert "--drop PATTERN" in sentence
    result = converted(path, tmp_path, "--drop", "*.se.*", to="cls")["state_dict"]
    assert result.keys() == names | {"classifier.weight", "classifier.bias"}
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines() if line.split()[0] == "dropped"] == ["network.se.weight"]


def test_a_drop_that_drops_nothing_is_refused(tmp_path, capsys):
    path = saved(tmp_path, tiny())
    assert "'nothing*'" in refused(capsys, tmp_path, path, tmp_path / "o.pth", "--to", "timm", "--drop", "nothing*")


def test_what_no_model_needs_is_dropped_by_name(tmp_path, capsys):
    state = tiny()
    path = saved(tmp_path, state | {"pixel_mean": torch.ones(3), "anchor_generator.cell_anchors.0": torch.ones(2, 2)})
    assert same(converted(path, tmp_path), state)
    dropped = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "dropped"]
    assert len(dropped) == 2


@pytest.mark.parametrize("name", ["head_dist.weight", "AuxLogits.fc.weight", "aux1.fc2.weight", "aux_head.weight"])
def test_a_second_classifier_is_refused(name, tmp_path, capsys):
    path = saved(tmp_path, tiny(**{name: torch.ones(5, 4)}))
    sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm", "--config", "resnet18")
    assert f"a second beside 'fc': {name}" in sentence
    converted(path, tmp_path, "--drop", name)


@pytest.mark.parametrize(
    "state",
    [
        {name: tensor for name, tensor in tiny().items() if "layer4" not in name},
        tiny(**{"stage5.weight": torch.ones(2)}),
        tiny(**{"layer1.0.se.weight": torch.ones(2)}),
        {"vit.layer.0.weight": torch.ones(4, 4), "classifier.weight": torch.ones(5, 4)},
        {f"module.{name}": tensor for name, tensor in cvpods_names(tiny()).items() if "res2" not in name},
    ],
    ids=["without layer4", "more", "more in a block", "Hugging Face", "cvpods"],
)
def test_a_trunk_that_may_be_another_needs_the_check(state, tmp_path, capsys):
    path = saved(tmp_path, state)
    assert "expected --config for " in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        (tiny(), ["--to", "d2", "--fold"], "no --fold for a backbone"),
        (cvpods_names(tiny()), ["--to", "cls", "--classifier", "fc"], "no --classifier, since it is known (cvpods"),
        ({"decode_head.conv_seg.weight": torch.ones(5, 4)}, ["--to", "mmseg", "--classifier", "fc"], "trunk"),
        (
            below("backbone", tiny()) | below("classifier", {"weight": torch.ones(5, 4), "bias": torch.ones(5)}),
            ["--to", "cls", "--classifier", "fc"],
            "no --classifier, since it is known (disalign_cls",
        ),
    ],
)
def test_options_in_vain_are_refused(state, options, said, tmp_path, capsys):
    assert said in refused(capsys, tmp_path, saved(tmp_path, state), tmp_path / "out.pth", *options)


def test_a_detector_of_torchvisions_is_of_no_known_format(tmp_path, capsys):
    layer = {"roi_heads.box_predictor.cls_score.weight": torch.ones(5, 4)}
    for name in ("rpn.head.conv.weight", "backbone.body.conv1.weight"):
        path = saved(tmp_path, layer | {name: torch.ones(4)})
        assert "are of none" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "d2")


@pytest.mark.parametrize(
    ("to", "layer", "name"),
    [
        ("d2", "roi_heads.box_predictor.cls_score", "foo.bar"),
        ("d2", "roi_heads.box_predictor.cls_score", "ema_backbone_y"),
        ("mmseg", "decode_head.conv_seg", "discriminator.weight"),
        ("mmseg", "decode_head.conv_seg", "ema_backbone_y"),
    ],
)
def test_a_module_that_detectors_and_segmentors_lack_has_no_place(to, layer, name, tmp_path, capsys):
    state = {"backbone.x": torch.ones(2), f"{layer}.weight": torch.ones(5, 4), f"{layer}.bias": torch.ones(5)}
    path = saved(tmp_path, state | {name: torch.ones(2)})
    assert f"1 have none: {name}" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", to)
    result = converted(path, tmp_path, "--drop", name, to=to)
    assert state.keys() == result["model" if to == "d2" else "state_dict"].keys()


def test_batch_counters_stay_whatever_their_place(tmp_path):
    state = tiny(**{"bn1.num_batches_tracked": torch.tensor(7), "bn1.running_var": torch.ones(4)})
    assert converted(saved(tmp_path, state), tmp_path)["bn1.num_batches_tracked"] == 7


def test_of_several_heads_in_a_row_the_last_is_calibrated(tmp_path):
    heads = ("decode_head.2", "decode_head.10")
    state = {f"{head}.conv_seg.weight": torch.randn(5, 4, 1, 1) for head in heads} | {"backbone.x": torch.ones(2)}
    state |= {f"{head}.conv_seg.bias": torch.randn(5) for head in heads}
    state |= {"decode_head.10.calibration.magnitude": torch.full((5,), 3.0)}
    result = converted(saved(tmp_path, {"state_dict": state}), tmp_path, "--fold", to="mmseg")["state_dict"]
    weights = {head: f"{head}.conv_seg.weight" for head in heads}
    torch.testing.assert_close(result[weights["decode_head.10"]], 3 * state[weights["decode_head.10"]])
    assert torch.equal(result[weights["decode_head.2"]], state[weights["decode_head.2"]])


def test_folding_half_precision_keeps_its_digits(tmp_path):
    state = below("backbone", {name: t for name, t in tiny().items() if not name.startswith("fc.")})
    state |= {"classifier.weight": torch.randn(5, 4).half(), "classifier.bias": torch.randn(5).half()}
    state |= {"classifier.calibration.magnitude": torch.rand(5).half() + 1}
    result = converted(saved(tmp_path, {"state_dict": state}), tmp_path, "--fold")
    expected = state["classifier.weight"].float() * state["classifier.calibration.magnitude"].float()[:, None]
    torch.testing.assert_close(result["fc.weight"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("shape", "status"), [((), 0), ((1,), 2)], ids=["ours", "cvpods"])
def test_a_tiny_norm_counts_as_its_sources_smallest(shape, status, tmp_path):
    layer = "roi_heads.box_predictor.cls_score"
    state = {"backbone.x": torch.ones(2), f"{layer}.weight": torch.randn(5, 4), f"{layer}.scale": torch.ones(shape)}
    state[f"{layer}.weight"][2] *= 1e-5
    assert run(saved(tmp_path, state), tmp_path / "out.pth", "--to", "d2") == status


def test_the_line_for_a_folded_cosine_classifier_is_valid_anywhere(tmp_path, capsys):
    base = "roi_heads.box_predictor"
    state = {"backbone.x": torch.ones(2)}
    for stage in range(2):
        state |= {f"{base}.{stage}.cls_score.weight": torch.randn(5, 4)}
        state |= {f"{base}.{stage}.cls_score.scale": torch.tensor(7.0)}
    converted(saved(tmp_path, state), tmp_path, "--fold", to="d2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("before loading it: ")]
    nn = torch.nn
    model = nn.Module()
    model.roi_heads = nn.Module()
    model.roi_heads.box_predictor = nn.ModuleList([nn.Module(), nn.Module()])
    for stage in range(2):
        model.roi_heads.box_predictor[stage].cls_score = nn.Linear(4, 5)
        exec(lines[stage].removeprefix("before loading it: "), {"model": model, "nn": nn})
    tensors = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert model.state_dict().keys() == tensors.keys() - {"backbone.x"}


def test_many_tensors_of_a_module_are_one_line_unless_verbose(tmp_path, capsys):
    state = small_resnet(layers=(3, 3, 3, 3)).state_dict()
    path = saved(tmp_path, state)
    converted(path, tmp_path, to="cls")
    short = capsys.readouterr().out.splitlines()
    assert len(short) < 13
    assert any(line.split() == ["mapped", "1", "fc.bias", "->", "classifier.bias"] for line in short)
    assert any(line.split() == ["mapped", "42", "layer2.*", "->", "backbone.layer2.*"] for line in short)
    converted(path, tmp_path, "--verbose", to="cls")
    long = capsys.readouterr().out
    assert all(f"backbone.{name}\n" in long for name in state if not name.startswith("fc."))


# ------------------------------------------------------------------------------------------- the file that is written


def test_an_existing_file_stays_without_force(tmp_path, capsys):
    path, out = saved(tmp_path, tiny()), tmp_path / "out.pth"
    out.write_bytes(b"mine")
    assert "--force" in refused(capsys, tmp_path, path, out, "--to", "timm")
    assert run(path, out, "--to", "timm", "--force") == 0


def test_the_source_is_never_the_destination(tmp_path, capsys):
    path = saved(tmp_path, tiny())
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    for dest in (path, link, tmp_path / "." / "source.pth"):
        sentence = refused(capsys, tmp_path, path, dest, "--to", "timm", "--force")
        assert "which is read" in sentence


def test_a_destination_that_is_none(tmp_path, capsys):
    path = saved(tmp_path, tiny())
    assert "folder" in refused(capsys, tmp_path, path, tmp_path, "--to", "timm")
    assert "place to write" in refused(capsys, tmp_path, path, path / "below.pth", "--to", "timm")
    assert ".pkl" in refused(capsys, tmp_path, path, tmp_path / "out.pkl", "--to", "timm")


@pytest.mark.parametrize("name", ["fc.bias", "conv1.weight"])
def test_nan_is_refused(name, tmp_path, capsys):
    state = tiny()
    state[name].view(-1)[2] = float("nan")
    path = saved(tmp_path, state)
    assert f"NaN or infinity in {name}" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm")


def test_of_two_last_layers_one_is_to_be_named(tmp_path, capsys):
    path = saved(tmp_path, tiny(**{"head.weight": torch.ones(5, 4)}))
    assert "got fc, head; name the last" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm")


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path, tiny())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "timm")


@pytest.mark.parametrize("fault", ["crash", "changed tensor", "another type", "lost tensor", "one more"])
def test_a_fault_of_ours_leaves_nothing(fault, tmp_path, monkeypatch):
    path, before = saved(tmp_path, tiny()), os.listdir(tmp_path)
    stock = targets.load

    def faulty(file, arrays):
        tensors = stock(file, arrays)
        if fault == "crash":
            raise MemoryError
        if fault == "changed tensor":
            tensors["conv1.weight"][0, 0, 0, 0] += 1e-3
        elif fault == "another type":
            tensors["conv1.weight"] = tensors["conv1.weight"].double()
        elif fault == "one more":
            tensors["conv1.bias"] = torch.zeros(4)
        else:
            del tensors["conv1.weight"]
        return tensors

    monkeypatch.setattr(targets, "load", faulty)
    with pytest.raises(MemoryError if fault == "crash" else RuntimeError):
        run(path, tmp_path / "out.pth", "--to", "timm")
    assert sorted([*before]) == sorted(os.listdir(tmp_path))


def test_scores_that_differ_are_refused(tmp_path, capsys, monkeypatch):
    state = cvpods_names(small_resnet().state_dict()) | {
        "network.linear.logit_scale": torch.ones(1, 5),
        "network.linear.logit_bias": torch.ones(1, 5),
        "network.linear.confidence_layer.weight": torch.ones(1, 32) / 32,
        "network.linear.confidence_layer.bias": torch.zeros(1),
    }
    path = saved(tmp_path, {"model": state})
    stock = formulas.cvpods_classification
    # As if the official formula were another one: s instead of 1 + s.
    other = lambda z, x, own: stock(z, x, own | {"logit_scale": own["logit_scale"] - 1})  # noqa: E731
    monkeypatch.setattr(formulas, "cvpods_classification", other)
    assert "they differ by" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "cls")


FAULTS = {
    "one class": [0.0, 0.0, 4e-6, 0.0, 0.0],  # a mean over the classes would be below the 1e-6 that are allowed
    "the background": [0.0, 0.0, 0.0, 0.0, 4e-6],
    "cancelling": [0.0, 1e-3, 0.0, 0.0, -1e-3],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("wrong", [{0}, {1}, {2}, {0, 1, 2}], ids=str)
def test_one_class_wrong_and_errors_that_cancel_are_refused(wrong, fault, tmp_path, capsys, monkeypatch):
    """In any of a cascade's classifiers."""
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # as the command's own
    state = {"backbone.x": torch.ones(2)}
    for stage in range(3):
        base, weight = f"roi_heads.box_predictor.{stage}.cls_score", torch.randn(5, 4)
        weight /= (x @ weight.double().T).abs().max().float()  # the largest score is 1
        state |= {f"{base}.weight": weight, f"{base}.bias": torch.zeros(5)}
        state |= {f"{base}.calibration.magnitude": torch.ones(4), f"{base}.calibration.margin": torch.zeros(4)}
    path, out = saved(tmp_path, {"model": state}), tmp_path / "out.pth"
    stages, stock = iter(range(3)), folding.fold_tensors

    def faulty(*arguments, **options):
        weight, bias = stock(*arguments, **options)
        return weight, bias + torch.tensor(FAULTS[fault]) * (next(stages) in wrong)

    monkeypatch.setattr(folding, "fold_tensors", faulty)
    assert "they differ by" in refused(capsys, tmp_path, path, out, "--to", "d2", "--fold")
    monkeypatch.undo()
    assert run(path, out, "--to", "d2", "--fold") == 0


def test_two_classes_in_each_others_place_are_refused(tmp_path, capsys, monkeypatch):
    state = cvpods_names(small_resnet().state_dict()) | below("network.linear", calibration(5, 32))
    path, out = saved(tmp_path, {"model": state}), tmp_path / "out.pth"
    stock = targets.load

    def permuted(file, arrays):
        tensors = stock(file, arrays)
        name = "classifier.calibration.magnitude"
        return tensors | {name: tensors[name][[0, 3, 2, 1, 4]]}

    monkeypatch.setattr(targets, "load", permuted)
    assert "they differ by" in refused(capsys, tmp_path, path, out, "--to", "cls")


@pytest.mark.parametrize("largest", [0, 1e-6, 1e6])
def test_scores_of_any_size_compare(largest, tmp_path):
    layer = {"classifier.weight": torch.randn(5, 4) * largest, "classifier.bias": torch.zeros(5)}
    layer |= {"classifier.calibration.magnitude": torch.rand(5) + 1}
    path = saved(tmp_path, {"state_dict": below("backbone", tiny()) | layer})
    converted(path, tmp_path, "--fold", "--drop", "backbone.fc.*")


def test_the_difference_of_scores_is_printed(tmp_path, capsys):
    converted(saved(tmp_path, tiny()), tmp_path)
    assert "largest difference of scores from the source's own formula 0.0e+00" in capsys.readouterr().out


def test_a_linear_classifier_without_a_bias_gets_zeros(tmp_path, capsys):
    state = tiny()
    del state["fc.bias"]
    result = converted(saved(tmp_path, state), tmp_path)
    assert torch.equal(result["fc.bias"], torch.zeros(5))
    assert ["new", "1", "->", "fc.bias", "zeros"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_segmentors_convolution_stays_without_a_bias(tmp_path):
    state = {"backbone.x": torch.ones(2), "decode_head.conv_seg.weight": torch.randn(5, 4, 1, 1)}
    assert same(converted(saved(tmp_path, state), tmp_path, to="mmseg")["state_dict"], state)


def test_a_bias_of_a_cosine_classifier_has_no_place(tmp_path, capsys):
    layer = "roi_heads.box_predictor.cls_score"
    state = {"backbone.x": torch.ones(2), f"{layer}.weight": torch.randn(5, 4), f"{layer}.scale": torch.tensor(7.0)}
    path = saved(tmp_path, state | {f"{layer}.bias": torch.ones(5)})
    assert f"1 have none: {layer}.bias" in refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", "d2")


def test_a_scale_that_the_file_has_is_not_given(tmp_path, capsys):
    state = {f"classifier.{name}": tensor for name, tensor in CosineClassifier(4, 5).state_dict().items()}
    path = saved(tmp_path, state | {"backbone.conv1.weight": torch.ones(4, 3, 1, 1)})
    assert "no --scale" in refused(capsys, tmp_path, path, tmp_path / "o.pth", "--to", "cls", "--scale", "20")


def test_a_scale_for_a_linear_classifier_is_refused(tmp_path, capsys):
    path = saved(tmp_path, tiny())
    assert "no --scale, since its classifier is linear" in refused(
        capsys, tmp_path, path, tmp_path / "o.pth", "--to", "cls", "--scale", "20"
    )


# --------------------------------------------------------------------------------------------------------- fit, fold


def test_a_missing_framework_is_one_sentence(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path, tiny())
    for module in ("timm", "disalign_cls"):
        monkeypatch.setitem(sys.modules, module, None)
    for to, config in (("timm", "resnet18"), ("cls", "x.py")):
        sentence = refused(capsys, tmp_path, path, tmp_path / "out.pth", "--to", to, "--config", config)
        assert "leave out --config" in sentence


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_path('scripts/convert_checkpoint.py', run_name='__main__')",
        "runpy.run_module('disalign_tools.convert', run_name='__main__')",
    ],
)
def test_the_script_is_the_command_and_imports_no_framework(start, tmp_path):
    path, out = saved(tmp_path, tiny()), tmp_path / "out.pth"
    script = (
        "import runpy, sys\n"
        f"try: {start}\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('mmengine', 'timm', 'detectron2', 'mmseg', 'torchvision') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", script, str(path), str(out), "--to", "cls"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]
    assert out.exists()


def test_a_cosine_classifier_that_is_not_calibrated_folds_too(tmp_path, capsys):
    layer = CosineClassifier(4, 5, scale=7.0)
    state = {f"classifier.{name}": tensor for name, tensor in layer.state_dict().items()}
    path = saved(tmp_path, {"state_dict": {"backbone.conv1.weight": torch.ones(4, 3, 1, 1)} | state})
    converted(path, tmp_path, "--fold", "--classifier", "fc")
    x = torch.randn(6, 4, dtype=torch.float64)
    stock = torch.nn.Sequential(torch.nn.RMSNorm(4, eps=1e-20, elementwise_affine=False), torch.nn.Linear(4, 5))
    tensors = torch.load(tmp_path / "out.pth", weights_only=True)
    stock.load_state_dict({name.removeprefix("fc."): t for name, t in tensors.items() if name.startswith("fc.")})
    assert_scores(stock, x, cosine_by_hand(x, layer.weight, 7.0))


def test_half_a_calibration_is_refused(tmp_path, capsys):
    layer = calibrate_classifier(torch.nn.Linear(4, 5))
    state = {f"classifier.{name}": tensor for name, tensor in layer.state_dict().items()}
    state["backbone.conv1.weight"] = torch.ones(4, 3, 1, 1)
    path, out = saved(tmp_path, {"state_dict": state}), tmp_path / "out.pth"
    for pattern in ("*.confidence.bias", "*.ma*"):
        sentence = refused(capsys, tmp_path, path, out, "--to", "cls", "--drop", pattern)
        assert "a whole calibration" in sentence
    state["classifier.calibration.margin"] = torch.zeros(6)
    path = saved(tmp_path, {"state_dict": state})
    assert "classifier.calibration.margin ([6], not [5])" in refused(capsys, tmp_path, path, out, "--to", "cls")


@pytest.mark.parametrize("scale", ["0", "-3", "nan", "inf"])
def test_a_scale_that_is_none(scale, tmp_path, capsys):
    path = saved(tmp_path, {"network.linear.weight": torch.ones(5, 4)})
    assert "positive number as --scale" in refused(
        capsys, tmp_path, path, tmp_path / "o.pth", "--to", "cls", f"--scale={scale}"
    )


def test_tensors_that_do_not_belong_together(tmp_path, capsys):
    out = tmp_path / "out.pth"
    state = {f"network.linear.{name}": tensor for name, tensor in calibration(5, 4).items()}
    state |= {"network.linear.weight": torch.randn(5, 4), "network.linear.bias": torch.randn(5)}
    for name in ("bias", "logit_scale", "logit_bias", "confidence_layer.weight", "confidence_layer.bias"):
        path = saved(tmp_path, state | {f"network.linear.{name}": torch.ones(1, 7)})
        assert f"network.linear.{name}" in refused(capsys, tmp_path, path, out, "--to", "cls")
        path = saved(tmp_path, {key: tensor for key, tensor in state.items() if key != f"network.linear.{name}"})
        refused(capsys, tmp_path, path, out, "--to", "cls")
    path = saved(tmp_path, {"network.linear.weight": torch.ones(5, 4), "network.linear.scale": torch.ones(2)})
    assert "network.linear.scale ([2], not [])" in refused(capsys, tmp_path, path, out, "--to", "cls")
    path = saved(tmp_path, {"decode_head.conv_seg.weight": torch.ones(5, 4, 3, 3)})
    assert "(5, 4, 3, 3)" in refused(capsys, tmp_path, path, out, "--to", "mmseg")


def test_wrong_arguments_are_argparses(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["a", "b", "--to", "c"])
    assert exit_status.value.code == 2


def test_the_difference_is_the_largest_of_all_scores():
    tensors = {"fc.weight": torch.randn(7, 4, dtype=torch.float64), "fc.bias": torch.zeros(7, dtype=torch.float64)}
    layer = linear(tensors, "fc")
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest = max(abs(score) for row in (x @ tensors["fc.weight"].T).tolist() for score in row)
    assert layer.difference(tensors) < 1e-15
    shifted = {**tensors, "fc.bias": torch.tensor([0, 0, 2e-4, 0, -3e-4, 0, 1e-4], dtype=torch.float64)}
    assert layer.difference(shifted) == pytest.approx(3e-4 / largest, rel=1e-9)


def test_mislas_two_halves_are_one_model(tmp_path, capsys):
    state = tiny()
    halves = {
        "state_dict_model": {f"module.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")},
        "state_dict_classifier": {f"module.{name}": tensor for name, tensor in state.items() if name.startswith("fc.")},
    }
    torch.save({"epoch": 1, **halves}, tmp_path / "halves.pth")
    torch.save(state, tmp_path / "whole.pth")
    for name in ("halves", "whole"):
        assert main([str(tmp_path / f"{name}.pth"), str(tmp_path / f"{name}-timm.pth"), "--to", "timm"]) == 0
    found, expected = (torch.load(tmp_path / f"{name}-timm.pth") for name in ("halves", "whole"))
    expected, found = (one.get("state_dict", one) for one in (expected, found))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
