"""One pass over a training set: which RoIs it keeps, and with which weights."""

import itertools
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

detectron2 = pytest.importorskip("detectron2")

import numpy as np
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.events import EventStorage

from disalign import Features, InputError
from disalign.freezing import fingerprints
from disalign.sampling import seed_of
from disalign_d2 import build_model
from disalign_d2 import collect as collecting
from disalign_d2.collect import collect_features
from disalign_d2.datasets import register_from_config

from . import runs
from .annotations import unique
from .models import COUNTS, lively, tiny_cfg

BACKGROUND = len(COUNTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


def config(data, *options, **kind):
    cfg = tiny_cfg(*options, calibrate=True, **kind)
    cfg.DATASETS.OWN = [data["train"]]
    cfg.DATASETS.TRAIN = (data["train"][0],)
    register_from_config(cfg)
    return cfg


def detector(cfg, seed=0):
    torch.manual_seed(seed)
    return lively(build_model(cfg)).eval()


@pytest.fixture(scope="module")
def cfg(data):
    return config(data)


@pytest.fixture(scope="module")
def model(cfg):
    return detector(cfg)


def collected(model, cfg, **options):
    (features,) = collect_features(model, cfg, **{"dtype": torch.float32, "batch_size": 1, **options})
    return features


def sampled_rois(model, cfg, image):
    """Features and labels of an image's sampled RoIs, by Detectron2's parts one after another."""
    record = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[image]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format=cfg.INPUT.FORMAT)
    inputs = [mapper(record)]
    targets = [inputs[0]["instances"]]
    model.roi_heads.train()
    model.proposal_generator.train()
    torch.manual_seed(seed_of(0, image))
    with torch.no_grad(), EventStorage():
        images = model.preprocess_image(inputs)
        maps = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, maps, targets)
        (rois,) = model.roi_heads.label_and_sample_proposals(proposals, targets)
        model.eval()
        pooled = model.roi_heads.box_pooler(
            [maps[name] for name in model.roi_heads.box_in_features], [rois.proposal_boxes]
        )
        return model.roi_heads.box_head(pooled), rois.gt_classes


def rows_of(features, image):
    chosen = features.groups == image
    return features.x[chosen], features.y[chosen], features.weights[chosen]


@pytest.mark.parametrize("image", [0, 5])
def test_all_foreground_rois_and_a_few_of_the_background(image, model, cfg):
    x, y, weights = rows_of(collected(model, cfg, background=4), image)
    rois, labels = sampled_rois(model, cfg, image)
    foreground = labels != BACKGROUND
    others = rois[~foreground]
    assert len(others) > 4
    assert foreground.any()
    torch.testing.assert_close(x[y != BACKGROUND], rois[foreground])
    assert y[y != BACKGROUND].tolist() == labels[foreground].tolist()
    assert weights[y != BACKGROUND].tolist() == [1] * int(foreground.sum())
    kept = x[y == BACKGROUND]
    assert len(kept) == 4
    assert torch.cdist(kept, others).min(1).values.max() < 1e-4
    assert weights[y == BACKGROUND].tolist() == [len(others) / 4] * 4


def test_with_room_for_all_of_the_background_its_weight_is_one(model, cfg):
    features = collected(model, cfg, background=1000)
    rois, labels = sampled_rois(model, cfg, 3)
    x, y, weights = rows_of(features, 3)
    assert sorted(y.tolist()) == sorted(labels.tolist())
    torch.testing.assert_close(x.sum(0), rois.sum(0))
    assert set(weights.tolist()) == {1.0}
    assert features.background
    assert features.class_counts.tolist() == [12, 7, 3, 2, 2]


