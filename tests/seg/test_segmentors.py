"""The frozen segmentors."""

import copy

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS
from torch.nn.parallel import DistributedDataParallel

import disalign_mmseg  # noqa: F401
from disalign import InputError, load_stage_one

from .toy_models import COUNTS, FCN, OCR, THREE, samples, stage_one, stage_two, stage_two_config

KINDS = pytest.mark.parametrize("config", [FCN, OCR, THREE], ids=["FCN", "OCR", "three heads"])
PARTS = ("magnitude", "margin", "confidence.weight", "confidence.bias")


def last_head(config):
    return f"decode_head.{len(config['decode_head']) - 1}" if isinstance(config["decode_head"], list) else "decode_head"


def handed_over(config, **loss):
    before = stage_one(config).eval()
    after = stage_two(config, **loss)
    report = load_stage_one(after, before.state_dict())
    torch.nn.init.normal_(after.calibrated_head.calibration.confidence.weight)
    return before, after, report


def batch(size=2):
    labels = torch.randint(5, (size, 32, 40))
    labels[:, :4] = 255
    return torch.randn(size, 3, 32, 40), samples(labels)


@KINDS
def test_it_starts_at_stage_one_bit_for_bit(config):
    before, after, report = handed_over(config)
    prefix = last_head(config)
    assert set(report.new) == {f"{prefix}.calibration.{part}" for part in PARTS}
    assert all(name.startswith("auxiliary_head.") for name in report.ignored)
    assert report.ignored
    images, targets = batch()
    with torch.no_grad():
        scores = [model.predict(images, copy.deepcopy(targets)) for model in (before, after.train())]
    for one, other in zip(*scores, strict=True):
        assert torch.equal(one.seg_logits.data, other.seg_logits.data)


@KINDS
def test_only_the_calibration_trains(config):
    _, model, _ = handed_over(config)
    prefix = last_head(config)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trainable) == sorted(f"{prefix}.calibration.{part}" for part in PARTS)
    assert model.freeze_report.num_trainable == 2 * 5 + 6 + 1
    model.train()
    following = {name for name, module in model.named_modules() if module.training}
    assert following == {
        name for name, _ in model.named_modules() if name.startswith((f"{prefix}.calibration", f"{prefix}.loss_decode"))
    }
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        losses = model.loss(*batch())
        assert [name for name in losses if "loss" in name] == [
            f"{prefix.replace('_head.', '_').replace('_head', '')}.loss_grw"
        ]
        optimizer.zero_grad()
        model.parse_losses(losses)[0].backward()
        optimizer.step()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(trainable)


@KINDS
def test_the_optimizer_sees_the_calibration_alone(config):
    model = stage_two(config)
    options = dict(optimizer=dict(type="SGD", lr=0.1), constructor="CalibrationOptimWrapperConstructor")
    groups = build_optim_wrapper(model, options).optimizer.param_groups
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.calibrated_head.calibration.parameters())


@KINDS
def test_the_auxiliary_head_is_not_built(config):
    assert not stage_two(config).with_auxiliary_head
    assert stage_one(config).with_auxiliary_head


def test_the_earlier_heads_of_a_cascade_are_only_run_once(monkeypatch):
    _, model, _ = handed_over(OCR)
    calls = []
    first = model.decode_head[0]
    monkeypatch.setattr(first, "forward", lambda *args: calls.append(1) or type(first).forward(first, *args))
    model.loss(*batch())
    assert len(calls) == 1


def test_each_head_of_a_cascade_sees_the_scores_of_the_one_before(monkeypatch):
    _, model, _ = handed_over(THREE)
    first, second, last = model.decode_head
    seen = []
    monkeypatch.setattr(first, "forward", lambda features: "scores of the first")
    monkeypatch.setattr(second, "forward", lambda features, scores: seen.append(scores) or "scores of the second")
    monkeypatch.setattr(last, "loss", lambda features, scores, *rest: seen.append(scores) or {})
    model.loss(*batch())
    assert seen == ["scores of the first", "scores of the second"]


