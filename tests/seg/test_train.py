"""Whole runs of stage two: frozen tensors, results, resume, two processes, mixed precision, ignored pixels."""

import copy
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS, MODELS
from PIL import Image

import disalign_mmengine.hooks
from disalign import load_class_counts
from disalign.freezing import fingerprints
from disalign_mmengine.cli import load_config

from .runs import CALIBRATION, evaluate, left_behind, load, log, train

LAST = "iter_4.pth"
MAGNITUDE, MARGIN = "decode_head.calibration.magnitude", "decode_head.calibration.margin"


def report(folder, split="val"):
    return json.loads((folder / f"results_{split}.json").read_text())


def same(a, b):
    """Bit for bit the same tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ----------------------------------------------------------------------------------------------------- one run


def test_frozen_tensors_are_bit_identical_after_training_and_validation(stage_one, stage_two):
    one, two = torch.load(stage_one, weights_only=False)["state_dict"], load(stage_two)["state_dict"]
    one = {name: tensor for name, tensor in one.items() if not name.startswith("auxiliary_head.")}
    assert any("running_var" in name for name in one)
    assert two.keys() - one.keys() == CALIBRATION
    assert fingerprints({name: two[name] for name in one}) == fingerprints(one)
    assert not torch.equal(two[MAGNITUDE], torch.ones(150))
    assert two[MARGIN].any()
    assert two["decode_head.calibration.confidence.weight"].any()


def test_the_log_says_what_was_loaded_trains_and_stayed(stage_two):
    text, tensors = log(stage_two.parent), len(load(stage_two)["state_dict"].keys() - CALIBRATION)
    assert f"iter_8.pth: loaded {tensors} of {tensors} frozen tensors; new, starting at the identity: " in text
    assert "not needed: auxiliary_head." in text
    assert "317 numbers train (decode_head.calibration.magnitude [150]" in text  # 2 * 150 + 16 + 1
    # The preprocessor's mean and standard deviation are frozen too, and in no checkpoint.
    assert f"{tensors + 2} of {tensors + 2} frozen tensors are bit-identical to what this run started from" in text
    assert "decode.confidence_mean: " in text
    assert "aux." not in text.partition("Iter(train)")[2]
    assert "before and after" in text


@pytest.mark.parametrize(
    "tensor", ["backbone.layer1.0.conv1.weight", "backbone.layer1.0.bn1.running_mean", "data_preprocessor.mean"]
)
def test_a_frozen_tensor_that_changes_is_found_at_the_end(tensor, configs, stage_one, tmp_path, monkeypatch):
    def meddle(self, runner, *_, **__):
        model = runner.model
        (dict(model.named_parameters()) | dict(model.named_buffers()))[tensor].data.view(-1)[0] += 1e-3

    monkeypatch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "after_train_iter", meddle)
    options = [f"stage_one={stage_one}", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    with pytest.raises(RuntimeError, match=rf"frozen tensors to stay bit-identical, but changed: {tensor}"):
        train(configs.two, tmp_path, *options, iterations=1)


def test_a_checkpoint_is_plain_and_keeps_counts_and_rho(stage_two):
    kept = load(stage_two)["meta"]["disalign"]
    assert kept.pop("class_counts") == load_class_counts("ade20k").tolist()
    assert kept == {
        "rho": 0.2,
        "normalize": "mean",
        "zero_count": "error",
        "reduction": "mean",
        "ignore_index": 255,
        "sync": True,
        "background_weight": None,
        "loss_weight": 1.0,
        "avg_non_ignore": False,
        "upsample": "fused",
        "sampled_pixels": None,
        "total_pixels": None,
    }


def test_stage_ones_figures_beside_stage_twos_are_those_of_stage_ones_own_run(configs, stage_one, stage_two, tmp_path):
    evaluator = ["test_evaluator.type=LongTailIoUMetric", "test_evaluator.class_counts=ade20k"]
    hook = "default_hooks.comparison.type=ComparisonHook"
    assert evaluate(configs.one, stage_one, tmp_path, *evaluator, hook) == 0
    one, two = report(tmp_path, "test"), report(stage_two.parent)
    assert "stage_one" not in one
    assert two["stage_one"] == {"figures": one["figures"], "per_class": one["per_class"]}
    assert two["figures"] != two["stage_one"]["figures"]
    assert (two["split"], two["images"], len(two["per_class"]["IoU"])) == ("val", 8, 150)
    assert two["groups"]["classes"] == {"head": 20, "body": 55, "tail": 75}


# ------------------------------------------------------------------------------------------- mim, and test-time views


def mim(*arguments):
    """The command ``mim`` that stands beside this interpreter."""
    command = [os.path.join(os.path.dirname(sys.executable), "mim"), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_mim_train_does_what_our_command_does(configs, stage_one, stage_two, tmp_path):
    done = mim("train", "mmseg", configs.two, "--work-dir", tmp_path, "--cfg-options", f"load_from={stage_one}")
    assert done.returncode == 0, done.stdout
    for part in ("state_dict", "optimizer"):
        assert same(load(tmp_path / LAST)[part], load(stage_two)[part]), part
    assert report(tmp_path) == report(stage_two.parent)
    assert "frozen tensors are bit-identical to what this run started from" in log(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--tta"]], ids=["plain", "tta"])
def test_mim_test_does_what_our_command_does(flags, configs, stage_two, tmp_path):
    theirs, ours = tmp_path / "mim", tmp_path / "ours"
    png = tmp_path / "png"
    done = mim("test", "mmseg", configs.two, "-C", stage_two, "--work-dir", theirs, "--out", png, *flags)
    assert done.returncode == 0, done.stdout
    assert len(list(png.iterdir())) == 8
    assert evaluate(configs.two, stage_two, ours, flags=flags) == 0
    split = "test_tta" if flags else "test"
    assert report(theirs, split) == report(ours, split)
    assert report(ours, split)["tta"] is bool(flags)


def test_testing_repeats_the_last_validation(configs, stage_two, tmp_path):
    assert evaluate(configs.two, stage_two, tmp_path) == 0
    expected = report(stage_two.parent) | {"split": "test", "checkpoint": str(stage_two)}
    assert report(tmp_path, "test") == expected


def test_test_time_augmentation_evaluates_the_checkpoints_calibration(configs, stage_two, tmp_path, monkeypatch):
    seen = {}
    after_test = disalign_mmengine.hooks.PlainCheckpointHook.after_test

    def look(self, runner):
        seen.update(type=type(runner.model).__name__, state_dict=copy.deepcopy(runner.model.module.state_dict()))
        after_test(self, runner)

    monkeypatch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "after_test", look)
    assert evaluate(configs.two, stage_two, tmp_path, flags=["--tta"]) == 0
    assert seen["type"] == "SegTTAModel"
    assert same(dict(seen["state_dict"]), dict(load(stage_two)["state_dict"]))
    views, plain = report(tmp_path, "test_tta"), report(stage_two.parent)
    # Both stages see the views; neither is the plain test's.
    assert views["per_class"] != views["stage_one"]["per_class"]
    assert views["per_class"] != plain["per_class"]
    assert views["stage_one"]["per_class"] != plain["stage_one"]["per_class"]


# ------------------------------------------------------------------------------------------------------ resume


def interrupted(patch, how, after):
    """Stop a run after so many iterations."""

    def stop(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == after:
            how()

    patch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "after_train_iter", stop)


def forked(target, *arguments):
    """A process with this one's modules; a fresh interpreter would spend most of its time importing them."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def killed(config, folder, stage_one):
    interrupted(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL), after=3)
    train(config, folder, f"stage_one={stage_one}")


