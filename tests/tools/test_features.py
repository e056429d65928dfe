"""Features of images by a trunk of timm, through the command."""

import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from disalign import Features, InputError
from disalign_tools import __main__ as console
from disalign_tools import features as features_command
from disalign_tools.features import load_trunk, transform_of

MODEL = "test_resnet"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two classes, and a list of the same images."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    lines = []
    for label, (name, count) in enumerate({"ant": 5, "bee": 2}.items()):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            path = f"train/{name}/{number}.png"
            Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / path)
            lines.append(f"{path} {label}")
    (folder / "list.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "trunk.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=7).state_dict(), path)
    return str(path)


def run(images, weights, out, *flags):
    return features_command.main(
        [str(images), "--model", f"timm:{MODEL}", "--weights", weights, "--out", str(out), "--workers", "0", *flags]
    )


def test_a_folder_and_a_list_of_it_give_the_trunks_own_features(images, weights, tmp_path, capsys):
    assert run(images / "train", weights, tmp_path / "folder") == 0
    assert "Features(7 x " in (said := capsys.readouterr().out)
    assert "images per second" in said
    assert run(images / "list.txt", weights, tmp_path / "list", "--data-root", str(images)) == 0
    found = Features.open(tmp_path / "folder")
    assert torch.equal(found.x, Features.open(tmp_path / "list").x)
    assert found.class_counts.tolist() == [5, 2]
    trunk = load_trunk(f"timm:{MODEL}", weights)
    inputs = torch.stack(
        [
            transform_of(trunk)(Image.open(images / line.split()[0]))
            for line in (images / "list.txt").read_text().splitlines()
        ]
    )
    torch.testing.assert_close(found.x, trunk(inputs).detach(), rtol=1e-4, atol=1e-5)


def test_through_disalign(images, weights, tmp_path):
    flags = ["--model", f"timm:{MODEL}", "--weights", weights, "--out", str(tmp_path / "x"), "--workers", "0", "--fp16"]
    assert console.main(["features", str(images / "train"), *flags]) == 0
    assert Features.open(tmp_path / "x").x.dtype == torch.float16


def test_without_timm_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "disalign_tools.features")
    assert console.main(["features", "somewhere"]) == 2
    assert "there is no timm; install them with pip install 'disalign[cls]'" in capsys.readouterr().err


def test_another_list_into_the_same_folder_is_refused(images, weights, tmp_path, capsys):
    assert run(images / "train", weights, tmp_path) == 0
    (images / "shorter.txt").write_text("train/ant/0.png 0\ntrain/bee/0.png 1")
    assert run(images / "shorter.txt", weights, tmp_path, "--data-root", str(images)) == 2
    assert "got some of another data, rows, weights or groups" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["labels", "paths", "transforms"])
def test_a_list_of_the_same_length_that_differs_is_refused(what, images, weights, tmp_path, capsys, monkeypatch):
    (tmp_path / "one.txt").write_text("train/ant/0.png 0\ntrain/bee/0.png 1")
    other = {"labels": "train/ant/0.png 1\ntrain/bee/0.png 0", "paths": "train/ant/1.png 0\ntrain/bee/0.png 1"}
    (tmp_path / "other.txt").write_text(other.get(what, (tmp_path / "one.txt").read_text()))
    root = ("--data-root", str(images))
    assert run(tmp_path / "one.txt", weights, tmp_path / "x", *root) == 0
    if what == "transforms":
        monkeypatch.setattr(features_command, "transform_of", lambda _: timm.data.create_transform(64))
    assert run(tmp_path / "other.txt", weights, tmp_path / "x", *root) == 2
    assert "got some of another data;" in capsys.readouterr().err


LISTS = {
    "a missing image": ("train/ant/0.png 0\ntrain/ant/9.png 0", "but of 2 named there 1 are missing"),
    "a negative label": ("train/ant/0.png 0\ntrain/bee/0.png -1", "expected labels from 0 on"),
}


@pytest.mark.parametrize("name", LISTS)
def test_refused_lists(name, images, weights, tmp_path, capsys):
    lines, sentence = LISTS[name]
    (tmp_path / "list.txt").write_text(lines)
    assert run(tmp_path / "list.txt", weights, tmp_path / "x", "--data-root", str(images)) == 2
    assert sentence in capsys.readouterr().err


def test_a_trunk_is_the_model_up_to_its_classifier(weights):
    whole = timm.create_model(MODEL, num_classes=7).eval()
    whole.load_state_dict(torch.load(weights))
    x = torch.randn(2, 3, 64, 64)
    before = whole.forward_head(whole.forward_features(x), pre_logits=True)
    assert torch.equal(load_trunk(f"timm:{MODEL}", weights)(x), before)


def test_pretrained_weights_are_fetched_where_none_are_given(weights, monkeypatch):
    asked, create = [], timm.create_model

    def offline(name, pretrained, **options):
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    load_trunk(f"timm:{MODEL}", None)
    load_trunk(f"timm:{MODEL}", weights)
    assert asked == [True, False]


def test_batches_are_as_large_as_said(images, weights, tmp_path, monkeypatch):
    trunk, seen = load_trunk(f"timm:{MODEL}", weights), []
    trunk.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(features_command, "load_trunk", lambda *_: trunk)
    assert run(images / "train", weights, tmp_path, "--batch-size", "3") == 0
    assert seen[-3:] == [3, 3, 1]


REFUSED = {
    "another library": (["--model", "vit"], "expected --model timm:NAME, got 'vit'"),
    "an unknown model": (["--model", "timm:resnet_of_mine"], "expected a model of timm and its weights"),
    "no such folder": (["nowhere"], "nowhere"),
    "a device": (["--device", "tpu"], "expected a device that works as --device tpu"),
    "a batch of none": (["--batch-size", "0"], "expected --batch-size >= 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, images, weights, tmp_path, capsys):
    flags, sentence = REFUSED[name]
    source = [str(images / "train")] if flags[0].startswith("-") else []
    given = ["--weights", weights, "--out", str(tmp_path / "x"), "--workers", "0"]
    model = [] if "--model" in flags else ["--model", f"timm:{MODEL}"]
    assert features_command.main([*source, *model, *given, *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_another_model_is_refused(weights, tmp_path):
    content = torch.load(weights)
    del content["conv1.weight" if "conv1.weight" in content else next(iter(content))]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(InputError, match=re.escape("tensors of timm:test_resnet's trunk in ")):
        load_trunk(f"timm:{MODEL}", str(tmp_path / "part.pth"))


def test_a_broken_image_is_named(images, weights, tmp_path, capsys):
    (tmp_path / "broken" / "ant").mkdir(parents=True)
    (tmp_path / "broken" / "ant" / "0.png").write_bytes(b"no image")
    assert run(tmp_path / "broken", weights, tmp_path / "x") == 2
    assert "expected a whole image at" in capsys.readouterr().err