@pytest.mark.parametrize("config", [OCR, THREE], ids=["two heads", "three heads"])
def test_the_loss_of_a_cascade_is_its_last_heads(config):
    _, model, _ = handed_over(config)
    images, targets = batch()
    losses = model.loss(images, targets)
    features = model.extract_feat(images)
    scores = model.decode_head[0](features)
    for head in list(model.decode_head)[1:]:
        scores = head(features, scores)
    upsampled = torch.nn.functional.interpolate(scores, (32, 40), mode="bilinear")
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in targets])
    rates = (1 / torch.tensor(COUNTS)) ** 0.2
    expected = torch.nn.functional.cross_entropy(upsampled, labels, weight=rates, ignore_index=255)
    name = f"decode_{len(config['decode_head']) - 1}"
    assert {key for key in losses if "loss" in key} == {f"{name}.loss_grw"}
    torch.testing.assert_close(losses[f"{name}.loss_grw"], expected)


def test_nothing_is_downloaded_or_initialised():
    config = stage_two_config()
    config["pretrained"] = "https://nowhere.invalid/backbone.pth"
    config["backbone"]["init_cfg"] = dict(type="Pretrained", checkpoint="https://nowhere.invalid/backbone.pth")
    model = MODELS.build(ConfigDict(config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stock_head_is_refused():
    config = stage_two_config()
    config["decode_head"]["type"] = "FCNHead"
    with pytest.raises(
        InputError, match="expected a decode head with a calibration, got FCNHead; set its type to DisAlign"
    ):
        MODELS.build(ConfigDict(config))


def test_a_cascade_wants_the_list_of_its_heads():
    config = stage_two_config(OCR)
    config["decode_head"] = config["decode_head"][-1]
    with pytest.raises(InputError, match="expected decode_head as the list of all heads, got one; restate the list"):
        MODELS.build(ConfigDict(config))


def test_a_loss_can_be_computed_without_gradients():
    _, model, _ = handed_over(FCN)
    with torch.no_grad():
        assert model.loss(*batch())["decode.loss_grw"] > 0


def test_it_runs_under_ddp(process_group):
    _, model, _ = handed_over(FCN)
    wrapped = DistributedDataParallel(model)
    images, targets = batch()
    for _ in range(2):
        losses = wrapped(images, targets, mode="loss")
        model.parse_losses(losses)[0].backward()
    assert model.decode_head.calibration.margin.grad.abs().sum() > 0


def test_bf16_autocast_is_close_to_fp32():
    _, model, _ = handed_over(FCN)
    torch.nn.init.normal_(model.decode_head.calibration.margin, std=0.1)
    images, targets = batch()
    figures = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.parse_losses(model.loss(images, targets))[0]
        loss.backward()
        gradient = model.decode_head.calibration.margin.grad.clone()
        assert gradient.dtype == loss.dtype == torch.float32
        figures.append((loss.detach(), gradient))
    torch.testing.assert_close(figures[1][0], figures[0][0], rtol=0.03, atol=0)
    torch.testing.assert_close(figures[1][1], figures[0][1], rtol=0.1, atol=0.003)


@pytest.mark.parametrize("options", [{}, dict(sampled_pixels=50), dict(reduction="mean", avg_non_ignore=False)])
def test_ignored_images_teach_nothing(options):
    _, model, _ = handed_over(FCN, **options)
    torch.nn.init.normal_(model.decode_head.calibration.margin, std=0.1)
    images, _ = batch()
    labels = torch.full((2, 32, 40), 255)
    loss = model.parse_losses(model.loss(images, samples(labels)))[0]
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.decode_head.calibration.parameters())
    # One of two images.
    labels[0] = 3
    assert model.parse_losses(model.loss(images, samples(labels)))[0] > 0


def test_the_weights_are_those_of_the_counts():
    _, model, _ = handed_over(FCN, rho=1.0)
    expected = 1 / torch.tensor(COUNTS, dtype=torch.float64)
    torch.testing.assert_close(model.decode_head.loss_decode.weight.double(), expected * 5 / expected.sum())