@pytest.fixture(scope="module")
def uninterrupted(configs, stage_one, tmp_path_factory):
    """The folder of a run without random augmentation."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(configs.plain, folder, f"stage_one={stage_one}") == 0
    return folder


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_uninterrupted_runs_end_bit_for_bit(configs, stage_one, uninterrupted, tmp_path):
    process = forked(killed, configs.plain, tmp_path, stage_one)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "iter_2.pth").exists()
    assert not (tmp_path / LAST).exists()

    # Through mim; load_from still names stage one, as it does in a config.
    options = ["--work-dir", tmp_path, "--resume", "--cfg-options", f"load_from={stage_one}"]
    done = mim("train", "mmseg", configs.plain, *options)
    assert done.returncode == 0, done.stdout
    resumed, whole = load(tmp_path / LAST), load(uninterrupted / LAST)
    for part in ("state_dict", "optimizer", "param_schedulers"):
        assert same(resumed[part], whole[part]), part
    assert resumed["optimizer"]["state"]
    assert resumed["meta"]["iter"] == 4
    assert report(tmp_path) == report(uninterrupted)


class StoppedError(Exception):
    pass


def stopped():
    raise StoppedError


def test_resuming_restores_the_checkpoint_bit_for_bit_and_completes(configs, stage_one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, stopped, after=3)
        with pytest.raises(StoppedError):
            train(configs.two, tmp_path, f"stage_one={stage_one}")
    checkpoint = load(tmp_path / "iter_2.pth")
    restored = {}

    def look(self, runner):
        restored.update(
            state_dict=copy.deepcopy(dict(runner.model.state_dict())),
            optimizer=copy.deepcopy(runner.optim_wrapper.state_dict()),
            param_schedulers=[copy.deepcopy(scheduler.state_dict()) for scheduler in runner.param_schedulers],
            iteration=runner.iter,
        )

    monkeypatch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "before_train_epoch", look)
    # The stage-one file is no longer needed.
    assert train(configs.two, tmp_path, "load_from=gone.pth", flags=["--resume"]) == 0
    assert restored.pop("iteration") == checkpoint["meta"]["iter"] == 2
    for part, state in restored.items():
        assert same(state, dict(checkpoint[part]) if part == "state_dict" else checkpoint[part]), part
    one, end = torch.load(stage_one, weights_only=False)["state_dict"], load(tmp_path / LAST)["state_dict"]
    assert all(torch.equal(tensor, one[name]) for name, tensor in end.items() if name not in CALIBRATION)
    assert not torch.equal(end[MAGNITUDE], checkpoint["state_dict"][MAGNITUDE])


def test_resuming_a_finished_run_changes_nothing(configs, uninterrupted, capfd):
    before = report(uninterrupted), (uninterrupted / LAST).read_bytes()
    assert train(configs.plain, uninterrupted, flags=["--resume"]) == 0
    assert (report(uninterrupted), (uninterrupted / LAST).read_bytes()) == before


def test_other_class_counts_are_refused_on_resume(configs, uninterrupted, capfd):
    counts = f"model.decode_head.loss_decode.class_counts={[*range(1, 151)]}".replace(" ", "")
    assert train(configs.plain, uninterrupted, counts, iterations=5, flags=["--resume"]) == 2
    assert "error: expected the class counts that this run was started with, got others" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------- processes


def rank(number, port, errors, config, folder, stage_one):
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    options = [f"stage_one={stage_one}", "train_dataloader.batch_size=2", "experiment_name=two_ranks"]
    with open(errors, "w") as sys.stderr:
        sys.exit(train(config, folder, *options, flags=["--launcher", "pytorch"]))


def launch(*arguments):
    """What torchrun does on one machine, less its agent; exit codes and what the ranks said on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = arguments[1]
    folder.mkdir()
    errors = [folder / f"errors{number}" for number in range(2)]
    started = [forked(rank, number, port, file, *arguments) for number, file in enumerate(errors)]
    for process in started:
        process.join(300)
    return [process.exitcode for process in started], [file.read_text() for file in errors]


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(configs, stage_one, uninterrupted, tmp_path):
    codes, errors = launch(configs.plain, tmp_path / "together", stage_one)
    assert codes == [0, 0], errors
    alone, together = load(uninterrupted / LAST)["state_dict"], load(tmp_path / "together" / LAST)["state_dict"]
    assert together.keys() == alone.keys()
    for name in CALIBRATION:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-5)
    assert all(torch.equal(together[name], alone[name]) for name in alone.keys() - CALIBRATION)
    # The evaluation is shared out too, and put together again.
    assert report(tmp_path / "together")["images"] == 8
    assert report(tmp_path / "together")["stage_one"] == report(uninterrupted)["stage_one"]


