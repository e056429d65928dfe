"""Features of drawn pixels: the sampled loss's own, whatever the pass goes through."""

import re
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules
from torch import nn

import disalign
from disalign import InputError, load_stage_one
from disalign.features import ARRAYS
from disalign_mmseg import collect
from disalign_mmseg.collect import collect_features, training_set
from disalign_mmseg.pixel_counts import count_pixels
from disalign_mmseg.upsampling import sample_pixels, sampled_cross_entropy

from . import annotated
from .toy_models import COUNTS, FCN, OCR, stage_one, stage_two

K = 5
CLASSES = tuple("abcde")
#: With the last image all ignored, see :func:`data`.
SIZES = ((40, 56), (56, 40), (40, 40), (64, 48), (24, 32))
PIXELS = 6
#: MMSegmentation's order: the label map keeps the size that the annotation has.
HALF = (
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=0.5, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
)
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    annotated.write(path, [0, 1, 2, 3, 255], SIZES, "abcdf")
    annotated.put(path, "f.png", np.full(SIZES[4], 255, np.uint8))
    return path


def dataset(folder, pipeline=annotated.PIPELINE, **options):
    return annotated.dataset(folder, classes=CLASSES, pipeline=pipeline, **options)


def calibrated_model(config=FCN, divisor=None, align_corners=False, seed=0, bgr_to_rgb=True):
    """A stage two far from the identity, and what must not matter: its own training flag."""
    torch.manual_seed(seed)
    padding = None if divisor is None else dict(size_divisor=divisor)
    preprocessor = dict(type="SegDataPreProcessor", mean=MEAN, std=STD, bgr_to_rgb=bgr_to_rgb, test_cfg=padding)
    heads = config["decode_head"] if isinstance(config["decode_head"], list) else [config["decode_head"]]
    heads = [{**head, "align_corners": align_corners} for head in heads]
    decode_head = heads if isinstance(config["decode_head"], list) else heads[0]
    config = {**config, "data_preprocessor": preprocessor, "decode_head": decode_head}
    model = stage_two(config)
    load_stage_one(model, stage_one(config).state_dict())
    for parameter in model.calibrated_head.calibration.parameters():
        nn.init.normal_(parameter)
    return model.train()


def collected(folder, model=None, pixels=PIXELS, data=None, **options):
    options = {"class_counts": COUNTS, "dtype": torch.float32, **options}
    model = calibrated_model() if model is None else model
    return collect_features(model, dataset(folder) if data is None else data, pixels, **options)


def loss_of(features, model, weight):
    """The weighted loss of features, from the head's classifier and calibration on each cell."""
    head = model.calibrated_head
    cells = features.x.float().flatten(0, 1)[..., None, None]
    scores = head.calibration(head.conv_seg(cells), cells).flatten(1).unflatten(0, features.bilinear.shape)
    mixed = (scores * features.bilinear[..., None]).sum(1)
    losses = disalign.grw_cross_entropy(mixed, features.y, weight, "none")
    return (losses * features.weights).sum()


