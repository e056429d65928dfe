"""Bad input to stage two: one sentence, exit status 2, and nothing half-made left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

import numpy as np
import torch
from core.malicious import Malicious
from PIL import Image

import disalign_mmseg.hooks
from disalign import InputError
from disalign_mmseg import test as test_command
from disalign_mmseg import train as train_command

from .runs import left_behind, load, quick, stock_runner, train

COMMANDS = {"train": train_command.main, "test": test_command.main}


@pytest.fixture(scope="module")
def files(ade, configs, stage_one, stage_two, tmp_path_factory):
    """Name -> path of every bad file, and of the good ones beside them."""
    folder = tmp_path_factory.mktemp("bad")
    made = SimpleNamespace(two=configs.two, one=configs.one, stage_one=stage_one, stage_two=stage_two, folder=folder)

    def checkpoint(name, change):
        content = torch.load(stage_one, weights_only=False)
        content = {"state_dict": content["state_dict"], "meta": {"dataset_meta": content["meta"]["dataset_meta"]}}
        content = change(content) or content
        torch.save(content, folder / f"{name}.pth")
        setattr(made, name, folder / f"{name}.pth")

    def altered(tensor, alter):
        return lambda content: content["state_dict"].update({tensor: alter(content["state_dict"][tensor])})

    def fewer(content):
        for name in ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"):
            content["state_dict"][name] = content["state_dict"][name][:149].clone()
        del content["meta"]

    def in_another_order(content):
        classes = content["meta"]["dataset_meta"]["classes"]
        content["meta"] = {"CLASSES": classes[::-1], "PALETTE": []}  # as MMSegmentation 0.x named them

    checkpoint("nan", altered("backbone.layer1.0.conv1.weight", lambda weight: weight * float("nan")))
    checkpoint("nan_buffer", altered("backbone.layer1.0.bn1.running_var", lambda variance: variance / 0))
    checkpoint("fewer", fewer)
    checkpoint("in_another_order", in_another_order)
    checkpoint("foreign", lambda content: {"state_dict": {"layer.weight": torch.zeros(2)}})
    checkpoint("another_head", altered("decode_head.conv_seg.bias", lambda _: "text"))
    checkpoint("surplus", lambda content: content["state_dict"].update({"neck.weight": torch.zeros(2)}))
    checkpoint("a_list", lambda content: [1, 2])
    whole = stage_one.read_bytes()
    made.truncated = folder / "truncated.pth"
    made.truncated.write_bytes(whole[: len(whole) // 2])
    two = load(stage_two)
    two["state_dict"]["decode_head.calibration.margin"] += float("nan")
    made.nan_two = folder / "nan_two.pth"
    torch.save(two, made.nan_two)

    made.harm = folder / "harm"
    for name, content in (("malicious", {"state_dict": Malicious(str(made.harm))}), ("object", SimpleNamespace())):
        torch.save(content, folder / f"{name}.pth")
        setattr(made, name, folder / f"{name}.pth")
    # It would do harm if it were read carelessly.
    torch.load(made.malicious, weights_only=False)
    made.harm.rmdir()

    counts = list(range(150, 0, -1))
    for name, content in {"short": counts[:149], "zero": [*counts[:149], 0], "negative": [*counts[:149], -1]}.items():
        setattr(made, name, folder / f"{name}.json")
        getattr(made, name).write_text(json.dumps(content))
    made.broken = folder / "broken.json"
    made.broken.write_text("[1, 2,")

    def dataset(name, change):
        setattr(made, name, folder / name)
        shutil.copytree(ade, folder / name)
        change(folder / name)

    def annotate(split, number, change):
        def changed(root):
            path = root / "annotations" / split / f"ADE_{split[:5].removesuffix('i')}_{number:08d}.png"
            labels = change(np.array(Image.open(path)))
            Image.fromarray(labels).save(path)

        return changed

    def mark(labels):
        labels[2, 3:5] = 200
        return labels

    dataset("wrong_label", annotate("training", 5, mark))
    dataset("wrong_size", annotate("training", 6, lambda labels: labels[:-2]))
    dataset("three_channels", annotate("training", 7, lambda labels: np.stack([labels] * 3, -1)))
    dataset("unannotated", lambda root: (root / "annotations/training/ADE_train_00000008.png").unlink())
    dataset("broken_annotation", lambda root: (root / "annotations/training/ADE_train_00000009.png").write_text("no"))
    dataset("broken_image", lambda root: (root / "images/training/ADE_train_00000009.jpg").write_text("no"))
    dataset("empty", lambda root: [path.unlink() for path in (root / "images/training").iterdir()])
    dataset("unvalidated", lambda root: (root / "annotations/validation/ADE_val_00000002.png").unlink())

    for name, content in {
        "raising_config": "model = 1 / 0\n",
        "broken_config": "model = dict(\n",
        "baseless_config": "_base_ = 'gone.py'\n",
    }.items():
        setattr(made, name, folder / f"{name}.py")
        (folder / f"{name}.py").write_text(content)
    return made


HEAD = "model.decode_head"
COUNTS = f"{HEAD}.loss_decode.class_counts"
START = "stage_one={stage_one}"
DATA = "train_dataloader.dataset.data_root"
TWO = ["{two}"]

#: What is bad -> the command, its arguments before --cfg-options, its options, and what the sentence says.
BAD = {
    # the config
    "config missing": ("train", ["gone.py"], [], "expected a config file, or the name of a shipped one .* 'gone.py'"),
    "config that raises": ("train", ["{raising_config}"], [], "can be built in '.*', but: division by zero"),
    "config with a syntax error": ("train", ["{broken_config}"], [], "can be built in '.*broken_config.py', but"),
    "config without its base": ("test", ["{baseless_config}", "{stage_two}"], [], "can be built in '.*', but"),
    "unknown key": ("train", TWO, [START, "modle.x=3"], "--cfg-options of keys that the config has, got modle"),
    "unknown key, test": ("test", ["{two}", "{stage_two}"], ["modle=3"], "--cfg-options of keys .* got modle"),
    "unknown model key": ("train", TWO, [START, "model.nope=1"], "unexpected keyword argument 'nope'"),
    "unknown head key": ("train", TWO, [START, f"{HEAD}.nope=1"], "unexpected keyword argument 'nope'"),
    "unknown loss key": ("train", TWO, [START, f"{HEAD}.loss_decode.nope=1"], "unexpected keyword argument 'nope'"),
    "unknown calibration key": ("train", TWO, [START, f"{HEAD}.calibration.nope=1"], "unexpected keyword arg.*'nope'"),
    "unknown metric key": (
        "train",
        TWO,
        [START, "val_evaluator.nope=1"],
        "arguments of LongTailIoUMetric .*, got nope",
    ),
    "unknown optimizer key": ("train", TWO, [START, "optim_wrapper.optimizer.nope=1"], "unexpected keyword .*'nope'"),
    "unknown hook": ("train", TWO, [START, "default_hooks.stage_two.type=Nope"], "but: Nope is not"),
    "negative rho": ("train", TWO, [START, f"{HEAD}.loss_decode.rho=-1"], "expected a finite rho >= 0, got -1"),
    "magnitude decayed": (
        "train",
        TWO,
        [START, "optim_wrapper.constructor=DefaultOptimWrapperConstructor"],
        "expected no weight decay on the magnitude, whose identity is 1 .*keep_magnitude_from_decay",
    ),
    "pixels sampled by loss": (
        "train",
        TWO,
        [START, f"{HEAD}.sampler.type=OHEMPixelSampler", f"{HEAD}.sampler.min_kept=100"],
        "expected no pixel sampler, .*; set decode_head.sampler=None",
    ),
    "mixed precision without a GPU": ("train", ["{two}", "--amp"], [START], "can be built in .* only available .*gpu"),
    # the head
    "stock head": (
        "train",
        TWO,
        [START, f"{HEAD}.type=FCNHead"],
        "expected a decode head with a calibration, got FCNHead; set its type to DisAlignFCNHead",
    ),
    "masks": (
        "train",
        TWO,
        [START, f"{HEAD}.type=DisAlignMask2FormerHead"],
        "expected a head that classifies pixels, got Mask2FormerHead: it classifies masks, not pixels",
    ),
    "one channel": (
        "train",
        TWO,
        [START, f"{HEAD}.num_classes=2", f"{HEAD}.out_channels=1"],
        "expected one output of FCNHead for each of 2 classes, got 1; a single sigmoid",
    ),
    "unknown head": ("train", TWO, [START, f"{HEAD}.type=DisAlignNopeHead"], "but: DisAlignNopeHead is not in the"),
    # stage one's file
    "stage one not given": ("train", TWO, [], "expected the stage-one checkpoint, got none; give it: --cfg-options"),
    "stage one absent": ("train", TWO, ["stage_one=gone.pth"], "a checkpoint at 'gone.pth', but there is no such file"),
    "stage one a folder": ("train", TWO, ["stage_one={folder}"], "expected a checkpoint at '.*', but it can't be read"),
    "stage one truncated": ("train", TWO, ["stage_one={truncated}"], "it can't be read .*; is it truncated"),
    "stage one malicious": ("train", TWO, ["stage_one={malicious}"], "but it also holds posix.mkdir; re-save it"),
    "stage one an object": ("train", TWO, ["stage_one={object}"], "but it also holds types.SimpleNamespace; re-save"),
    "stage one a list": ("train", TWO, ["stage_one={a_list}"], "expected a state dict of tensors"),
    "stage one foreign": ("train", TWO, ["stage_one={foreign}"], "expected all .* frozen tensors .* but it lacks"),
    "stage one text": ("train", TWO, ["stage_one={another_head}"], "but it lacks 1: decode_head.conv_seg.bias"),
    "stage one surplus": ("train", TWO, ["stage_one={surplus}"], "no tensors beyond the model's .* got 1: neck.weight"),
    "stage one NaN": (
        "train",
        TWO,
        ["stage_one={nan}"],
        "expected finite numbers in .* NaN or infinity in backbone.layer1.0.conv1.weight",
    ),
    "stage one infinite buffer": ("train", TWO, ["stage_one={nan_buffer}"], "infinity in backbone.*running_var"),
    "stage one calibrated": ("train", TWO, ["stage_one={stage_two}"], "but it already holds a calibration"),
    "stage one of fewer classes": ("train", TWO, ["stage_one={fewer}"], r"\[149, 16, 1, 1\], not \[150, 16, 1, 1\]"),
    "stage one in another order": (
        "train",
        TWO,
        ["stage_one={in_another_order}"],
        r"expected the 150 classes of the training set in '.*', .*class 0 is 'flag', not 'wall', class 1 is 'clock'",
    ),
    "resume nothing": (
        "train",
        ["{two}", "--resume"],
        [START],
        "expected a checkpoint to resume in '.*', got none; start without --resume",
    ),
    # checkpoints to test
    "test absent": ("test", ["{two}", "gone.pth"], [], "expected a checkpoint at 'gone.pth', but there is no such"),
    "test malicious": ("test", ["{two}", "{malicious}"], [], "but it also holds posix.mkdir; re-save it"),
    "test stage one": ("test", ["{two}", "{stage_one}"], [], "expected all .* tensors .* lacks 4: decode_head.calibr"),
    "test stage one by views": ("test", ["{two}", "{stage_one}", "--tta"], [], "lacks 4: decode_head.calibration"),
    "test NaN": ("test", ["{two}", "{nan_two}"], [], "finite numbers .* in decode_head.calibration.margin"),
    "test without views": ("test", ["{two}", "{stage_two}", "--tta"], ["tta_model=None"], "expected tta_model"),
    # class counts
    "counts too few": (
        "train",
        TWO,
        [START, COUNTS + "={short}"],
        "expected 150 class weights for logits of shape .* do the class counts belong to",
    ),
    "counts of zero": ("train", TWO, [START, COUNTS + "={zero}"], "example per class, got none for class 149"),
    "counts negative": ("train", TWO, [START, COUNTS + "={negative}"], "expected .*-1"),
    "counts broken": ("train", TWO, [START, COUNTS + "={broken}"], "expected class counts as JSON in '.*broken.json'"),
    "counts absent": (
        "train",
        TWO,
        [START, COUNTS + "=gone.json"],
        "expected a JSON file or a bundled name .* got 'gone.json'",
    ),
    # data
    "fewer classes than the data": (
        "train",
        TWO,
        ["stage_one={fewer}", f"{HEAD}.num_classes=149"],
        "expected num_classes=150 in the decode head, the number of classes of ADE20KDataset, got 149",
    ),
    "label out of range": (
        "train",
        TWO,
        [START, DATA + "={wrong_label}"],
        r"expected labels 0..149, or 255 .*_00000005.png', but 2 pixels are not: 2 are 199 .*, the first at x 3, y 2",
    ),
    "annotation of another size": (
        "train",
        TWO,
        [START, DATA + "={wrong_size}"],
        r"expected one label per pixel, an array of shape .*, in '.*_00000006.png', got \(\d+, \d+\); is it .*and that",
    ),
    "annotation in colour": ("train", TWO, [START, DATA + "={three_channels}"], "one label per pixel, .*_00000007.png"),
    "annotation missing": (
        "train",
        TWO,
        [START, DATA + "={unannotated}"],
        "expected 16 annotations of ADE20KDataset, but 1 are missing: .*_00000008.png",
    ),
    "annotation missing in validation": (
        "train",
        TWO,
        [START, "val_dataloader.dataset.data_root={unvalidated}"],
        "expected 8 annotations of ADE20KDataset, but 1 are missing: .*_00000002.png",
    ),
    "annotation missing, test": (
        "test",
        ["{two}", "{stage_two}"],
        ["test_dataloader.dataset.data_root={unvalidated}"],
        "expected an annotation at .*_00000002.png', but there is no such file",
    ),
    "annotation broken": ("train", TWO, [START, DATA + "={broken_annotation}"], "an annotation that can be read at"),
    "image broken": ("train", TWO, [START, DATA + "={broken_image}"], "an image that can be read at .*_00000009.jpg"),
    "no images": (
        "train",
        TWO,
        [START, DATA + "={empty}"],
        r"expected images \(\*.jpg\) of ADE20KDataset in '.*', got none; check data_root",
    ),
    "no folder": ("train", TWO, [START, DATA + "=gone"], "expected images .* of ADE20KDataset in .*gone.*no such fold"),
    "unknown dataset": ("train", TWO, [START, "train_dataloader.dataset.type=Nope"], "Nope"),
}


def arguments(case, files, work_dir):
    _, given, options, _ = BAD[case]
    given = [*given, "--work-dir", str(work_dir), "--cfg-options", *quick(), *options]
    return [part.format(**vars(files)) for part in given]


def refusals(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_in_one_sentence_and_leaves_nothing(case, files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    command, _, _, sentence = BAD[case]
    assert COMMANDS[command](arguments(case, files, tmp_path / "work")) == 2
    err = capfd.readouterr().err
    assert len(refusals(err)) == 1, err
    assert re.search(sentence, refusals(err)[0])
    assert "Traceback" not in err
    assert left_behind(tmp_path) == []
    assert not files.harm.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_label_beyond_the_sample_is_found_where_it_is_read(workers, files, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(disalign_mmseg.hooks, "check_dataset", lambda *_: None)
    options = [START, DATA + "={wrong_label}", f"train_dataloader.num_workers={workers}"]
    options = [option.format(**vars(files)) for option in options]
    assert train(files.two, tmp_path, *options, "train_dataloader.batch_size=16") == 2
    (sentence,) = refusals(capfd.readouterr().err)
    assert re.search("_00000005.png', but 2 pixels are not: 2 are 199 .*, the first at x 3, y 2", sentence)
    assert left_behind(tmp_path) == []


def test_a_file_that_mmengines_own_runner_misses_is_named(files, tmp_path):
    options = {"load_from": str(files.stage_two), "test_dataloader.dataset.data_root": str(files.unvalidated)}
    runner = stock_runner(files.two, tmp_path, **options)
    with pytest.raises(InputError, match=r"expected an annotation at .*_00000002\.png', but there is no such file"):
        runner.test()


def test_stage_ones_folder_is_not_stage_twos(files, tmp_path, capfd):
    shutil.copy(files.stage_one, tmp_path / "iter_4.pth")
    before = (tmp_path / "iter_4.pth").read_bytes()
    assert train(files.two, tmp_path, f"stage_one={tmp_path / 'iter_4.pth'}") == 2
    assert "error: expected a folder of stage two's own as work_dir, got " in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_4.pth"]
    assert (tmp_path / "iter_4.pth").read_bytes() == before


def test_resuming_stage_ones_folder_is_refused_and_changes_nothing(files, tmp_path, capfd):
    shutil.copy(files.stage_one, tmp_path / "iter_8.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_8.pth"))
    assert train(files.two, tmp_path, f"stage_one={files.stage_one}", flags=["--resume"]) == 2
    assert "lacks 4: decode_head.calibration" in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_8.pth"]


def test_resuming_executes_nothing(files, tmp_path, capfd):
    (tmp_path / "last_checkpoint").write_text(str(files.malicious))
    assert train(files.two, tmp_path, flags=["--resume"]) == 2
    assert len(refusals(capfd.readouterr().err)) == 1
    assert not files.harm.exists()


def test_resuming_does_not_execute_the_config_in_a_checkpoint(files, tmp_path):
    checkpoint = load(files.stage_two)
    checkpoint["meta"]["config"] = f"import os\nos.mkdir({str(files.harm)!r})\n"
    torch.save(checkpoint, tmp_path / "iter_4.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_4.pth"))
    assert train(files.two, tmp_path, iterations=5, flags=["--resume"]) == 0
    assert not files.harm.exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", [[], ["a", "b", "--nope"]], ids=["no arguments", "unknown argument"])
def test_wrong_arguments_are_argparses_to_refuse(command, given, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        COMMANDS[command](given)
    assert "usage: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("command", "case"), [("train", "label out of range"), ("test", "test stage one")])
def test_through_mim_the_sentence_appears_and_nothing_is_left(command, case, files, tmp_path):
    config, *more = (part.format(**vars(files)) for part in BAD[case][1])
    options = [option.format(**vars(files)) for option in [f"work_dir={tmp_path}", *BAD[case][2]]]
    more = ["-C", *more] if command == "test" else more
    mim = os.path.join(os.path.dirname(sys.executable), "mim")
    done = subprocess.run(
        [mim, command, "mmseg", config, *more, "--cfg-options", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(f"disalign.errors.InputError: .*{BAD[case][3]}", done.stdout)
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_the_exit_status_of_the_process_is_2(files, tmp_path):
    command = [sys.executable, "-m", "disalign_mmseg.train", *arguments("unknown head", files, tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(refusals(done.stderr)) == 1
    assert "Traceback" not in done.stderr
    assert left_behind(tmp_path) == []


MINE = """
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.datasets import ADE20KDataset
from mmseg.registry import DATASETS, TRANSFORMS

