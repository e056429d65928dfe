"""Stage one beside stage two: at the identity, in a run of mmengine's, in two processes."""

import json
import logging
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import torch
import torch.distributed as dist
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner, ValLoop
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from disalign import AdaptiveCalibration, at_identity
from disalign.report import table
from disalign_mmseg.comparison import ComparisonHook, evaluate
from disalign_mmseg.metrics import LongTailIoUMetric

K = 4
NUMBERS = count()
IMAGES = 5
METRIC = dict(type="LongTailIoUMetric", class_counts=[900, 80, 15, 5], groups=dict(head=0.05, tail=0.01))
GROUPS = {"head": [0, 1], "body": [2], "tail": [3]}
FIGURES = ["mIoU", "mAcc", "aAcc", *(f"{mean}.{group}" for mean in ("mIoU", "mAcc") for group in GROUPS)]


class Toy(BaseModel):
    """A segmentor of two 1x1 convolutions, with or without a calibration that is far from the identity."""

    out_channels = K

    def __init__(self, calibrated=True):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Conv2d(3, 6, 1)
        self.conv_seg = nn.Conv2d(6, K, 1)
        self.requires_grad_(calibrated is False)
        self.calibration = None
        if calibrated:
            self.calibration = AdaptiveCalibration(K, 6, spatial=True)
            with torch.no_grad():
                self.calibration.magnitude.uniform_(0.2, 2)
                self.calibration.margin.normal_()
                self.calibration.confidence.weight.normal_()
        self.predicted, self.dtypes, self.modes = 0, [], []

    def forward(self, inputs, data_samples=None, mode="tensor"):
        features = self.backbone(torch.stack(list(inputs))).relu()
        scores = self.conv_seg(features)
        if mode == "predict":
            self.predicted += len(inputs)
            self.dtypes.append(scores.dtype)
            self.modes.append((self.training, torch.is_grad_enabled()))
        if self.calibration is not None:
            scores = self.calibration(scores, features)
        if mode == "tensor":
            return scores
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in data_samples])
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, labels, ignore_index=255)}
        for sample, of_image in zip(data_samples, scores.float(), strict=True):
            sample.seg_logits = PixelData(data=of_image)
            sample.pred_sem_seg = PixelData(data=of_image.argmax(0, keepdim=True))
        return data_samples


class Toys(Dataset):
    """Images whose labels a linear rule gives, noisily; some pixels are ignored. ``flipped``: two views of each."""

    metainfo = {"classes": ("road", "car", "sign", "rider")}

    def __init__(self, number=IMAGES, flipped=False):
        self.number, self.flipped = number, flipped

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 9, 11, generator=generator)
        label = (image.sum(0) + torch.randn(9, 11, generator=generator)).clamp(-1, 2).round().long() + 1
        label[torch.rand(9, 11, generator=generator) < 0.2] = 255
        sample = SegDataSample(metainfo={"img_path": f"{index}.png"}, gt_sem_seg=PixelData(data=label[None]))
        if not self.flipped:
            return {"inputs": image, "data_samples": sample}
        return {"inputs": [image, image * 0.5], "data_samples": [sample, sample.clone()]}


def scores_of(model, images, calibrated):
    """The toy's scores, each image by itself."""
    features = model.backbone(images).relu()
    scores = model.conv_seg(features)
    return model.calibration(scores, features) if calibrated else scores


def by_hand(model, calibrated, flipped=False):
    """All figures in percent, pixel by pixel, without the metric's or the comparison's code."""
    confusion = np.zeros((K, K))
    dataset = Toys()
    for index in range(len(dataset)):
        sample = dataset[index]
        with torch.no_grad():
            scores = scores_of(model, sample["inputs"][None], calibrated)
            if flipped:
                other = scores_of(model, 0.5 * sample["inputs"][None], calibrated)
                scores = (scores.softmax(1) + other.softmax(1)) / 2
        label = sample["data_samples"].gt_sem_seg.data[0]
        for predicted, true in zip(scores[0].argmax(0).flatten().tolist(), label.flatten().tolist(), strict=True):
            if true != 255:
                confusion[true, predicted] += 1
    hits = np.diag(confusion)
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)
    acc = 100 * hits / confusion.sum(1)
    figures = {"mIoU": iou.mean(), "mAcc": acc.mean(), "aAcc": 100 * hits.sum() / confusion.sum()}
    for name, values in (("mIoU", iou), ("mAcc", acc)):
        figures |= {f"{name}.{group}": values[members].mean() for group, members in GROUPS.items()}
    return figures


