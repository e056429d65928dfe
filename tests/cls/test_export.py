"""The exported classifier runs without us and gives the model's own scores."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from disalign_cls import export
from disalign_mmengine.cli import load_config

from .runs import BASELINE, DISALIGN

META = {"dataset_meta": {"classes": [f"digit {c}" for c in range(10)]}, "disalign": {"class_counts": [9], "rho": 1.5}}
ONE = ("--cfg-options", "model.calibration.confidence=one")


def checkpoint_of(config, path, **options):
    """A model with a live backbone and a calibration far from its start, and its checkpoint."""
    model = MODELS.build(load_config(config, options).model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "calibration" in name:
                tensor.add_(torch.randn_like(tensor) * 0.5)
        model.backbone.train()
        for _ in range(20):
            model.backbone(pixels(64, 1, 8, 8) / 127.5 - 1)
    torch.save({"state_dict": model.state_dict(), "meta": META}, path)
    return model.eval(), str(path)


def changed(base, folder, text):
    """A config with ``text`` over a shipped one."""
    path = folder / "changed.py"
    path.write_text(f"_base_ = {load_config(base, {}).filename!r}\n{text}\n")
    return str(path)


@torch.no_grad()
def by_hand(model, images):
    """Normalisation, eq. 2 or 3, and eq. 4-5 in float64; (stage one's, calibrated) scores."""
    x = model.backbone(images / 127.5 - 1).double()
    classifier = model.classifier
    if hasattr(classifier, "scale"):
        w = classifier.weight.double()
        z = classifier.scale.double() * (x @ w.T) / (x.norm(dim=1)[:, None] * w.norm(dim=1))
    else:
        z = x @ classifier.weight.double().T + classifier.bias.double()
    if not hasattr(classifier, "calibration"):
        return z, z
    calibration = classifier.calibration
    s = calibration.magnitude.double() * z + calibration.margin.double()
    confidence = 1.0
    if calibration.confidence is not None:
        confidence = torch.sigmoid(F.linear(x, *(p.double() for p in calibration.confidence.parameters())))
    return z, confidence * s + (1 - confidence) * z


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def assert_scores(run, model):
    """At other batch sizes and image sizes than the example's."""
    for shape in ((1, 1, 8, 8), (5, 1, 8, 8), (3, 1, 20, 12)):
        images = pixels(*shape)
        stage_one, expected = by_hand(model, images)
        scores = run(images)
        assert scores.shape == (len(images), 10)
        assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
        if hasattr(model.classifier, "calibration"):
            assert (scores - stage_one).abs().max() > 0.1


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    torch.manual_seed(0)
    return checkpoint_of(DISALIGN["linear"], tmp_path_factory.mktemp("export") / "linear.pth")


CASES = [("linear", ()), ("cosine", ONE), ("linear", ONE), ("cosine", ())]


@pytest.mark.parametrize(("classifier", "options"), CASES[:2], ids=["linear", "cosine-one"])
def test_onnxruntime_agrees(classifier, options, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    given = {"model.calibration.confidence": "one"} if options else {}
    model, path = checkpoint_of(DISALIGN[classifier], tmp_path / "model.pth", **given)
    out = tmp_path / "out" / "model.onnx"
    assert export.main([DISALIGN[classifier], path, str(out), "--size", "8", *options]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]  # the weights lie within
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    assert_scores(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["disalign"])
    assert facts["class_names"] == META["dataset_meta"]["classes"]
    assert (facts["rho"], facts["class_counts"], facts["image_size"]) == (1.5, [9], 8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("for images of 8 x 8 and any size that the backbone accepts")
    assert re.fullmatch(
        r"largest difference from the model's own scores: \d\.\de[-+]\d\d of the largest score", lines[1]
    )


@pytest.mark.parametrize(
    ("config", "options"), [(DISALIGN[kind], options) for kind, options in CASES] + [(BASELINE["linear"], ())]
)
def test_torchscript_agrees(config, options, tmp_path):
    given = {"model.calibration.confidence": "one"} if options else {}
    model, path = checkpoint_of(config, tmp_path / "model.pth", **given)
    out = str(tmp_path / "model.pt")
    assert export.main([config, path, out, "--size", "8", *options]) == 0
    extra = {"disalign.json": ""}
    scripted = torch.jit.load(out, _extra_files=extra)
    assert_scores(scripted, model)
    images = pixels(2, 1, 8, 8)
    assert torch.equal(scripted(images), scripted(images.float()))
    facts = json.loads(extra["disalign.json"])
    assert facts["class_names"] == META["dataset_meta"]["classes"]
    assert facts["rho"] == 1.5


def test_the_size_is_the_configs(linear, tmp_path, capsys):
    transforms = [dict(type="Resize", size=20), dict(type="CenterCrop", size=16), dict(type="Grayscale")]
    config = changed(DISALIGN["linear"], tmp_path, f"test_dataloader = dict(dataset=dict(transforms={transforms}))")
    assert export.main([config, linear[1], str(tmp_path / "a.pt")]) == 0
    assert "for images of 16 x 16 and any size that the backbone accepts" in capsys.readouterr().out
    extra = {"disalign.json": ""}
    torch.jit.load(str(tmp_path / "a.pt"), _extra_files=extra)
    assert json.loads(extra["disalign.json"])["transforms"] == transforms


def test_a_backbone_that_takes_one_size_keeps_it(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    import onnx

    vit = dict(name="vit_tiny_patch16_224", in_chans=1, img_size=32, depth=1, _delete_=True)
    config = changed(BASELINE["linear"], tmp_path, f"model = dict(backbone={vit})")
    model = MODELS.build(load_config(config, {}).model)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    out = tmp_path / "model.onnx"
    assert export.main([config, str(tmp_path / "model.pth"), str(out), "--size", "32"]) == 0
    assert "for images of 32 x 32 and no other size" in capsys.readouterr().out
    (images,) = onnx.load(out).graph.input
    assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["N", 1, 32, 32]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{two}", "{path}", "{tmp}/a.bin", "--size", "8"], r"expected OUT to end in .pt or .onnx, got '.*a.bin'"),
        (["{two}", "{path}", "{tmp}/there.pt", "--size", "8"], r"a new file as OUT, but '.*' exists; add --force"),
        (["{two}", "{path}", "{tmp}/there.pt/a.pt", "--size", "8"], r"expected a place to write '.*', but: "),
        (["{two}", "{path}", "{path}.pt/", "--size", "8"], r"expected .*"),
        (["{two}", "{path}", "{tmp}/a.pt", "--size", "1000000000"], r"takes images of 1000000000 x 1000000000, but: "),
        (
            ["{two}", "{path}", "{tmp}/a.pt", "--size", "8", "--cfg-options", "model.data_preprocessor.std=[0]"],
            "expected finite scores from the model itself, got NaN or infinity",
        ),
        (["{two}", "gone.pth", "{tmp}/a.pt", "--size", "8"], "a checkpoint at 'gone.pth', but there is no such file"),
        (["gone.py", "{path}", "{tmp}/a.pt", "--size", "8"], "expected a config file"),
        (["{one}", "{path}", "{tmp}/a.pt", "--size", "8"], "expected no tensors beyond the model's .*, but got 4"),
        (["{cosine}", "{path}", "{tmp}/a.onnx", "--size", "8"], "expected all .* tensors of the config's model"),
        (["{two}", "{path}", "{tmp}/a.pt"], "expected --size, since the config's test images"),
        (["{two}", "{path}", "{tmp}/a.pt", "--size", "0"], "expected a size of at least 1 pixel, got 0"),
        (["{two}", "{path}", "{tmp}/a.pt", "--size", "1"], "backbone that takes images of 1 x 1, but: .* --size"),
        (
            ["{two}", "{path}", "{tmp}/a.pt", "--size", "8", "--cfg-options", "model.data_preprocessor.pad_value=1"],
            "expected mean and std in data_preprocessor, got pad_value; leave it out",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, linear, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    known = {"one": BASELINE["linear"], "two": DISALIGN["linear"], "cosine": DISALIGN["cosine"], "path": linear[1]}
    assert export.main([argument.format(**known, tmp=tmp_path) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(f"error: .*{sentence}.*\n", output.err)
    assert not output.out
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]
    assert (tmp_path / "there.pt").read_text() == "mine"


SAVE = torch.jit.save


def failing(*_, **__):
    raise RuntimeError("unsupported\nat line 3")


def other_scores(scripted, file, **options):
    scripted.mean += 1
    return SAVE(scripted, file, **options)


@pytest.mark.parametrize(
    ("name", "replacement", "sentence"),
    [
        ("script", failing, "a model that can be exported to .pt, but: unsupported; try the other format"),
        ("load", failing, "a model that can be exported to .pt, but: unsupported; try the other format"),
        ("load", lambda _: failing, "a model that can be exported to .pt, but: unsupported; try the other format"),
        ("load", lambda _: lambda images: torch.full((len(images), 10), torch.nan), "but they differ by nan of the"),
        ("save", other_scores, "the model's own scores from its export, but they differ by .*, more than 1e-05; "),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_export_that_fails_leaves_what_was_there(
    name, replacement, sentence, existing, linear, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "a.pt"
    if existing:
        out.write_text("mine")
    monkeypatch.setattr(torch.jit, name, replacement)
    assert export.main([DISALIGN["linear"], linear[1], str(out), "--size", "8", "--force"]) == 2
    assert re.fullmatch(f"error: expected .*{sentence}.*\n", capsys.readouterr().err)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"] * existing


def test_with_force_it_is_replaced(linear, tmp_path):
    out = tmp_path / "a.pt"
    out.write_text("mine")
    assert export.main([DISALIGN["linear"], linear[1], str(out), "--size", "8", "--force"]) == 0
    assert_scores(torch.jit.load(str(out)), linear[0])


def test_without_onnx_it_says_how_to_get_it(linear, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert export.main([DISALIGN["linear"], linear[1], str(tmp_path / "a.onnx"), "--size", "8"]) == 2
    said = "error: expected onnxscript to write ONNX, got none; pip install onnxscript\n"
    assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_it_says_that_nothing_was_compared(linear, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    monkeypatch.setitem(export.FORMATS, ".onnx", (lambda *_: b"a model", export.load_onnx))
    assert export.main([DISALIGN["linear"], linear[1], str(tmp_path / "a.onnx"), "--size", "8"]) == 0
    assert "not compared with the model's own scores, as onnxruntime is missing" in capsys.readouterr().out
    assert (tmp_path / "a.onnx").read_bytes() == b"a model"
