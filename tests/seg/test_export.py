"""A calibrated segmentor leaves MMSegmentation traced, which is what its own tool does, and as ONNX."""

import pytest

pytest.importorskip("mmseg")

import io

import torch

from disalign import at_identity

from .test_folding import calibrated
from .toy_models import FCN, OCR

CASES = pytest.mark.parametrize(
    ("config", "confidence"), [(FCN, "learnt"), (OCR, "one")], ids=["FCN-learnt", "OCR-one"]
)


def assert_scores(run, model, tolerance):
    """At the example's size, and at another with another number of images."""
    for shape in ((1, 3, 64, 48), (2, 3, 96, 64)):
        images = torch.randn(shape)
        expected = model(images)
        with at_identity(model):
            assert (model(images) - expected).abs().max() > 0.1
        assert (run(images) - expected).abs().max() <= tolerance * expected.abs().max()


@CASES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(?!disalign)")
def test_a_traced_segmentor_equals_eager(config, confidence):
    model, file = calibrated(config, confidence), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(1, 3, 64, 48), check_trace=False), file)
    file.seek(0)
    assert_scores(torch.jit.load(file), model, tolerance=0)


@CASES
def test_onnxruntime_agrees(config, confidence):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = calibrated(config, confidence)
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 48),),
        dynamo=True,
        dynamic_shapes=({0: "N", 2: "H", 3: "W"},),
        input_names=["images"],
        verbose=False,
    )
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert_scores(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model, 1e-5)