def loader(**dataset):
    return dict(
        batch_size=2,
        num_workers=0,
        dataset=Toys(**dataset),
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )


def run_of(folder, model=None, metric=METRIC, hook=True, val_begin=1, fp16=False, flipped=False, **hook_options):
    """A Runner that trains for four iterations, validates after the second and the fourth, and can test."""
    parts = dict(val_dataloader=loader(), val_cfg=dict(fp16=fp16), val_evaluator=dict(metric)) if metric else {}
    test = dict(test_dataloader=loader(flipped=flipped), test_cfg=dict(), test_evaluator=dict(metric)) if metric else {}
    return Runner(
        model=model or Toy(),
        work_dir=str(folder),
        train_dataloader=loader() | dict(sampler=dict(type="InfiniteSampler", shuffle=False)),
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=2, val_begin=val_begin),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4)),
        custom_hooks=[dict(type="ComparisonHook", **hook_options)] if hook else [],
        default_scope="mmseg",
        randomness=dict(seed=0),
        experiment_name=f"comparison_{next(NUMBERS)}",
        **parts,
        **test,
    )


def written(folder, split="val"):
    path = folder / f"results_{split}.json"
    return json.loads(path.read_text(), parse_constant=pytest.fail) if path.exists() else None


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def identical(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def log_of(folder):
    return "\n".join(path.read_text() for path in folder.rglob("*.log"))


# -------------------------------------------------------------------------------------------------- at_identity


def wrapped(model, wrapper):
    if wrapper == "tta":
        return SegTTAModel(model)
    return MMDistributedDataParallel(model, broadcast_buffers=False) if wrapper == "ddp" else model


@pytest.mark.parametrize("wrapper", ["plain", "tta", "ddp"])
def test_at_the_identity_it_is_stage_one(wrapper, process_group):
    model, one = Toy(), Toy(calibrated=False)
    before, images = bits(model), torch.randn(2, 3, 9, 11)
    after = model(images)
    with at_identity(wrapped(model, wrapper)):
        assert torch.equal(model(images), one(images))
    assert identical(bits(model), before)
    assert torch.equal(model(images), after)
    assert not torch.equal(after, one(images))


def test_the_calibration_comes_back_after_an_exception():
    model = Toy()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), at_identity(model):
        raise KeyboardInterrupt
    assert identical(bits(model), before)


def test_a_part_that_is_left_out_needs_no_restoring():
    model, one = Toy(), Toy(calibrated=False)
    model.calibration = AdaptiveCalibration(K, 6, spatial=True, learn_margin=False, confidence="one")
    nn.init.constant_(model.calibration.magnitude, 0.5)
    images = torch.randn(2, 3, 9, 11)
    with at_identity(model):
        assert torch.equal(model(images), one(images))
    assert torch.equal(model.calibration.magnitude, torch.full((K,), 0.5))


# --------------------------------------------------------------------------------------------------------- table


def test_the_table_shows_both_stages_and_the_gain():
    before = dict(zip(FIGURES, [34.44, 45.0, 77.0, 60.0, 35.0, None, 70.0, 50.0, None], strict=True))
    after = dict(zip(FIGURES, [36.06, 44.0, 77.01, 60.0, 36.0, None, 70.5, 51.0, 9.0], strict=True))
    shown = table({"figures": after, "stage_one": {"figures": before}})
    header, _, *rows = (line.replace("stage one", "stage_one").split() for line in shown.splitlines())
    assert header == ["percent", *FIGURES]
    assert rows == [
        ["stage_one", "34.4", "45.0", "77.0", "60.0", "35.0", "n/a", "70.0", "50.0", "n/a"],
        ["DisAlign", "36.1", "44.0", "77.0", "60.0", "36.0", "n/a", "70.5", "51.0", "9.0"],
        ["gain", "+1.6", "-1.0", "+0.0", "+0.0", "+1.0", "n/a", "+0.5", "+1.0", "n/a"],
    ]


# ------------------------------------------------------------------------------------------------------ evaluate