def by_whole_images(model, samples, weight, divisor, pixels):
    """The sampled loss of each image's own logits, upsampled to the (padded) label map, cropped to it."""
    model.eval()
    total = 0.0
    for number, sample in enumerate(samples):
        image, label = sample["inputs"].float(), sample["data_samples"].gt_sem_seg.data
        inputs = (image.flip(0) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        size = [side if divisor is None else -(-side // divisor) * divisor for side in image.shape[1:]]
        inputs = F.pad(inputs, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]))
        features = model.extract_feat(inputs[None])
        head = model.calibrated_head
        earlier = [model.decode_head[0](features)] if head is not model.decode_head else []
        logits = head(features, *earlier)
        factor = label.shape[1] / image.shape[1]
        whole = [int(side * factor) for side in size]
        upsampled = F.interpolate(logits, whole, mode="bilinear", align_corners=head.align_corners)
        upsampled = upsampled[..., : label.shape[1], : label.shape[2]]
        torch.manual_seed(int(np.random.SeedSequence((0, number)).generate_state(1)[0]))
        # Of the same size: the interpolation within changes nothing.
        total = total + sampled_cross_entropy(upsampled, label, weight, pixels)
    return total


CASES = {
    "as it is": dict(),
    "padded": dict(divisor=32),
    "aligned corners": dict(align_corners=True),
    "half the size": dict(pipeline=HALF),
    "half the size, padded": dict(pipeline=HALF, divisor=32),
    "half the size, padded, aligned corners": dict(pipeline=HALF, divisor=32, align_corners=True),
    "a cascade": dict(config=OCR, divisor=16),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_give_the_sampled_loss_and_its_gradient(name, folder):
    case = dict(CASES[name])
    data = dataset(folder, case.pop("pipeline", annotated.PIPELINE))
    model, weight = calibrated_model(**case), torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])
    parameters = list(model.calibrated_head.calibration.parameters())
    features = collected(folder, model, data=data)
    assert features.x.shape == (4 * PIXELS, 4, 6)
    found = loss_of(features, model, weight)
    expected = by_whole_images(model, [data[number] for number in range(5)], weight, case.get("divisor"), PIXELS)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_solver_sees_that_loss(folder):
    model = calibrated_model()
    features = collected(folder, model)
    head = model.calibrated_head
    linear = nn.Linear(6, K)
    linear.load_state_dict({"weight": head.conv_seg.weight.flatten(1), "bias": head.conv_seg.bias})
    report = disalign.fit(features, linear, 0.5, penalty=1.0).fit_report
    weight = disalign.generalized_reweight(COUNTS, 0.5)
    weight[4] = 0  # no pixel shows it
    with disalign.at_identity(model):
        expected = loss_of(features, model, weight) / (weight[features.y] * features.weights).sum()
    assert report.solution.start == pytest.approx(float(expected), rel=1e-5)


def test_pixels_of_one_image_share_its_number_and_its_valid_pixels(folder):
    data = dataset(folder)
    features = collected(folder, data=data)
    assert features.groups.tolist() == [number for number in range(4) for _ in range(PIXELS)]
    labels = [data[number]["data_samples"].gt_sem_seg.data for number in range(5)]
    valid = [int((label != 255).sum()) for label in labels]
    assert features.weights.tolist() == [valid[number] / PIXELS for number in range(4) for _ in range(PIXELS)]
    assert features.y.max() < 255
    for number, label in enumerate(labels[:4]):
        torch.manual_seed(int(np.random.SeedSequence((0, number)).generate_state(1)[0]))
        drawn = label.flatten()[sample_pixels(label, PIXELS)[0][0]]
        assert torch.equal(features.y[features.groups == number], drawn)


def test_workers_change_nothing_and_a_seed_the_pixels(folder):
    first, again = collected(folder), collected(folder, workers=1)
    for name in ARRAYS:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.x, collected(folder, seed=1).x)