@pytest.mark.slow
def test_both_processes_refuse_bad_input_in_one_sentence(configs, stage_two, tmp_path):
    codes, errors = launch(configs.plain, tmp_path / "together", stage_two)
    assert codes == [2, 2]
    for error in errors:
        assert error.count("error: expected a stage-one checkpoint") == 1
        assert "Traceback" not in error


# -------------------------------------------------------------------------------------------------- class counts


def test_counts_of_the_dataset_reach_the_loss_the_metric_and_the_checkpoint(configs, ade, stage_one, tmp_path):
    labels = [np.asarray(Image.open(path)) for path in sorted((ade / "annotations" / "training").iterdir())]
    counts = sum(np.bincount(label.ravel(), minlength=151) for label in labels)[1:].tolist()
    pixels = sum(label.size for label in labels)
    evaluator = [f"{part}_evaluator.{key}" for part in ("val", "test") for key in ("class_counts=None", "groups=None")]
    options = [f"stage_one={stage_one}", "model.decode_head.loss_decode.class_counts=dataset", *evaluator]
    assert train(configs.two, tmp_path, *options, iterations=2) == 0

    kept = load(tmp_path / "iter_2.pth")["meta"]["disalign"]
    assert (kept["class_counts"], kept["total_pixels"]) == (counts, pixels)
    cache = json.loads((tmp_path / "class_counts.json").read_text())
    assert (cache["train_counts"], cache["total_pixels"]) == (counts, pixels)
    shares = np.array(counts) / pixels
    sizes = {"head": (shares > 0.01).sum(), "tail": (shares <= 0.001).sum()}
    sizes["body"] = 150 - sum(sizes.values())
    results = report(tmp_path)
    assert (results["class_counts"], results["total_pixels"]) == (counts, pixels)
    assert results["groups"]["classes"] == sizes
    # A test of that checkpoint takes them from it, without the training set.
    options = [*options[1:], "train_dataloader=None", "train_cfg=None", "optim_wrapper=None"]
    options += ["param_scheduler=None", "auto_scale_lr=None"]
    assert evaluate(configs.two, tmp_path / "iter_2.pth", tmp_path / "test", *options) == 0
    assert report(tmp_path / "test", "test") == results | {"split": "test", "checkpoint": str(tmp_path / "iter_2.pth")}


