import copy
import io

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes
from torch import Tensor

from disalign import at_identity

from .models import batch, detections, identical, random_calibration, stages, tiny_cfg

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}
OUTPUTS = ("pred_boxes", "scores", "pred_classes", "pred_masks")
CONFIDENCE = "MODEL.DISALIGN.CONFIDENCE"


def images():
    """TorchScript's inputs are tensors alone: no heights and widths, hence no post-processing."""
    return [{"image": one["image"]} for one in batch()]


def raw(model, inputs):
    """Image by image: field -> tensor, before post-processing."""
    with torch.no_grad():
        outputs = model.inference(inputs, do_postprocess=False)
    fields = [{name: getattr(output, name) for name in OUTPUTS} for output in outputs]
    return [{name: getattr(value, "tensor", value) for name, value in one.items()} for one in fields]


def reloaded(model):
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize(("classifier", "confidence"), [("linear", "learnt"), ("linear", "one"), ("cosine", "learnt")])
def test_a_scripted_model_equals_eager(classifier, confidence):
    one, two = stages(CONFIDENCE, confidence, classifier=classifier)
    scripted = scripting_with_instances(random_calibration(two), FIELDS)
    inputs = images()
    eager = raw(two, inputs)
    assert sum(len(image["scores"]) for image in eager) > 5
    assert identical(raw(scripted, inputs), eager)
    assert identical(raw(reloaded(scripted), inputs), eager)
    assert not identical(raw(one, inputs), eager)


def test_a_model_without_masks_can_be_scripted():
    two, inputs = random_calibration(stages("MODEL.MASK_ON", False)[1]), images()
    scripted = scripting_with_instances(two, {name: FIELDS[name] for name in FIELDS if name != "pred_masks"})
    with torch.no_grad():
        (eager, *_), (output, *_) = (model.inference(inputs, do_postprocess=False) for model in (two, scripted))
    assert torch.equal(output.scores, eager.scores)
    assert len(eager)


def test_a_scripted_stage_one_equals_eager():
    one, inputs = stages(classifier="cosine")[0], images()
    assert identical(raw(scripting_with_instances(one, FIELDS), inputs), raw(one, inputs))


# Detectron2's code branches on what a trace holds fixed; ours does not.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(?!disalign)")
@pytest.mark.parametrize(
    ("cascade", "classifier", "confidence"),
    [(False, "linear", "learnt"), (False, "cosine", "one"), (True, "cosine", "learnt")],
)
def test_a_traced_model_equals_eager(cascade, classifier, confidence):
    one, two = stages(CONFIDENCE, confidence, classifier=classifier, cascade=cascade)
    seen, other = images()

    def inference(model, image):
        return model.inference([{"image": image}], do_postprocess=False)[0]

    adapter = TracingAdapter(random_calibration(two), seen["image"], inference).eval()
    traced = reloaded(torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False))
    for image in (seen["image"], other["image"]):
        output = adapter.outputs_schema(traced(image))
        (eager,) = raw(two, [{"image": image}])
        assert identical(
            {name: getattr(getattr(output, name), "tensor", getattr(output, name)) for name in OUTPUTS}, eager
        )
        assert len(eager["scores"])
        assert not identical(raw(one, [{"image": image}]), [eager])


@pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(?!disalign)")
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_onnxruntime_finds_the_same(classifier):
    """Boxes come out in another order of sums, and pooling and NMS follow them: equal to a tolerance only."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    one, two = stages(classifier=classifier)
    images_seen, file = [image["image"] for image in images()], io.BytesIO()

    def inference(model, image):
        return model.inference([{"image": image}], do_postprocess=False)[0]

    adapter = TracingAdapter(random_calibration(two), images_seen[0], inference).eval()
    with torch.no_grad():  # torch's newer exporter takes no model of Detectron2's, stock ones included
        torch.onnx.export(adapter, adapter.flattened_inputs, file, opset_version=16, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    changed = False
    for image in images_seen:
        found = [torch.from_numpy(output) for output in session.run(None, {name: image.numpy()})]
        output = adapter.outputs_schema(tuple(found))
        ((eager,), (before,)) = (raw(model, [{"image": image}]) for model in (two, one))
        assert torch.equal(output.pred_classes, eager["pred_classes"])
        assert torch.allclose(output.scores, eager["scores"], atol=1e-3)
        assert torch.allclose(output.pred_boxes.tensor, eager["pred_boxes"], atol=0.2)
        assert (output.pred_masks - eager["pred_masks"]).abs().mean() < 1e-3
        changed |= not torch.equal(before["pred_classes"], eager["pred_classes"])
    assert changed


@pytest.mark.parametrize("cascade", [False, True])
def test_test_time_augmentation_of_the_calibrated_model(cascade):
    options = ("TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 96)
    one, two = stages(cascade=cascade)
    random_calibration(two)
    inputs = batch()
    augmented = {
        model: GeneralizedRCNNWithTTA(tiny_cfg(*options, calibrate=model is two, cascade=cascade), model)
        for model in (one, two)
    }
    first, second = (detections(augmented[model], copy.deepcopy(inputs)) for model in (one, two))
    assert set(first[0]) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    assert sum(len(image["scores"]) for image in second) > 5
    assert not identical(first, second)
    # It averages over several views: not the plain detections.
    assert not identical(second, detections(two, inputs))
    with at_identity(two):
        assert identical(detections(augmented[two], inputs), first)
    assert identical(detections(augmented[two], inputs), second)