def test_no_global_random_number_is_drawn_and_the_model_stays_as_it_was(folder):
    model = calibrated_model()
    model.backbone.train()
    modes = [module.training for module in model.modules()]
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    collected(folder, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.decode_head.calibration._forward_pre_hooks


def test_kept_in_half_precision(folder, tmp_path):
    half, full = collected(folder, out=tmp_path / "f", dtype=torch.float16), collected(folder)
    assert torch.equal(half.x, full.x.half())
    assert half.bilinear.dtype == torch.float32
    assert torch.equal(half.bilinear, full.bilinear)


def test_counts_of_the_data_set_are_its_totals(folder):
    expected = count_pixels(dataset(folder), K)["train_counts"]
    features = collected(folder, class_counts=None)
    assert features.class_counts.tolist() == features.totals.tolist() == expected
    assert collected(folder).totals is None
    by_label = torch.zeros(K).double().index_add(0, features.y, features.weights)
    assert float(by_label.sum()) == pytest.approx(sum(expected))


def watched(monkeypatch, ends_at=None):
    """The images that passes see, block by block of one image; the pass ends at one of them."""
    seen, pixel_rows = [], collect.pixel_rows

    def look(model, batch, *rest):
        name = batch["data_samples"][0].img_path[-5]
        if name == ends_at:
            raise KeyboardInterrupt
        seen.append(name)
        return pixel_rows(model, batch, *rest)

    monkeypatch.setattr(collect, "BLOCK", 1)
    monkeypatch.setattr(collect, "pixel_rows", look)
    return seen


def test_a_pass_that_ended_early_goes_on(folder, tmp_path, monkeypatch):
    expected = collected(folder)
    with monkeypatch.context() as patch:
        watched(patch, ends_at="c")
        with pytest.raises(KeyboardInterrupt):
            collected(folder, out=tmp_path)
    seen = watched(monkeypatch)
    features = collected(folder, out=tmp_path)
    assert seen == [*"ab", *"cdf"]  # two are compared
    for name in ARRAYS:
        assert torch.equal(getattr(features, name), getattr(expected, name))
    collected(folder, out=tmp_path)
    assert seen[5:] == [*"abcf"]


def test_a_corrupt_folder_is_filled_again(folder, tmp_path, monkeypatch, caplog):
    first = collected(folder, out=tmp_path).x.clone()
    rows = np.load(tmp_path / "x.npy", mmap_mode="r+")
    rows[3] += 1
    rows.flush()
    seen = watched(monkeypatch)
    assert torch.equal(collected(folder, out=tmp_path).x, first)
    assert seen == list("abcdf")
    assert "they are collected again" in caplog.text


def test_another_calibration_and_rho_are_no_other_trunk(folder, tmp_path, monkeypatch):
    model = calibrated_model()
    collected(folder, model, out=tmp_path)
    nn.init.normal_(model.decode_head.calibration.margin)
    model.decode_head.loss_decode.rho = 3.0
    model.decode_head.loss_decode.set_class_counts([9, 8, 7, 6, 5])
    seen = watched(monkeypatch)
    collected(folder, model, out=tmp_path)
    # The same, though LoadAnnotations shows more of itself once it has loaded something.
    used = dataset(folder)
    _ = used[0]
    collected(folder, model, data=used, out=tmp_path)
    assert seen == [*"abcf"] * 2  # no more than what is compared


OTHERS = {
    "trunk": lambda folder, out: collected(folder, calibrated_model(seed=1), out=out),
    "padding": lambda folder, out: collected(folder, calibrated_model(divisor=16), out=out),
    "align_corners": lambda folder, out: collected(folder, calibrated_model(align_corners=True), out=out),
    "pipeline": lambda folder, out: collected(folder, data=dataset(folder, HALF), out=out),
    "images or annotations": lambda folder, out: collected(folder, data=dataset(folder, indices=[1, 2]), out=out),
    "pixels": lambda folder, out: collected(folder, pixels=PIXELS + 1, out=out),
    "images": lambda folder, out: collected(folder, images=3, out=out),
    "seed": lambda folder, out: collected(folder, seed=1, out=out),
    "dtype": lambda folder, out: collected(folder, dtype=torch.float64, out=out),
}


def test_counts_are_those_of_the_call(folder, tmp_path):
    first = collected(folder, out=tmp_path, totals=[1, 2, 3, 4, 5])
    again = collected(folder, out=tmp_path, class_counts=[9, 8, 7, 6, 5], totals=[9, 9, 9, 9, 9])
    assert torch.equal(again.x, first.x)
    assert again.class_counts.tolist() == [9, 8, 7, 6, 5]
    assert again.totals.tolist() == [9, 9, 9, 9, 9]


def other_colours():
    return calibrated_model(bgr_to_rgb=False)


def other_strides():
    model = calibrated_model()
    model.backbone.layer1[0].conv1.dilation = model.backbone.layer1[0].conv1.padding = (3, 3)
    return model


@pytest.mark.parametrize("other", [other_colours, other_strides])
def test_rows_that_do_not_come_out_again_are_refused(other, folder, tmp_path):
    collected(folder, out=tmp_path)
    with pytest.raises(InputError, match="to come out again, but some differ"):
        collected(folder, other(), out=tmp_path)


def test_features_of_others_are_refused_and_kept(folder, tmp_path):
    collected(folder, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for what, attempt in OTHERS.items():
        with pytest.raises(InputError, match=f"some of another {what};"):
            attempt(folder, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before}


def test_the_images_may_move_but_not_change(tmp_path):
    annotated.write(tmp_path / "here", [0, 1], SIZES[:2], "ab")
    collected(tmp_path / "here", out=tmp_path / "features")
    (tmp_path / "here").rename(tmp_path / "there")
    collected(tmp_path / "there", out=tmp_path / "features")
    annotated.put(tmp_path / "there", "a.png", np.zeros(SIZES[0], np.uint8))
    with pytest.raises(InputError, match="some of another images or annotations;"):
        collected(tmp_path / "there", out=tmp_path / "features")


def rank_of_two(rank, folder, store):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    register_all_modules(init_default_scope=True)
    collect.BLOCK = 1
    pixel_rows, seen = collect.pixel_rows, []
    collect.pixel_rows = lambda model, batch, *rest: (
        seen.append(batch["data_samples"][0].img_path[-5]) or pixel_rows(model, batch, *rest)
    )
    found = [collected(folder, class_counts=None, images=4, out=out) for out in (None, f"{store}/out")]
    torch.save(([(one.x, one.y, one.weights, one.groups) for one in found], seen), f"{store}/{rank}")
    dist.destroy_process_group()


def test_two_processes_share_the_images_and_get_all(folder, tmp_path):
    torch.multiprocessing.start_processes(rank_of_two, (str(folder), str(tmp_path)), nprocs=2, start_method="fork")
    alone = collected(folder, class_counts=None, images=4)
    shares = []
    for rank in range(2):
        found, seen = torch.load(tmp_path / str(rank))
        shares.append(seen)
        for x, y, weights, groups in found:
            assert torch.equal(x, alone.x)
            assert torch.equal(y, alone.y)
            assert torch.equal(weights, alone.weights)
            assert torch.equal(groups, alone.groups)
    assert [len(seen) for seen in shares] == [4, 4]
    assert not set(shares[0]) & set(shares[1])


@pytest.fixture(scope="module")
def long_tail(tmp_path_factory):
    """Ten images, of which the first alone shows class 4."""
    path = tmp_path_factory.mktemp("tail")
    names = "abcdefghij"
    masks = annotated.write(path, [0, 1, 255], [(16, 16 + 2 * number) for number in range(10)], names)
    masks[0][:4] = 4
    annotated.put(path, "a.png", masks[0])
    return path


def test_a_part_of_the_images_stands_for_all(long_tail):
    data, model = dataset(long_tail), calibrated_model()
    counts = count_pixels(dataset(long_tail), K)["train_counts"]
    whole = collected(long_tail, model, data=data)
    per_pixel = {int(group): float(whole.weights[whole.groups == group][0]) for group in whole.groups.unique()}
    sums, times, passes = torch.zeros(K).double(), Counter(), 150
    for seed in range(passes):
        features = collected(long_tail, model, 4, data=data, images=4, threshold=0.5, seed=seed)
        drawn = features.groups.unique().tolist()
        assert len(drawn) == 4
        times.update(drawn)
        # f_c = 0.1 for class 4: repeat factor sqrt(0.5 / 0.1), and 1 for the other nine images.
        factor = 5**0.5
        probability = {number: 4 * (factor if number == 0 else 1) / (factor + 9) for number in range(10)}
        expected = [per_pixel[group] * PIXELS / 4 / probability[group] for group in features.groups.tolist()]
        torch.testing.assert_close(features.weights, torch.tensor(expected).double())
        sums.index_add_(0, features.y, features.weights)
    assert times[0] > 1.5 * max(times[number] for number in range(1, 10))
    for label in (0, 1, 4):
        assert float(sums[label]) / passes == pytest.approx(counts[label], rel=0.08 if label < 4 else 0.2)


def test_as_many_images_as_there_are_is_all_of_them(folder, tmp_path):
    first = collected(folder, out=tmp_path)
    assert torch.equal(collected(folder, images=5, out=tmp_path).x, first.x)


def test_the_training_set_under_the_evaluations_transforms(folder):
    flip = [*annotated.PIPELINE[:2], dict(type="RandomFlip", prob=1.0), annotated.PIPELINE[2]]
    plain = annotated.config(folder, classes=CLASSES, pipeline=flip)
    config = Config(
        dict(
            train_dataloader=dict(dataset=dict(type="RepeatDataset", times=3, dataset=plain)),
            test_dataloader=dict(dataset=annotated.config(folder, classes=CLASSES)),
        )
    )
    found = collected(folder, data=training_set(config))
    expected = collected(folder)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.y, expected.y)
    assert not torch.equal(collected(folder, data=DATASETS.build(config.train_dataloader.dataset)).x, expected.x)


def twice(folder):
    model = calibrated_model()
    forward = type(model.decode_head).forward
    model.decode_head.forward = lambda inputs: forward(model.decode_head, inputs) + forward(model.decode_head, inputs)
    return collected(folder, model)


def other_scores(folder):
    model = calibrated_model()
    model.decode_head.conv_seg.forward = lambda x: F.conv2d(
        F.normalize(x), model.decode_head.conv_seg.weight, model.decode_head.conv_seg.bias
    )
    return collected(folder, model)


def too_large_for_fp16(folder):
    model = calibrated_model()
    with torch.no_grad():
        model.decode_head.convs[0].bn.weight.fill_(1e7)
    return collected(folder, model, dtype=torch.float16)


def wrong_label(folder):
    annotated.write(folder / "wrong", [0, 7], SIZES[:1], "a")
    return collected(folder / "wrong")


RESIZED_LABELS = (*annotated.PIPELINE[:2], dict(type="Resize", scale=(20, 20)), annotated.PIPELINE[2])
UNLABELLED = (annotated.PIPELINE[0], annotated.PIPELINE[2])
AUGMENTED = (
    annotated.PIPELINE[0],
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=factor) for factor in (0.5, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
)
REFUSED = {
    "resized label maps": (
        lambda folder: collected(folder, data=dataset(folder, RESIZED_LABELS)),
        "expected a label map of the image's original size from the evaluation's pipeline, got (20, 20) where it is "
        "(40, 56)",
    ),
    "no label maps": (
        lambda folder: collected(folder, data=dataset(folder, UNLABELLED)),
        "from the evaluation's pipeline, got none; put LoadAnnotations after Resize",
    ),
    "test-time augmentation": (
        lambda folder: collected(folder, data=dataset(folder, AUGMENTED)),
        "got none; put LoadAnnotations after Resize in test_dataloader.dataset.pipeline, without TestTimeAug",
    ),
    "a head that classifies twice": (twice, "to classify once per image, but it did so 2 times"),
    "a head that does not classify by conv_seg": (other_scores, "to classify by conv_seg, a 1x1 convolution"),
    "features that fp16 does not hold": (too_large_for_fp16, "a.jpg', got NaN or infinity in torch.float16"),
    "labels out of range": (wrong_label, "1154 are 7, the first at x 0, y 0"),
    "no pixels": (lambda folder: collected(folder, pixels=0), "expected 1 or more pixels of each image, got 0"),
    "no images": (lambda folder: collected(folder, images=0), "expected 1 or more images, got 0"),
    "a dtype": (lambda folder: collected(folder, dtype=torch.bfloat16), "got torch.bfloat16"),
    "other counts": (lambda folder: collected(folder, class_counts=[1, 2]), "the model's 5 classes, got 2"),
    "nothing but ignored pixels": (
        lambda folder: collected(folder, data=dataset(folder, indices=[4])),
        "expected rows to learn from, got none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, folder):
    attempt, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        attempt(folder)


ON_A_GPU = """
register_all_modules(init_default_scope=True)
model = calibrated_model()
alone = collected(folder, model)
features = collected(folder, model.cuda())
assert {getattr(features, name).device.type for name in ARRAYS} == {"cpu"}
assert torch.equal(features.y, alone.y) and torch.equal(features.bilinear, alone.bilinear)
torch.testing.assert_close(features.x, alone.x, rtol=0.02, atol=0.02)
assert features.provenance["trunk"] == alone.provenance["trunk"]
"""


@pytest.mark.gpu
def test_a_model_on_a_gpu(folder, gpu_environment):
    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1]), *sys.path]!r}\n"
    program += f"from seg.test_collect import *\nfolder = Path({str(folder)!r})\n{ON_A_GPU}"
    done = subprocess.run([sys.executable, "-c", program], env=gpu_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
