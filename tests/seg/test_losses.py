"""MMSegmentation's GRWCrossEntropyLoss, against torch's own cross-entropy in float64."""

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch.nn.parallel import DistributedDataParallel

import disalign
from disalign import InputError, generalized_reweight
from disalign_mmseg import losses
from disalign_mmseg.losses import GRWCrossEntropyLoss

COUNTS = [900, 70, 20, 3]
WEIGHT = [4 * count**-0.5 / sum(other**-0.5 for other in COUNTS) for count in COUNTS]
K = len(COUNTS)
OPTIONS = {
    "weighted_mean": dict(reduction="weighted_mean"),
    "mean": dict(reduction="mean"),
    "all pixels": dict(reduction="mean", avg_non_ignore=False),
}


def build(**options):
    return MODELS.build(dict(type="GRWCrossEntropyLoss", class_counts=COUNTS, rho=0.5) | options)


@pytest.fixture
def batch():
    """The head's logits (2, K, 5, 6) and labels (2, 1, 17, 23), a third of them 255."""
    label = torch.randint(K, (2, 1, 17, 23))
    label[torch.rand(label.shape) < 0.33] = 255
    return torch.randn(2, K, 5, 6, requires_grad=True), label


def expected(logits, label, reduction, avg_non_ignore=True, align_corners=False):
    """The loss in float64, and its gradient to the head's logits."""
    logits = logits.detach().double().requires_grad_()
    upsampled = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=align_corners)
    log_p, valid = upsampled.log_softmax(1).movedim(1, -1), label.squeeze(1) != 255
    label = label.squeeze(1)[valid]
    weight = torch.tensor(WEIGHT, dtype=torch.float64)[label]
    total = -(weight * log_p[valid][torch.arange(len(label)), label]).sum()
    if reduction == "weighted_mean":
        loss = total / weight.sum()
    else:
        loss = total / (len(label) if avg_non_ignore else valid.numel())
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def value_and_gradient(loss, logits):
    return loss.detach().double(), torch.autograd.grad(loss, logits)[0].double()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("upsample", ["fused", "plain"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_upsampled(batch, options, upsample, align_corners):
    logits, label = batch
    loss = build(**options, upsample=upsample, loss_weight=0.4)
    value, gradient = value_and_gradient(loss.upsampled(logits, label, align_corners), logits)
    correct, correct_gradient = expected(logits, label, **options, align_corners=align_corners)
    # torch interpolates in fp32, with coordinates rounded to it.
    tolerance = dict(rtol=1e-6, atol=1e-8) if upsample == "fused" else dict(rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(value, 0.4 * correct, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, 0.4 * correct_gradient, **tolerance)
    assert torch.equal(loss.upsampled(logits, label.squeeze(1), align_corners, ignore_index=255).double(), value)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_takes_logits_of_the_labels_size(batch, options):
    logits, label = batch
    resized = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
    loss = build(**options, loss_weight=0.4)
    value = loss(resized, label.squeeze(1), weight=None, ignore_index=255)
    torch.testing.assert_close(value.detach().double(), 0.4 * expected(logits, label, **options)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sampled_pixels_keep_the_denominator_of_all_pixels(batch, options):
    logits, label = batch
    loss = build(**options, sampled_pixels=50)
    draws = torch.stack([loss.upsampled(logits, label, False).detach() for _ in range(500)]).double()
    correct, _ = expected(logits, label, **options)
    error = draws.std() / 500**0.5
    assert abs(draws.mean() - correct) < 4 * error
    assert error < 0.01 * correct
    whole = build(**options, sampled_pixels=int((label[0] != 255).sum()))
    assert whole.upsampled(logits[:1], label[:1], False).item() == pytest.approx(
        expected(logits[:1], label[:1], **options)[0].item(), rel=1e-6
    )


def test_each_option_takes_its_way(batch, monkeypatch):
    taken = []
    for name in ("upsampled_cross_entropy", "sampled_cross_entropy"):
        monkeypatch.setattr(losses, name, lambda logits, *_, name=name: taken.append(name) or logits.sum())
    for options in (dict(), dict(upsample="plain"), dict(sampled_pixels=7)):
        build(**options).upsampled(*batch, False)
    assert taken == ["upsampled_cross_entropy", "sampled_cross_entropy"]


def test_the_official_division_by_all_pixels():
    """0.x: F.cross_entropy(..., reduction='none').mean()."""
    logits, label = torch.randn(2, K, 4, 4), torch.randint(K, (2, 4, 4))
    label[:, 1:3] = 255
    each = F.cross_entropy(logits, label, torch.tensor(WEIGHT), ignore_index=255, reduction="none")
    torch.testing.assert_close(build(reduction="mean", avg_non_ignore=False)(logits, label), each.mean())


@pytest.mark.parametrize("how", [dict(), dict(upsample="plain"), dict(sampled_pixels=9)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_ignored(batch, options, how):
    logits, label = batch
    loss = build(**options, **how)
    value, gradient = value_and_gradient(loss.upsampled(logits, torch.full_like(label, 255), False), logits)
    assert value == 0
    assert not gradient.any()
    label[1] = 255
    value, gradient = value_and_gradient(loss.upsampled(logits, label, False), logits)
    assert value > 0
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("how", [dict(), dict(upsample="plain"), dict(sampled_pixels=9)], ids=str)
def test_cpu_autocast(batch, how):
    logits, label = batch
    loss = build(**how)
    with torch.autocast("cpu", torch.bfloat16):
        scores = F.conv2d(logits, torch.eye(K)[..., None, None])
        assert scores.dtype == torch.bfloat16
        value = loss.upsampled(scores, label, False)
    _, gradient = value_and_gradient(value, logits)
    assert value.dtype == torch.float32
    assert gradient.isfinite().all()
    assert gradient.any()
    if not how:
        torch.testing.assert_close(value.double(), expected(scores, label, "weighted_mean")[0], rtol=1e-6, atol=0)


def stock_head(**options):
    return MODELS.build(
        dict(type="FCNHead", in_channels=6, channels=6, num_convs=0, concat_input=False, num_classes=K, **options)
    )


def samples(label):
    return [SegDataSample(gt_sem_seg=PixelData(data=one)) for one in label]


def test_in_a_stock_head_with_class_weights_and_ignored_pixels(batch):  # mmsegmentation#3574
    logits, label = batch
    head = stock_head(loss_decode=dict(type="GRWCrossEntropyLoss", class_counts=COUNTS, rho=0.5))
    found = head.loss_by_feat(logits, samples(label))
    assert set(found) == {"loss_grw", "acc_seg"}
    correct, _ = expected(logits, label, "weighted_mean")
    assert found["loss_grw"].item() == pytest.approx(correct.item(), rel=1e-6)


@pytest.mark.parametrize("thresh", [None, 0.7])
def test_a_pixel_sampler_is_refused(batch, thresh):
    logits, label = batch
    loss = dict(type="GRWCrossEntropyLoss", class_counts=COUNTS)
    head = stock_head(loss_decode=loss, sampler=dict(type="OHEMPixelSampler", thresh=thresh, min_kept=5))
    with pytest.raises(InputError, match=r"no pixel sampler.*decode_head\.sampler=None"):
        head.loss_by_feat(logits, samples(label))


def test_another_ignore_index_than_the_heads_is_refused(batch):
    logits, label = batch
    for call in (lambda: build()(logits, label, ignore_index=0), lambda: build().upsampled(logits, label, False, 0)):
        with pytest.raises(InputError, match=r"expected loss_decode\.ignore_index=0, the head's, got 255"):
            call()
    label[label == 255] = 9
    value = build(ignore_index=9).upsampled(logits, label, False, 9).item()
    label[label == 9] = 255
    assert value == pytest.approx(expected(logits, label, "weighted_mean")[0].item(), rel=1e-6)


def test_counts_from_the_dataset_come_later(batch):
    loss = build(class_counts="dataset")
    for call in (lambda: loss(*batch), lambda: loss.upsampled(*batch, False)):
        with pytest.raises(InputError, match="expected class counts before the first loss"):
            call()
    loss.set_class_counts(COUNTS)
    assert torch.equal(loss.upsampled(*batch, False), build().upsampled(*batch, False))


def test_counts_of_ade20k():
    loss = MODELS.build(dict(type="GRWCrossEntropyLoss", class_counts="ade20k"))
    assert torch.equal(loss.weight, generalized_reweight(disalign.load_class_counts("ade20k"), 0.2))
    assert loss.loss_name == "loss_grw"
    assert loss.reduction == "weighted_mean"
    assert loss.ignore_index == 255
    assert not list(loss.parameters())
    assert loss.state_dict() == {}


@pytest.mark.parametrize("how", [dict(), dict(upsample="plain"), dict(sampled_pixels=900)], ids=str)
def test_wrong_labels_and_counts_are_refused(batch, how):
    logits, label = batch
    with pytest.raises(InputError, match="expected 4 class weights"):
        build(class_counts=[3, 2, 1], **how).upsampled(logits, label.masked_fill(label == 3, 255), False)
    label[1, 0, 2, 3] = 4
    with pytest.raises(InputError, match=r"labels in \[0, 4\) or ignore_index 255, got 4"):
        build(**how).upsampled(logits, label, False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(reduction="sum"), "'weighted_mean', or 'mean', alone with avg_non_ignore=False, got 'sum'"),
        (dict(avg_non_ignore=False), "'mean', alone with avg_non_ignore=False, got 'weighted_mean'"),
        (dict(upsample="fast"), "'fused' or 'plain', got 'fast'"),
        (dict(sampled_pixels=0), "whole number > 0 or None, got 0"),
        (dict(sampled_pixels=0.5), "whole number > 0 or None, got 0.5"),
        (dict(sampled_pixels=True), "whole number > 0 or None, got True"),
        (dict(sampled_pixels=9, upsample="plain"), "without upsample='plain'"),
        (dict(loss_name="grw"), "begins with 'loss_'"),
        (dict(class_counts=[1, 0]), "none for class 1"),
    ],
    ids=str,
)
def test_options_without_sense_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        GRWCrossEntropyLoss(**(dict(class_counts=COUNTS) | options))


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="use_sigmoid"):
        build(use_sigmoid=False)


def test_metadata():
    found = build(sampled_pixels=9).metadata()
    assert found["class_counts"] == COUNTS
    assert (found["rho"], found["sampled_pixels"], found["avg_non_ignore"]) == (0.5, 9, True)


# ------------------------------------------------------------------------------------------ two real processes


class Scores(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(K))
        self.loss = build(**options)

    def forward(self, logits, label):
        return self.loss.upsampled(logits + self.shift[:, None, None], label, False)


def shares(seed=5):
    """Labels of two ranks, of which the second has few valid pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, K, 5, 6, generator=generator)
    label = torch.randint(K, (2, 1, 17, 23), generator=generator)
    label[1, :, 2:] = 255
    return logits, label


def train_rank(rank, path, options, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    logits, label = shares()
    model = DistributedDataParallel(Scores(options))
    model(logits[rank : rank + 1], label[rank : rank + 1]).backward()
    if rank == 0:
        queue.put(model.module.shift.grad.tolist())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_is_that_of_the_global_batch(tmp_path, options):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (str(tmp_path / "store"), options, queue)
    ranks = [context.Process(target=train_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    gradient = queue.get(timeout=60)
    for process in ranks:
        process.join()
    _, correct = expected(*shares(), **options)
    assert gradient == pytest.approx(correct.sum(dim=(0, 2, 3)).tolist(), rel=1e-5)