def test_an_evaluation_leaves_model_metric_and_files_as_they_were(tmp_path):
    runner = run_of(tmp_path, metric=METRIC | dict(output_dir=str(tmp_path / "png")), hook=False)
    runner.val()
    model, (metric,) = runner.model, runner.val_loop.evaluator.metrics
    report, before = metric.report, bits(model)
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()}
    assert len(pictures) == IMAGES
    model.train()
    with at_identity(model):
        again = evaluate(runner, runner.val_loop)
    assert again["figures"] != report["figures"]
    assert metric.report is report
    assert metric.results == []
    assert metric.output_dir == str(tmp_path / "png")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()} == pictures
    assert set(model.modes) == {(False, False)}  # not training, and without gradients
    assert identical(bits(model), before)
    assert evaluate(runner, runner.val_loop) == report


# ---------------------------------------------------------------------------------------------------------- runs


def test_after_training_both_stages_are_written_and_printed(tmp_path):
    runner = run_of(tmp_path)
    runner.train()
    results = written(tmp_path)
    assert results["figures"] == pytest.approx(by_hand(runner.model, calibrated=True))
    assert results["stage_one"]["figures"] == pytest.approx(by_hand(runner.model, calibrated=False))
    assert results["figures"]["mIoU"] != results["stage_one"]["figures"]["mIoU"]
    assert (results["dataset"], results["split"], results["images"]) == ("Toys", "val", IMAGES)
    assert len(results["stage_one"]["per_class"]["IoU"]) == K
    # Two regular validations, and stage one's: the last validation is stage two's.
    assert runner.model.predicted == 3 * IMAGES
    (metric,) = runner.val_loop.evaluator.metrics
    assert list(metric.report["figures"]) == FIGURES
    assert table({**metric.report, "stage_one": results["stage_one"]}) in log_of(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".py") == sorted(
        ["iter_4.pth", "last_checkpoint", "results_val.json"]
    )


def test_it_does_not_disturb_the_run(tmp_path):
    with_hook, without = run_of(tmp_path / "a"), run_of(tmp_path / "b", hook=False)
    with_hook.train()
    without.train()
    assert identical(bits(with_hook.model), bits(without.model))
    assert not identical(bits(with_hook.model), bits(Toy()))
    assert written(tmp_path / "b") is None
    assert with_hook.message_hub.get_scalar("val/mIoU").current() == pytest.approx(
        written(tmp_path / "a")["figures"]["mIoU"], abs=0.0051
    )


def test_without_a_validation_at_the_end_stage_two_is_evaluated_too(tmp_path):
    runner = run_of(tmp_path, val_begin=100)
    runner.train()
    assert runner.model.predicted == 2 * IMAGES
    results = written(tmp_path)
    assert results["figures"] == pytest.approx(by_hand(runner.model, calibrated=True))
    assert results["stage_one"]["figures"] == pytest.approx(by_hand(runner.model, calibrated=False))


def test_a_validation_before_the_end_is_not_taken_for_the_last(tmp_path):
    runner = run_of(tmp_path)
    hook = next(hook for hook in runner.hooks if isinstance(hook, ComparisonHook))
    runner.train()
    hook._validated_at = 2
    with torch.no_grad():
        runner.model.calibration.margin[3] += 5
    runner.call_hook("after_train")
    assert written(tmp_path)["figures"] == pytest.approx(by_hand(runner.model, calibrated=True))


def test_autocast_is_the_loops(tmp_path):
    runner = run_of(tmp_path, fp16=True)
    runner.train()
    assert len(runner.model.dtypes) == 9
    assert set(runner.model.dtypes) == {torch.bfloat16}


def test_the_second_pass_can_be_switched_off(tmp_path):
    runner = run_of(tmp_path, stage_one=False)
    runner.train()
    assert runner.model.predicted == 2 * IMAGES
    results = written(tmp_path)
    assert results["figures"] == pytest.approx(by_hand(runner.model, calibrated=True))
    assert "stage_one" not in results


def test_a_stage_one_model_gets_its_own_figures_alone(tmp_path):
    runner = run_of(tmp_path, Toy(calibrated=False))
    runner.train()
    assert runner.model.predicted == 2 * IMAGES
    results = written(tmp_path)
    assert results["figures"] == pytest.approx(by_hand(runner.model, calibrated=False))
    assert "stage_one" not in results
    assert "DisAlign" not in log_of(tmp_path)