@DATASETS.register_module(force=True)
class MyDataset(ADE20KDataset):
    def __init__(self, faulty=True, **options):
        super().__init__(**options)
        if faulty:
            self.no_such_thing.append(1)

@TRANSFORMS.register_module(force=True)
class MyAnnotations(LoadAnnotations):
    def transform(self, results):
        return results["no such key"]
"""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["train_dataloader.dataset.type=MyDataset"], AttributeError),
        (
            [
                "train_dataloader.dataset.type=MyDataset",
                "train_dataloader.dataset.faulty=False",
                "train_dataloader.dataset.pipeline.1.type=MyAnnotations",
            ],
            KeyError,
        ),
    ],
    ids=["a dataset", "a transform"],
)
def test_an_error_in_ones_own_code_keeps_its_traceback(options, error, files, tmp_path, monkeypatch):
    (tmp_path / "my_segmentation.py").write_text(MINE)
    (tmp_path / "config.py").write_text(
        f'_base_ = "{files.two}"\n'
        'custom_imports = dict(imports=["disalign_mmseg", "my_segmentation"], allow_failed_imports=False)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_segmentation", raising=False)
    with pytest.raises(error) as raised:
        train(tmp_path / "config.py", tmp_path / "work", START.format(**vars(files)), *options)
    assert any(Path(entry.path).name == "my_segmentation.py" for entry in raised.traceback)