# -------------------------------------------------------------------------------------- losses of the segmentor


@pytest.fixture
def segmentor(configs, stage_two):
    model = MODELS.build(load_config(str(configs.two), {}).model)
    model.load_state_dict(load(stage_two)["state_dict"])
    return model.train()


@pytest.fixture
def batch(configs):
    """Four images of the training set, with unlabelled pixels in each."""
    dataset = DATASETS.build(load_config(str(configs.plain), {}).train_dataloader.dataset)
    data = pseudo_collate([dataset[index] for index in range(4)])
    assert all((sample.gt_sem_seg.data == 255).any() for sample in data["data_samples"])
    return data


def losses(model, batch):
    """The total loss and the gradient of the calibration."""
    model.zero_grad()
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert named.keys() == CALIBRATION
    return loss.detach(), torch.cat([gradient.flatten() for gradient in named.values()])


def test_bf16_autocast_is_finite_and_close_to_fp32(segmentor, batch):
    loss, gradient = losses(segmentor, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_gradient = losses(segmentor, batch)
    assert half_loss.dtype == half_gradient.dtype == torch.float32
    assert half_gradient.isfinite().all()
    assert not torch.equal(half_loss, loss)
    torch.testing.assert_close(half_loss, loss, rtol=0.02, atol=0)
    assert torch.nn.functional.cosine_similarity(half_gradient, gradient, dim=0) > 0.99


def test_ignored_pixels_do_not_count(segmentor, batch):
    loss, _ = losses(segmentor, batch)
    ignored = copy.deepcopy(batch)
    ignored["data_samples"][3].gt_sem_seg.data.fill_(255)
    without, without_gradient = losses(segmentor, ignored)
    assert 0 < without < loss
    for key in ("inputs", "data_samples"):
        del ignored[key][3]
    alone, alone_gradient = losses(segmentor, ignored)
    # avg_non_ignore=False: divided by all pixels, of four images and of three.
    torch.testing.assert_close(4 * without, 3 * alone)
    torch.testing.assert_close(4 * without_gradient, 3 * alone_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_an_all_ignored_batch_gives_zero_and_no_gradient(avg_non_ignore, segmentor, batch):
    segmentor.decode_head.loss_decode.avg_non_ignore = avg_non_ignore
    for sample in batch["data_samples"]:
        sample.gt_sem_seg.data.fill_(255)
    loss, gradient = losses(segmentor, batch)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.gpu
def test_stage_two_trains_under_the_frameworks_amp(configs, stage_one, gpu_environment, tmp_path):
    command = [sys.executable, "-m", "disalign_mmseg.train", configs.two, "--work-dir", tmp_path, "--amp"]
    command += ["--cfg-options", f"stage_one={stage_one}"]
    done = subprocess.run(list(map(str, command)), env=gpu_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / LAST)["optimizer"]["loss_scaler"]
    end = load(tmp_path / LAST)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert not torch.equal(end[MAGNITUDE], torch.ones(150))


def test_load_from_is_another_name_for_stage_one(configs, stage_one, tmp_path, capfd):
    ends = []
    for key in ("stage_one", "load_from"):
        assert train(configs.plain, tmp_path / key, f"{key}={stage_one}", iterations=2) == 0
        ends.append(load(tmp_path / key / "iter_2.pth")["state_dict"])
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
    assert train(configs.plain, tmp_path / "two", f"stage_one={stage_one}", "load_from=another.pth") == 2
    assert "expected one stage-one checkpoint, got stage_one=" in capfd.readouterr().err
    assert left_behind(tmp_path / "two") == []