@pytest.mark.parametrize("metric", [dict(type="IoUMetric"), None], ids=["stock metric", "no validation"])
def test_without_our_metric_nothing_is_done(tmp_path, metric):
    runner = run_of(tmp_path, metric=metric)
    runner.train()
    assert written(tmp_path) is None
    assert runner.model.predicted == (2 * IMAGES if metric else 0)


def test_our_metric_is_found_beside_others(tmp_path):
    runner = run_of(tmp_path)
    ours = LongTailIoUMetric(**{name: value for name, value in METRIC.items() if name != "type"}, prefix="ours")
    runner.val_loop.evaluator.metrics[:] = [IoUMetric(), ours]
    runner.val_loop.evaluator.dataset_meta = Toys.metainfo
    runner.train()
    assert written(tmp_path)["figures"] == pytest.approx(by_hand(runner.model, calibrated=True))


def test_after_testing_both_stages_are_written(tmp_path):
    runner = run_of(tmp_path)
    runner.test()
    results = written(tmp_path, "test")
    assert results["figures"] == pytest.approx(by_hand(runner.model, calibrated=True))
    assert results["stage_one"]["figures"] == pytest.approx(by_hand(runner.model, calibrated=False))
    assert results["split"] == "test"
    assert runner.model.predicted == 2 * IMAGES
    assert written(tmp_path) is None


def test_with_augmentation_both_stages_are_augmented(tmp_path):
    toy = Toy()
    runner = run_of(tmp_path, SegTTAModel(toy), flipped=True)
    runner.test()
    results = written(tmp_path, "test_tta")
    assert results["tta"] is True
    assert written(tmp_path, "test") is None
    for calibrated, stage in ((True, results), (False, results["stage_one"])):
        assert stage["figures"] == pytest.approx(by_hand(toy, calibrated, flipped=True))
    assert by_hand(toy, True, flipped=True) != by_hand(toy, True)


def test_predictions_without_ground_truth_have_no_comparison(tmp_path):
    runner = run_of(tmp_path, metric=METRIC | dict(format_only=True, output_dir=str(tmp_path / "png")))
    runner.test()
    assert written(tmp_path, "test") is None
    assert len(list((tmp_path / "png").iterdir())) == IMAGES
    prediction = np.asarray(Image.open(tmp_path / "png" / "0.png"))
    with torch.no_grad():
        expected = scores_of(runner.model, Toys()[0]["inputs"][None], calibrated=True)[0].argmax(0)
    assert np.array_equal(prediction, expected)


# ------------------------------------------------------------------------------------------------- two processes


def compare_in(rank, folder):
    """One of two processes: compares on its half of the images, and says what it kept."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    metric = LongTailIoUMetric(**{name: value for name, value in METRIC.items() if name != "type"})
    metric.collect_dir = str(folder / "collect")
    model = MMDistributedDataParallel(Toy(), broadcast_buffers=False)
    runner = SimpleNamespace(
        model=model,
        logger=MMLogger.get_instance("compare", log_level=logging.ERROR),
        work_dir=str(folder / f"rank{rank}"),
        visualizer=SimpleNamespace(),
        iter=4,
    )
    data = Toys()
    images = DataLoader(data, batch_size=2, sampler=DefaultSampler(data, shuffle=False), collate_fn=pseudo_collate)
    runner.val_loop = ValLoop(runner, images, Evaluator(metric))
    before = bits(model)
    ComparisonHook().after_train(runner)
    assert identical(bits(model), before)
    assert model.module.predicted == 6  # three of the five images, one of them twice, and each for both stages
    dist.destroy_process_group()


def test_two_processes_compare_as_one_does(tmp_path):
    # Forked, as the imports take long; no gradient is needed, which a fork could not compute.
    torch.multiprocessing.start_processes(compare_in, (tmp_path,), nprocs=2, start_method="fork")
    results = written(tmp_path / "rank0")
    model = Toy()
    assert results["images"] == IMAGES
    assert results["figures"] == pytest.approx(by_hand(model, calibrated=True))
    assert results["stage_one"]["figures"] == pytest.approx(by_hand(model, calibrated=False))
    assert not (tmp_path / "rank1").exists()
