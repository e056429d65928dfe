"""Whole runs through the commands: stage one, stage two, test and predict."""

import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

import disalign_mmengine.hooks
from disalign import InputError
from disalign.freezing import fingerprints
from disalign_cls import predict
from disalign_cls.datasets import DigitsLT
from disalign_mmengine.cli import load_config

from .runs import BASELINE, DISALIGN, PLAIN, evaluate, log, quick, runner, train

CALIBRATION = {
    f"classifier.calibration.{name}" for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
}
CLASSIFIERS = pytest.mark.parametrize("classifier", ["linear", "cosine"])


def load(path):
    return torch.load(path, weights_only=True)


def report(folder):
    return json.loads((folder / "results_test.json").read_text())


def built(config, checkpoint=None, **options):
    model = MODELS.build(load_config(config, options).model)
    if checkpoint is not None:
        model.load_state_dict(load(checkpoint)["state_dict"])
    return model.eval()


def digits(split="test"):
    dataset = DigitsLT(split)
    samples = [dataset[index] for index in range(len(dataset))]
    return torch.stack([sample["inputs"] for sample in samples]), dataset.labels


def same(a, b):
    """Bit for bit the same tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# --------------------------------------------------------------------------------------------------- both stages


@CLASSIFIERS
def test_stage_two_starts_at_stage_ones_scores_bit_for_bit(classifier, stage_ones, tmp_path):
    images, _ = digits()
    run = runner(DISALIGN[classifier], tmp_path, stage_one=str(stage_ones[classifier]))
    run.build_train_loop(run._train_loop)
    run.optim_wrapper = run.build_optim_wrapper(run.optim_wrapper)
    run.call_hook("before_train")
    model, one = run.model.eval(), built(BASELINE[classifier], stage_ones[classifier])
    with torch.no_grad():
        inputs = one.data_preprocessor({"inputs": images, "data_samples": None})["inputs"]
        assert torch.equal(model(inputs), one(inputs))


@CLASSIFIERS
def test_frozen_tensors_are_bit_identical_after_training_and_evaluations(classifier, stage_ones, stage_twos):
    one, two = load(stage_ones[classifier])["state_dict"], load(stage_twos[classifier])["state_dict"]
    # Each of the epochs called train(), each was followed by an evaluation; BatchNorm's statistics are among them.
    assert any("running_var" in name for name in one)
    assert two.keys() - one.keys() == CALIBRATION
    assert fingerprints({name: two[name] for name in one}) == fingerprints(one)
    assert not torch.equal(two["classifier.calibration.magnitude"], torch.ones(10))
    assert not torch.equal(two["classifier.calibration.margin"], torch.zeros(10))
    assert two["classifier.calibration.confidence.weight"].any()


@CLASSIFIERS
def test_the_log_says_what_was_loaded_trains_and_stayed(classifier, stage_twos):
    text = log(stage_twos[classifier].parent)
    tensors = {"linear": 20, "cosine": 20}[classifier]
    assert f": loaded {tensors} of {tensors} frozen tensors; new, starting at the identity: " in text
    assert "85 numbers train (classifier.calibration.magnitude [10]" in text  # 2K + d + 1
    assert "frozen tensors are bit-identical to what this run started from" in text
    assert "confidence_mean: " in text
    assert "magnitude_max: " in text
    assert "DisAlign" in text


def test_a_checkpoint_is_plain_and_keeps_counts_and_rho(stage_one, stage_two):
    counts = DigitsLT("train").class_counts.tolist()
    assert load(stage_one)["meta"]["disalign"] == {"class_counts": counts}
    assert load(stage_two)["meta"]["disalign"] == {
        "class_counts": counts,
        "rho": 1.5,
        "normalize": "mean",
        "zero_count": "error",
        "reduction": "weighted_mean",
        "ignore_index": -100,
        "sync": True,
        "background_weight": None,
    }
    assert load(stage_two)["meta"]["dataset_meta"]["classes"] == [str(digit) for digit in range(10)]


def test_rho_is_the_configs_and_not_the_checkpoints(stage_two, tmp_path):
    run = runner(DISALIGN["linear"], tmp_path, **{"model.loss.rho": 0.5, "load_from": str(stage_two)})
    run.load_or_resume()
    counts = DigitsLT("train").class_counts.double()
    assert run.model.loss.class_counts.tolist() == counts.tolist()
    expected = counts**-0.5 / (counts**-0.5).mean()
    torch.testing.assert_close(run.model.loss.weight.double(), expected)


def test_results_hold_everything_per_class(stage_two):
    results = report(stage_two.parent)
    assert results["dataset"] == "digits-lt"
    assert (results["split"], results["images"]) == ("test", 500)
    assert results["class_counts"] == DigitsLT("train").class_counts.tolist()
    assert results["classes"] == [str(digit) for digit in range(10)]
    assert results["unit"] == "percent"
    for stage in (results, results["stage_one"]):
        figures, accuracy = stage["figures"], stage["per_class"]["accuracy"]
        assert len(accuracy) == 10
        assert figures["balanced"] == pytest.approx(np.mean(accuracy))
        assert figures["top1"] == pytest.approx(figures["balanced"])  # 50 images of each class


@CLASSIFIERS
def test_stage_ones_figures_beside_stage_twos_are_those_of_stage_ones_own_run(classifier, stage_ones, stage_twos):
    one, two = report(stage_ones[classifier].parent), report(stage_twos[classifier].parent)
    assert "stage_one" not in one
    assert two["stage_one"] == {"figures": one["figures"], "per_class": one["per_class"]}


@CLASSIFIERS
def test_stage_two_moves_the_boundary_towards_the_few(classifier, stage_twos):
    results = report(stage_twos[classifier].parent)
    before, after = results["stage_one"]["figures"], results["figures"]
    assert after["few"] + after["medium"] > before["few"] + before["medium"]


@CLASSIFIERS
def test_the_test_command_repeats_the_last_validation(classifier, stage_twos, tmp_path):
    checkpoint = stage_twos[classifier]
    assert evaluate(DISALIGN[classifier], checkpoint, tmp_path) == 0
    assert report(tmp_path) == report(checkpoint.parent)


@pytest.mark.parametrize("keep", ["flat", "no meta"])
def test_a_checkpoint_of_weights_alone_is_evaluated_without_groups(keep, stage_one, tmp_path):
    weights = load(stage_one)["state_dict"]
    torch.save(weights if keep == "flat" else {"state_dict": weights, "meta": None}, tmp_path / "weights.pth")
    assert evaluate(BASELINE["linear"], tmp_path / "weights.pth", tmp_path) == 0
    figures = report(tmp_path)["figures"]
    assert figures["top1"] == report(stage_one.parent)["figures"]["top1"]
    assert figures["many"] is figures["few"] is None


def test_a_seed_fixes_a_run(stage_one, tmp_path):
    first, second = ((tmp_path / name) for name in ("first", "second"))
    for folder in (first, second):
        assert train(DISALIGN["linear"], folder, f"stage_one={stage_one}") == 0
    assert same(load(first / "epoch_2.pth")["state_dict"], load(second / "epoch_2.pth")["state_dict"])


# ----------------------------------------------------------------------------------------------------- predict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five test digits as files, one below the others."""
    folder = tmp_path_factory.mktemp("pictures")
    dataset = DigitsLT("test")
    (folder / "deeper").mkdir()
    for number in range(5):
        image = Image.fromarray(dataset.images[100 * number])
        image.save(folder / ("deeper/4.png" if number == 4 else f"{number}.png"))
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("given", ["files", "folder"])
def test_predict_prints_the_five_best_as_json(given, stage_two, pictures, capsys):
    paths = [*(str(pictures / f"{number}.png") for number in range(4)), str(pictures / "deeper/4.png")]
    arguments = paths if given == "files" else [str(pictures)]
    assert predict.main([DISALIGN["linear"], str(stage_two), *arguments]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert [prediction["image"] for prediction in predictions] == paths

    model, (images, _) = built(DISALIGN["linear"], stage_two), digits()
    with torch.no_grad():
        inputs = model.data_preprocessor({"inputs": images[::100], "data_samples": None})["inputs"]
        expected = model(inputs).softmax(1)
    for prediction, probabilities in zip(predictions, expected, strict=True):
        best = probabilities.argsort(descending=True)[:5].tolist()
        assert [row["label"] for row in prediction["top5"]] == best
        assert [row["name"] for row in prediction["top5"]] == [str(label) for label in best]
        assert [row["score"] for row in prediction["top5"]] == pytest.approx(probabilities[best].tolist(), abs=1e-6)


def test_predict_writes_a_file(stage_two, pictures, tmp_path, capsys):
    out = tmp_path / "new" / "predictions.json"
    assert predict.main([DISALIGN["linear"], str(stage_two), str(pictures / "0.png"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert len(json.loads(out.read_text())) == 1


# ------------------------------------------------------------------------------------------------------ resume

EPOCHS = 5
KILLED_AT = 10  # of 4 iterations an epoch: in the midst of the third epoch


def interrupted(patch, how):
    """Stop a run at one iteration."""

    def stop(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == KILLED_AT:
            how()

    patch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "after_train_iter", stop)


class StoppedError(Exception):
    pass


def stopped():
    raise StoppedError


@pytest.fixture(scope="module")
def uninterrupted(stage_one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(DISALIGN["linear"], folder, f"stage_one={stage_one}", PLAIN, epochs=EPOCHS) == 0
    return load(folder / f"epoch_{EPOCHS}.pth")


def test_a_killed_run_resumes_to_the_uninterrupted_runs_end_bit_for_bit(stage_one, uninterrupted, tmp_path):
    program = (
        "import os, signal, sys, pytest; from cls import test_train as t;"
        "t.interrupted(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL));"
        "t.train(t.DISALIGN['linear'], sys.argv[1], 'stage_one=' + sys.argv[2], t.PLAIN, epochs=t.EPOCHS)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run(
        [sys.executable, "-c", program, tmp_path, stage_one], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "epoch_2.pth").exists()
    assert not (tmp_path / "epoch_3.pth").exists()

    # The stage-one file is no longer needed.
    assert train(DISALIGN["linear"], tmp_path, "stage_one=gone.pth", PLAIN, epochs=EPOCHS, flags=["--resume"]) == 0
    resumed = load(tmp_path / f"epoch_{EPOCHS}.pth")
    for part in ("state_dict", "optimizer", "param_schedulers"):
        assert same(resumed[part], uninterrupted[part]), part
    assert resumed["optimizer"]["state"]
    assert (resumed["meta"]["epoch"], resumed["meta"]["iter"]) == (EPOCHS, 4 * EPOCHS)


def test_resuming_restores_the_checkpoint_bit_for_bit_and_completes(stage_one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, stopped)
        with pytest.raises(StoppedError):
            train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=EPOCHS)
    checkpoint = load(tmp_path / "epoch_2.pth")
    restored = {}

    def look(self, runner):
        if restored:  # a later epoch
            return
        restored.update(
            state_dict=copy.deepcopy(dict(runner.model.state_dict())),
            optimizer=copy.deepcopy(runner.optim_wrapper.state_dict()),
            param_schedulers=[copy.deepcopy(scheduler.state_dict()) for scheduler in runner.param_schedulers],
            place=(runner.epoch, runner.iter),
        )

    monkeypatch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "before_train_epoch", look)
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=EPOCHS, flags=["--resume"]) == 0
    assert restored.pop("place") == (checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"]) == (2, 8)
    for part, state in restored.items():
        assert same(state, dict(checkpoint[part]) if part == "state_dict" else checkpoint[part]), part
    assert load(tmp_path / f"epoch_{EPOCHS}.pth")["meta"]["epoch"] == EPOCHS


@pytest.mark.parametrize("kind", ["DisAlignRunner", "Runner"])
def test_resume_goes_on_from_the_work_folder_whatever_load_from_says(kind, stage_two, stage_one, tmp_path):
    assert train(DISALIGN["linear"], tmp_path, f"runner_type={kind}", f"stage_one={stage_one}", epochs=1) == 0
    # Resuming stage_two's third epoch would leave nothing to do.
    options = [f"runner_type={kind}", f"stage_one={stage_one}", f"load_from={stage_two}"]
    assert train(DISALIGN["linear"], tmp_path, *options, epochs=2, flags=["--resume"]) == 0
    assert load(tmp_path / "epoch_2.pth")["meta"]["epoch"] == 2


# --------------------------------------------------------------------------------------------------- processes


def launch(arguments, processes=2):
    """What torchrun does on one machine, less its agent, which would cost another start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "disalign_cls.train", *arguments, "--launcher", "pytorch"]
    started = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], errors


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(stage_one, tmp_path):
    # 242 = 11 steps of 22 images; the ranks take turns in one order, so that each step's images are the same.
    options = [f"stage_one={stage_one}", PLAIN]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train(DISALIGN["linear"], alone, *options, "train_dataloader.batch_size=22") == 0
    quick = [*options, "train_dataloader.batch_size=11", "train_cfg.max_epochs=2", "train_cfg.val_interval=2"]
    codes, errors = launch(
        [DISALIGN["linear"], "--work-dir", str(together), "--cfg-options", "visualizer.vis_backends=[]", *quick]
    )
    assert codes == [0, 0], errors
    one, two = load(alone / "epoch_2.pth"), load(together / "epoch_2.pth")
    assert one["meta"]["iter"] == two["meta"]["iter"] == 22
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name in CALIBRATION:
        torch.testing.assert_close(two["state_dict"][name], one["state_dict"][name], rtol=0, atol=1e-5)
        assert two["state_dict"][name].any()
    frozen = one["state_dict"].keys() - CALIBRATION
    assert all(torch.equal(two["state_dict"][name], one["state_dict"][name]) for name in frozen)
    # The evaluation is shared out too, and put together again.
    assert report(together)["images"] == 500
    assert report(together)["stage_one"] == report(alone)["stage_one"]


def test_a_launched_process_refuses_bad_input_in_one_sentence(stage_two, tmp_path):
    arguments = [DISALIGN["linear"], "--work-dir", str(tmp_path), "--cfg-options", f"stage_one={stage_two}"]
    codes, (error,) = launch(arguments, processes=1)
    assert codes == [2]
    assert "error: expected a stage-one checkpoint" in error
    assert "Traceback" not in error


# ------------------------------------------------------------------------------------------- what can go wrong


def batch_of(model, images=16):
    inputs, labels = digits("train")
    data = model.data_preprocessor({"inputs": inputs[::images], "data_samples": labels[::images]}, training=True)
    return data["inputs"], data["data_samples"]


def stage_two_model(checkpoint):
    model = built(DISALIGN["linear"], checkpoint)
    model.set_class_counts(DigitsLT("train").class_counts)
    return model.train()


def test_a_collapsed_confidence_leaves_magnitude_and_margin_without_gradients(stage_two):
    model = stage_two_model(stage_two)
    gradients = {}
    for bias in (0.0, -20.0):
        calibration = model.classifier.calibration
        with torch.no_grad():
            calibration.confidence.weight.zero_()
            calibration.confidence.bias.fill_(bias)
        model.zero_grad()
        inputs, labels = batch_of(model)
        losses = model(inputs, labels, mode="loss")
        losses["loss"].backward()
        assert losses["confidence_mean"] == pytest.approx(1 / (1 + math.exp(-bias)))
        gradients[bias] = max(calibration.magnitude.grad.abs().max(), calibration.margin.grad.abs().max())
    assert gradients[0.0] > 1e-3
    assert gradients[-20.0] < 1e-8


def test_a_collapsed_confidence_is_warned_about_once(stage_one, stage_two, tmp_path, monkeypatch):
    def collapse(self, runner):
        with torch.no_grad():
            runner.model.classifier.calibration.confidence.bias.fill_(-20)

    monkeypatch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "before_train_epoch", collapse)
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}") == 0
    text = log(tmp_path)
    assert text.count("the mean confidence fell to 0.000 at iteration 1: ") == 1
    assert text.count("WARNING - the mean confidence fell to") == 1
    assert "keep optim_wrapper.clip_grad=dict(max_norm=1.0), or lower the learning rate or rho" in text
    assert "the mean confidence fell" not in log(stage_two.parent)


@pytest.mark.parametrize("tensor", ["backbone.0.weight", "backbone.1.running_mean", "classifier.bias"])
def test_a_frozen_tensor_that_changes_is_found_at_the_end(tensor, stage_one, tmp_path, monkeypatch):
    def meddle(self, runner):
        runner.model.state_dict()[tensor].view(-1)[0] += 1e-3

    monkeypatch.setattr(disalign_mmengine.hooks.PlainCheckpointHook, "after_train_epoch", meddle)
    with pytest.raises(RuntimeError, match=rf"frozen tensors to stay bit-identical, but changed: {tensor}"):
        train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=1)


def test_a_training_set_of_other_counts_is_refused_on_resume(stage_one, tmp_path, capsys):
    assert train(DISALIGN["linear"], tmp_path, f"stage_one={stage_one}", epochs=1) == 0
    capsys.readouterr()
    options = [f"stage_one={stage_one}", "train_dataloader.dataset.seed=1"]
    assert train(DISALIGN["linear"], tmp_path, *options, flags=["--resume"]) == 2
    assert "error: expected the training set that this checkpoint was made with (242 images" in capsys.readouterr().err


def test_learning_rate_scaling_happens_once(tmp_path):
    assert load_config(BASELINE["linear"], {}).optim_wrapper.optimizer.lr == 0.1
    options = ["auto_scale_lr.enable=True", "auto_scale_lr.base_batch_size=128"]
    assert train(BASELINE["linear"], tmp_path, *options, epochs=1) == 0
    group = load(tmp_path / "epoch_1.pth")["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == pytest.approx(0.1 * 64 / 128)


# --------------------------------------------------------------------------------------------- mixed precision


@CLASSIFIERS
def test_bf16_autocast_is_finite_and_close_to_fp32(classifier, stage_twos):
    model = built(DISALIGN[classifier], stage_twos[classifier]).train()
    model.set_class_counts(DigitsLT("train").class_counts)
    inputs, labels = batch_of(model)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            scores, losses = model(inputs), model(inputs, labels, mode="loss")
        losses["loss"].backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert len(gradients) == 4
        assert all(gradient.isfinite().all() for gradient in gradients)
        found[dtype] = scores, losses["loss"], torch.cat([gradient.flatten() for gradient in gradients])
    (scores, loss, gradient), (half_scores, half_loss, half_gradient) = found.values()
    assert half_loss.dtype == torch.float32
    torch.testing.assert_close(half_scores.float(), scores, rtol=0.05, atol=0.1)
    torch.testing.assert_close(half_loss, loss, rtol=0.05, atol=0)
    assert torch.nn.functional.cosine_similarity(half_gradient, gradient, dim=0) > 0.99


@pytest.mark.gpu
@CLASSIFIERS
def test_both_stages_train_under_the_frameworks_amp(classifier, gpu_environment, tmp_path):
    def train_with_amp(config, folder, *options):
        given = [*quick(), "optim_wrapper.type=AmpOptimWrapper", *options]
        command = [
            sys.executable,
            "-m",
            "disalign_cls.train",
            config,
            "--work-dir",
            str(folder),
            "--cfg-options",
            *given,
        ]
        done = subprocess.run(command, env=gpu_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    one, two = tmp_path / "one", tmp_path / "two"
    train_with_amp(BASELINE[classifier], one)
    train_with_amp(DISALIGN[classifier], two, f"stage_one={one / 'epoch_2.pth'}")
    assert all(tensor.isfinite().all() for tensor in load(two / "epoch_2.pth")["state_dict"].values())
    assert report(two)["stage_one"]["figures"]["top1"] == pytest.approx(report(one)["figures"]["top1"], abs=1)


def test_stage_two_needs_class_counts_before_its_first_loss():
    model = built(DISALIGN["linear"]).train()
    inputs, labels = batch_of(model)
    with pytest.raises(InputError, match="expected class counts before the first loss, got none; call set_class_co"):
        model(inputs, labels, mode="loss")


@CLASSIFIERS
def test_the_optimizer_of_stage_two_holds_the_calibration_alone(classifier, tmp_path, capfd):
    run = runner(DISALIGN[classifier], tmp_path)
    groups = run.build_optim_wrapper(run.optim_wrapper).optimizer.param_groups
    held = {id(parameter): group for group in groups for parameter in group["params"]}
    calibration = dict(run.model.classifier.calibration.named_parameters())
    assert held.keys() == {id(parameter) for parameter in calibration.values()}
    decays = {name: held[id(parameter)]["weight_decay"] for name, parameter in calibration.items()}
    assert decays == {"magnitude": 0.0, "margin": 5e-3, "confidence.weight": 5e-3, "confidence.bias": 5e-3}
    assert "is skipped since its requires_grad=False" not in "".join(capfd.readouterr())