@pytest.mark.parametrize("kept", [1, 2, 3, 9])
def test_weighted_sums_over_what_is_kept_are_unbiased(kept):
    """Over all orders that may be drawn the mean is the sum over all RoIs, in value and gradient."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 3).double(), torch.tensor([0, 5, 5, 2, 5, 5, 1])
    weight = torch.randn(3).double().requires_grad_()

    def loss(x, y, weights):
        value = (weights * ((x @ weight).tanh() * (y + 1))).sum()
        return torch.stack([value.detach(), *torch.autograd.grad(value, weight)[0]])

    sums = []
    for order in itertools.permutations(range(4)):
        with mock.patch.object(torch, "randperm", lambda _, order=order: torch.tensor(order)):
            rows = collecting._thinned(x, y, BACKGROUND, kept)
        sums.append(loss(*rows))
    torch.testing.assert_close(torch.stack(sums).mean(0), loss(x, y, torch.ones(7)))


def test_images_are_seen_once_and_rows_depend_on_nothing_but_the_seed(model, cfg):
    first = collected(model, cfg)
    torch.manual_seed(77)
    again, other = collected(model, cfg), collected(model, cfg, seed=1)
    assert sorted(set(first.groups.tolist())) == [*range(12)]
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("size", [3, 8])
def test_images_in_batches(size, model, cfg, monkeypatch):
    """All are of one size here, so that only the draws differ: what is foreground by its ground truth is the same."""
    monkeypatch.setattr(collecting, "BLOCK", 4)
    batches = []
    hook = model.backbone.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    features = collected(model, cfg, batch_size=size, background=1000)
    hook.remove()
    assert batches == [3, 1] * 3 if size == 3 else [4] * 3
    alone = collected(model, cfg, background=1000)
    for image in range(12):
        x, y, _ = rows_of(features, image)
        x_alone, y_alone, _ = rows_of(alone, image)
        assert len(y) == len(y_alone)
        assert set(y.tolist()) == set(y_alone.tolist())
        nearest = torch.cdist(x[y != BACKGROUND], x_alone[y_alone != BACKGROUND]).min(1).values
        assert nearest.min() < 1e-4


def test_the_model_stays_as_it_was(model, cfg):
    model.roi_heads.train(False)
    before, modes = fingerprints(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    collected(model, cfg)
    assert torch.equal(state, torch.get_rng_state())
    assert before == fingerprints(model.state_dict())
    assert modes == [module.training for module in model.modules()]
    assert model.roi_heads.mask_on
    (predictor,) = model.roi_heads.box_predictors()
    assert "losses" not in vars(predictor)
    assert not predictor.cls_score.calibration._forward_pre_hooks


def test_a_cascade_has_rows_for_each_stage(data):
    cfg = config(data, cascade=True)
    model = detector(cfg)
    stages = [*collect_features(model, cfg, background=3, dtype=torch.float32, batch_size=1)]
    assert len(stages) == 3
    rois, labels = sampled_rois_of_a_cascade(model, cfg, 2)
    for stage, features in enumerate(stages):
        assert {group % 3 for group in features.groups.tolist()} == {stage}
        x, y, weights = rows_of(features, 2 * 3 + stage)
        foreground = labels[stage] != BACKGROUND
        torch.testing.assert_close(x[y != BACKGROUND], rois[stage][foreground])
        assert float(weights.sum()) == pytest.approx(len(labels[stage]))


def sampled_rois_of_a_cascade(model, cfg, image):
    """What the heads and predictors of a training step are called with."""
    heads, seen, labels = model.roi_heads, [], []
    with (
        mock.patch.multiple(heads.box_predictor[0], losses=lambda _, rois: labels.append(rois[0].gt_classes) or {}),
        mock.patch.multiple(heads.box_predictor[1], losses=lambda _, rois: labels.append(rois[0].gt_classes) or {}),
        mock.patch.multiple(heads.box_predictor[2], losses=lambda _, rois: labels.append(rois[0].gt_classes) or {}),
    ):
        hooks = [head.register_forward_hook(lambda _, inputs, output: seen.append(output)) for head in heads.box_head]
        record = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[image]
        mapper = DatasetMapper(is_train=True, augmentations=[], image_format=cfg.INPUT.FORMAT)
        model.train()
        torch.manual_seed(seed_of(0, image))
        with torch.no_grad(), EventStorage():
            model([mapper(record)])
        model.eval()
        for hook in hooks:
            hook.remove()
    return seen, labels


def test_an_interrupted_pass_goes_on(model, cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "BLOCK", 4)
    whole = collected(model, cfg)
    read, call, most = [], collecting.CheckedMapper.__call__, [6]

    def watched(self, record):
        if len(read) == most[0]:
            raise KeyboardInterrupt
        read.append(record["image_id"])
        return call(self, record)

    monkeypatch.setattr(collecting.CheckedMapper, "__call__", watched)
    with pytest.raises(KeyboardInterrupt):
        collected(model, cfg, out=tmp_path)
    most[0] = 100
    features = collected(model, cfg, out=tmp_path)
    assert read[6:] == [*range(5, 13)]
    for name in ("x", "y", "weights", "groups", "class_counts"):
        assert torch.equal(getattr(features, name), getattr(whole, name)), name
    read.clear()
    assert torch.equal(collected(model, cfg, out=tmp_path).x, whole.x)
    assert not read
    (tmp_path / "x.npy").write_bytes(b"mine")
    assert torch.equal(collected(model, cfg, out=tmp_path).x, whole.x)


OTHERS = {
    "trunk": lambda cfg, data: (detector(cfg, 1), cfg, {}),
    "sample": lambda cfg, data: (None, cfg, {"background": 5}),
    "sample of images": lambda cfg, data: (None, cfg, {"images": 6}),
    "data by proposals": lambda cfg, data: (None, config(data, "MODEL.RPN.NMS_THRESH", 0.5), {}),
    "data by size": lambda cfg, data: (None, config(data, "INPUT.MIN_SIZE_TEST", 60), {}),
    "arrays": lambda cfg, data: (None, cfg, {"dtype": torch.float16}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_rows_of_others_are_refused(what, model, cfg, data, tmp_path):
    collected(model, cfg, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other, settings, options = OTHERS[what](cfg, data)
    with pytest.raises(InputError, match=f"some of another .*{what.split()[0]}"):
        collected(other or model, settings, out=tmp_path, **options)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_settings_of_the_evaluation_ask_for_no_new_pass(model, cfg, data, tmp_path):
    first = collected(model, cfg, out=tmp_path)
    others = config(data, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5, "MODEL.RPN.PRE_NMS_TOPK_TEST", 7)
    assert torch.equal(collected(model, others, out=tmp_path, images=12).x, first.x)


def test_counts_are_those_of_the_call(model, cfg, tmp_path):
    first = collected(model, cfg, out=tmp_path)
    other = detector(cfg)
    other.load_state_dict(model.state_dict())
    other.roi_heads.box_predictor.class_counts = [9, 8, 7, 6, 5]
    again = collected(other, cfg, out=tmp_path)
    assert torch.equal(again.x, first.x)
    assert again.class_counts.tolist() == [9, 8, 7, 6, 5]


def test_images_of_several_roots_and_without_annotations(cfg):
    record = {"file_name": "a/b.png", "annotations": []}
    here = collecting._describe([record, {"file_name": "/c/d.png", "annotations": []}], cfg)
    assert here != collecting._describe([record, {"file_name": "s3://c/d.png", "annotations": []}], cfg)


def test_proposals_of_a_file_are_a_part_of_the_data(cfg):
    def described(boxes):
        return collecting._describe([{"file_name": "a.png", "annotations": [], "proposal_boxes": boxes}], cfg)

    assert described(np.zeros((2, 4))) == described(np.zeros((2, 4)))
    assert described(np.zeros((2, 4))) != described(np.ones((2, 4)))


def test_a_model_that_is_not_frozen_is_refused(cfg):
    model = detector(cfg)
    model.backbone.train = lambda mode=True: model.backbone
    model.backbone.bottom_up.stem.norm = torch.nn.BatchNorm2d(8).train()
    with pytest.raises(InputError, match="expected a frozen model, got one whose BatchNorm trains"):
        collected(model, cfg)


def test_a_moved_set_is_the_same_one(model, cfg, data, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in Path(data["train"][2]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    moved = config({"train": [unique("moved"), str(folder / "annotations.json"), str(folder)]})
    first = collected(model, cfg, out=tmp_path / "rows")
    assert torch.equal(collected(model, moved, out=tmp_path / "rows").x, first.x)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes() + b" ")
    with pytest.raises(InputError, match="some of another data"):
        collected(model, moved, out=tmp_path / "rows")


def test_a_part_of_the_images_and_its_weights(model, data):
    cfg = config(data, "DATALOADER.REPEAT_THRESHOLD", 0.5)
    whole = collected(model, cfg)
    part = collected(model, cfg, images=5)
    images = sorted(set(part.groups.tolist()))
    assert len(images) == 5
    # Of 12 images class 0 is in all, 1 in 6, and 2, 3, 4 in 2 or 3 each; r by hand.
    shown = [{0, number % 2, number % 5} for number in range(1, 13)]
    share = {label: sum(label in one for one in shown) / 12 for label in range(5)}
    factors = np.array([max(max(1, (0.5 / share[label]) ** 0.5) for label in one) for one in shown])
    probabilities = 5 * factors / factors.sum()
    assert probabilities.max() < 1
    for image in images:
        x, _, weights = rows_of(part, image)
        x_of_all, _, weights_of_all = rows_of(whole, image)
        assert torch.equal(x, x_of_all)
        torch.testing.assert_close(weights, weights_of_all / probabilities[image])


def test_features_are_half_precision_and_a_row_takes_d_numbers(model, cfg, tmp_path):
    (features,) = collect_features(model, cfg, out=tmp_path)
    assert features.x.dtype == torch.float16
    assert features.x.shape == (len(features), 16)
    assert (tmp_path / "x.npy").stat().st_size < len(features) * 16 * 2 + 200


def test_mixed_precision_is_the_configs(model, data):
    cfg = config(data, "SOLVER.AMP.ENABLED", True)
    seen = []
    hook = model.backbone.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    collected(model, cfg, images=1)
    hook.remove()
    assert seen == [True]


REFUSED = {
    "no background": ({"background": 0}, "expected 1 or more RoIs of the background"),
    "no batch": ({"batch_size": 0}, "expected 1 or more RoIs of the background, and images in a batch, got 16 and 0"),
    "no images": ({"images": 0}, "expected 1 or more images of the training set, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, model, cfg):
    options, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence):
        collected(model, cfg, **options)


def test_features_that_are_not_finite_name_their_image(cfg, data):
    broken = detector(cfg)
    with torch.no_grad():
        broken.roi_heads.box_head.fc1.bias[0] = float("inf")
    with pytest.raises(InputError, match=r"expected finite numbers as features of images, but .*1\.png"):
        collected(broken, cfg)


def rank_of_two(rank, folder, entry):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    collecting.BLOCK = 4
    cfg = config({"train": entry})
    model = detector(cfg)
    in_memory, in_folder = collected(model, cfg), collected(model, cfg, out=f"{folder}/rows")
    assert torch.equal(in_memory.x, in_folder.x)
    torch.save((in_memory.x, in_memory.y, in_memory.weights), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_share_the_images_and_get_all(model, cfg, data, tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path), data["train"]), nprocs=2)
    alone = collected(detector(cfg), cfg)
    for rank in (0, 1):
        x, y, weights = torch.load(tmp_path / str(rank))
        torch.testing.assert_close(x, alone.x)
        assert torch.equal(y, alone.y)
        assert torch.equal(weights, alone.weights)
    assert len(Features.open(tmp_path / "rows")) == len(alone)
