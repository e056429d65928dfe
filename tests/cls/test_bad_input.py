"""Bad input to any command: one sentence, exit status 2, and nothing half-made left behind."""

import re
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core.malicious import Malicious
from PIL import Image

from disalign.cli import find_config
from disalign_cls import check, predict, test, train

from .runs import BASELINE, DISALIGN, left_behind, quick

COMMANDS = {"train": train.main, "test": test.main, "predict": predict.main, "check": check.main}
ONE, TWO, COSINE = BASELINE["linear"], DISALIGN["linear"], DISALIGN["cosine"]
LIST = [
    "train_dataloader.dataset._delete_=True",
    "train_dataloader.dataset.type=ListDataset",
    "train_dataloader.dataset.num_classes=10",
    "train_dataloader.dataset.data_root={images}",
]


@pytest.fixture(scope="module")
def files(stage_one, stage_two, tmp_path_factory):
    """Name -> path of every bad file, and of the good ones beside them."""
    folder = tmp_path_factory.mktemp("bad")
    made = SimpleNamespace(stage_one=stage_one, stage_two=stage_two, stage_one_folder=stage_one.parent, folder=folder)

    def checkpoint(name, change=None, source=stage_one):
        content = torch.load(source, weights_only=True)
        if change is not None:
            content = change(content) or content
        torch.save(content, folder / f"{name}.pth")
        setattr(made, name, folder / f"{name}.pth")

    def altered(tensor, alter):
        return lambda content: content["state_dict"].update({tensor: alter(content["state_dict"][tensor])})

    checkpoint("nan", altered("backbone.0.weight", lambda weight: weight * float("nan")))
    checkpoint("nan_two", altered("classifier.calibration.margin", lambda margin: margin / 0), stage_two)
    checkpoint("misshaped", altered("classifier.weight", lambda weight: weight[:7].clone()))
    checkpoint("text", altered("classifier.bias", lambda bias: "text"))
    checkpoint("foreign", lambda content: {"state_dict": {"layer.weight": torch.zeros(2)}})
    checkpoint("a_list", lambda content: [1, 2])
    checkpoint("nothing", lambda content: {"state_dict": {}})
    whole = stage_one.read_bytes()
    made.truncated = folder / "truncated.pth"
    made.truncated.write_bytes(whole[: len(whole) // 2])

    made.harm = folder / "harm"
    for name, content in (("malicious", {"state_dict": Malicious(str(made.harm))}), ("object", SimpleNamespace())):
        torch.save(content, folder / f"{name}.pth")
        setattr(made, name, folder / f"{name}.pth")
    # It would do harm if it were read carelessly.
    torch.load(made.malicious, weights_only=False)
    made.harm.rmdir()
    made.resumable = folder / "resumable"
    made.resumable.mkdir()
    (made.resumable / "last_checkpoint").write_text(str(made.malicious))

    made.images = folder / "images"
    made.images.mkdir()
    Image.effect_noise((32, 32), 50).save(made.images / "whole.png")
    content = (made.images / "whole.png").read_bytes()
    made.corrupt = made.images / "corrupt.png"
    made.corrupt.write_bytes(content[: len(content) // 2])
    made.no_images = folder / "no images"
    made.no_images.mkdir()
    for name, lines in {
        "empty_list": [],
        "missing_list": ["whole.png 0", "gone.png 1"],
        "range_list": ["whole.png 0", "whole.png 10"],
        "malformed_list": ["whole.png 0", "whole.png"],
        "corrupt_list": [*(f"whole.png {label}" for label in range(10)), "corrupt.png 0"],
    }.items():
        setattr(made, name, folder / f"{name}.txt")
        getattr(made, name).write_text("".join(f"{line}\n" for line in lines))
    np.savez(folder / "arrays.npz", train_images=np.zeros((2, 8, 8), np.float32), train_labels=np.array([0, 1]))
    made.arrays = folder / "arrays.npz"
    for name, content in {
        "broken": "model = dict(\n",
        "raising": "model = 1 / 0\n",
        "foreign_base": "_base_ = 'gone.py'",
    }.items():
        setattr(made, f"{name}_config", folder / f"{name}.py")
        (folder / f"{name}.py").write_text(content)
    return made


def ann_file(name):
    return [*LIST, f"train_dataloader.dataset.ann_file={{{name}}}", "train_dataloader.num_workers=1"]


#: What is bad -> the command, its arguments before --cfg-options, its options, and what the sentence says.
BAD = {
    # the config
    "config missing": (
        "train",
        ["gone.py"],
        [],
        "expected a config file, or the name of a shipped one in .* 'gone.py'",
    ),
    "config missing, test": ("test", ["gone.py", "{stage_one}"], [], "expected a config file"),
    "config missing, predict": ("predict", ["gone.py", "{stage_one}", "{images}"], [], "expected a config file"),
    "config missing, check": ("check", ["gone.py"], [], "expected a config file"),
    "config with a syntax error": (
        "train",
        ["{broken_config}"],
        [],
        "can be built in '.*broken.py', but: ",
    ),
    "config that raises": (
        "check",
        ["{raising_config}"],
        [],
        "can be built in '.*', but: division by zero",
    ),
    "config without its base": (
        "test",
        ["{foreign_base_config}", "{stage_one}"],
        [],
        "expected a config that can be built in '.*', but: ",
    ),
    "unknown key": ("train", [ONE], ["modle.num_classes=3"], "--cfg-options of keys that the config has, got modle"),
    "unknown key, test": (
        "test",
        [ONE, "{stage_one}"],
        ["modle=3"],
        "--cfg-options of keys that the config has, got m",
    ),
    "key below a word": ("train", [ONE], ["model.type.x=1"], "expected a config that can be built in .*, but: "),
    # what is built from it
    "unknown model": (
        "train",
        [ONE],
        ["model.type=Nope"],
        "expected a config that can be built in .*, but: Nope is not",
    ),
    "unknown model, predict": ("predict", [ONE, "{stage_one}", "{images}"], ["model.type=Nope"], "but: Nope is not"),
    "unknown model option": ("train", [ONE], ["model.nope=1"], "unexpected keyword argument 'nope'"),
    "unknown backbone": ("train", [ONE], ["model.backbone.name=resnet5"], "got 'resnet5'; close: resnet50"),
    "unknown classifier": ("train", [ONE], ["model.classifier=nope"], "a classifier among linear, cosine, got 'nope'"),
    "unknown dataset": ("train", [ONE], ["train_dataloader.dataset.type=Nope"], "but: Nope is not"),
    "unknown dataset, check": ("check", [ONE], ["val_dataloader.dataset.type=Nope"], "but 1 of its sets can't be read"),
    "unknown transform": (
        "train",
        [ONE],
        ["train_dataloader.dataset.transforms.0.type=No"],
        "v2 and its options, got .*'No'",
    ),
    "unknown sampler": ("train", [ONE], ["train_dataloader.sampler.type=Nope"], "but: Nope is not"),
    "unknown optimizer option": (
        "train",
        [ONE],
        ["optim_wrapper.optimizer.nope=1"],
        "unexpected keyword argument 'nope'",
    ),
    "unknown scheduler": ("train", [ONE], ["param_scheduler.type=Nope"], "but: Nope is not"),
    "unknown scheduler option": ("train", [ONE], ["param_scheduler.nope=1"], "unexpected keyword argument 'nope'"),
    "unknown hook": ("train", [ONE], ["default_hooks.confidence.type=Nope"], "but: Nope is not"),
    "unknown metric": ("train", [ONE], ["val_evaluator.type=Nope"], "but: Nope is not"),
    "unknown metric, test": ("test", [ONE, "{stage_one}"], ["test_evaluator.type=Nope"], "but: Nope is not"),
    "no test data": ("test", [ONE, "{stage_one}"], ["test_dataloader=None"], "expected a config that can be built"),
    "no test data, predict": ("predict", [ONE, "{stage_one}", "{images}"], ["test_dataloader=None"], "can be built in"),
    "no data, check": ("check", [ONE], ["test_dataloader=None"], "but 1 of its sets can't be read"),
    "batch of none": ("train", [ONE], ["train_dataloader.batch_size=0"], "batch_size should be a positive integer"),
    "other number of classes": (
        "train",
        [ONE],
        ["model.num_classes=11"],
        "each of the model's 11 classes, got 10; set",
    ),
    "other number of counts": (
        "test",
        [ONE, "{stage_one}"],
        ["test_evaluator.class_counts=[1,2,3]"],
        "class_counts for each of the model's 10 classes, got 3",
    ),
    "other classes": (
        "train",
        [ONE],
        ["val_dataloader.dataset.classes=[0,1,2,3,4,5,6,7,8,ten]"],
        "expected the 10 classes of the training set in the test set, .*: class 0 is 0, not '0', .*give both the same",
    ),
    "other classes, test": (
        "test",
        [ONE, "{stage_one}"],
        ["test_dataloader.dataset.classes=[0,1,2,3,4,5,6,7,8,ten]"],
        "expected the 10 classes of the training set in the test set, .*: class 0 is 0, not '0', .*give both the same",
    ),
    "negative rho": (
        "train",
        [TWO],
        ["stage_one={stage_one}", "model.loss.rho=-1"],
        "expected a finite rho >= 0, got -1",
    ),
    "magnitude decayed": (
        "train",
        [TWO],
        ["stage_one={stage_one}", "optim_wrapper.constructor=DefaultOptimWrapperConstructor"],
        r"expected no weight decay on the magnitude, whose identity is 1 .*keep_magnitude_from_decay",
    ),
    # stage one's file
    "stage one not given": ("train", [TWO], ["stage_one="], "expected the stage-one checkpoint, got none; give it"),
    "stage one absent": (
        "train",
        [TWO],
        ["stage_one=gone.pth"],
        "expected a checkpoint at 'gone.pth', but there is no",
    ),
    "stage one a folder": (
        "train",
        [TWO],
        ["stage_one={folder}"],
        "expected a checkpoint at '.*', but it can't be read",
    ),
    "stage one NaN": (
        "train",
        [TWO],
        ["stage_one={nan}"],
        "expected finite numbers in .* NaN or infinity in backbone.0.weight",
    ),
    "stage one foreign": ("train", [TWO], ["stage_one={foreign}"], "expected all 17 frozen tensors .* lacks 17"),
    "stage one truncated": ("train", [TWO], ["stage_one={truncated}"], "it can't be read .*; is it truncated"),
    "stage one misshaped": ("train", [TWO], ["stage_one={misshaped}"], r"1 of others: .*\[7, 64\], not \[10, 64\]"),
    "stage one text": ("train", [TWO], ["stage_one={text}"], "lacks 1: classifier.bias"),
    "stage one a list": ("train", [TWO], ["stage_one={a_list}"], "expected a state dict of tensors"),
    "stage one nothing": ("train", [TWO], ["stage_one={nothing}"], "expected a state dict of tensors"),
    "stage one malicious": ("train", [TWO], ["stage_one={malicious}"], "but it also holds posix.mkdir; re-save it"),
    "stage one an object": ("train", [TWO], ["stage_one={object}"], "but it also holds types.SimpleNamespace; re-save"),
    "stage one calibrated": ("train", [TWO], ["stage_one={stage_two}"], "but it already holds a calibration"),
    "stage one of another classifier": (
        "train",
        [COSINE],
        ["stage_one={stage_one}"],
        "lacks 1: classifier.scale",
    ),
    # other checkpoints
    "load_from malicious": ("train", [ONE], ["load_from={malicious}"], "but it also holds posix.mkdir; re-save it"),
    "load_from absent": (
        "train",
        [ONE],
        ["load_from=gone.pth"],
        "expected a checkpoint at 'gone.pth', but there is no",
    ),
    "load_from NaN": (
        "train",
        [ONE],
        ["load_from={nan}"],
        "expected finite numbers in '.*nan.pth', .* in backbone.0",
    ),
    "resume nothing": (
        "train",
        [ONE, "--resume"],
        [],
        "expected a checkpoint to resume in '.*', got none; start without",
    ),
    "resume nothing, by option": ("train", [ONE], ["resume=True"], "expected a checkpoint to resume in '.*', got none"),
    "test absent": ("test", [ONE, "gone.pth"], [], "expected a checkpoint at 'gone.pth', but there is no such file"),
    "test malicious": ("test", [ONE, "{malicious}"], [], "but it also holds posix.mkdir; re-save it"),
    "test truncated": ("test", [ONE, "{truncated}"], [], "it can't be read .*; is it truncated"),
    "test a list": ("test", [ONE, "{a_list}"], [], "expected a state dict of tensors"),
    "test text": ("test", [ONE, "{text}"], [], "lacks 1: classifier.bias"),
    "test NaN": (
        "test",
        [TWO, "{nan_two}"],
        [],
        "finite numbers in '.*nan_two.pth', .* in classifier.calibration.margin",
    ),
    "test stage two without calibration": (
        "test",
        [TWO, "{stage_one}"],
        [],
        "all 24 tensors .* lacks 4: classifier.calibration",
    ),
    "test stage one with calibration": (
        "test",
        [ONE, "{stage_two}"],
        [],
        "no tensors beyond the model's in '.*epoch_3.pth', but got 4: classifier.calibration",
    ),
    "test other number of classes": (
        "test",
        [ONE, "{stage_one}"],
        ["model.num_classes=9"],
        "got 2 of others: classifier.weight",
    ),
    "predict absent": (
        "predict",
        [ONE, "gone.pth", "{images}"],
        [],
        "expected a checkpoint at 'gone.pth', but there is",
    ),
    "predict malicious": ("predict", [ONE, "{malicious}", "{images}"], [], "but it also holds posix.mkdir; re-save it"),
    "predict NaN": ("predict", [TWO, "{nan_two}", "{images}"], [], "expected finite numbers"),
    "predict without calibration": (
        "predict",
        [TWO, "{stage_one}", "{images}"],
        [],
        "24 tensors .* lacks 4",
    ),
    "predict with calibration": (
        "predict",
        [ONE, "{stage_two}", "{images}"],
        [],
        "no tensors beyond the model's .* got 4",
    ),
    # data
    "empty list": ("train", [ONE], ann_file("empty_list"), "expected 'path label' lines in .*, but it is empty"),
    "missing image": ("train", [ONE], ann_file("missing_list"), "expected 2 images .*, but 1 are missing: .*gone.png"),
    "label out of range": ("train", [ONE], ann_file("range_list"), r"expected labels in \[0, 10\).*: 10 of image 1 "),
    "malformed list": ("train", [ONE], ann_file("malformed_list"), "but 1 differ: line 2: 'whole.png'"),
    "list absent": (
        "train",
        [ONE],
        [*LIST, "train_dataloader.dataset.ann_file=gone.txt"],
        "a list file .* at 'gone.txt'",
    ),
    "corrupt image": ("train", [ONE], ann_file("corrupt_list"), "expected a whole image at '.*corrupt.png', but: "),
    "missing image, check": ("check", [ONE], ann_file("missing_list"), "but 1 of its sets can't be read, see above"),
    "other number of classes, check": (
        "check",
        [ONE],
        ["model.num_classes=11"],
        "but 1 of its sets can't be read, see above",
    ),
    "other classes, check": (
        "check",
        [ONE],
        ["test_dataloader.dataset.classes=[0,1,2,3,4,5,6,7,8,ten]"],
        "but 1 of its sets can't be read, see above",
    ),
    "too few classes, check": ("check", [ONE], ["model.num_classes=9"], "but 3 of its sets can't be read, see above"),
    "arrays of floats": (
        "train",
        [ONE],
        [
            "train_dataloader.dataset._delete_=True",
            "train_dataloader.dataset.type=ArrayDataset",
            "train_dataloader.dataset.file={arrays}",
        ],
        "expected uint8 images",
    ),
    "predict without an image": ("predict", [ONE, "{stage_one}", "gone.png"], [], "there is no 'gone.png'"),
    "predict an empty folder": ("predict", [ONE, "{stage_one}", "{no_images}"], [], "expected images in .*, got none"),
    "predict a corrupt image": (
        "predict",
        [ONE, "{stage_one}", "{corrupt}"],
        [],
        "expected a whole image at '.*corrupt",
    ),
}


def arguments(case, files, work_dir):
    command, given, options, _ = BAD[case]
    given = [*given, "--work-dir", str(work_dir)] if command in ("train", "test") else given
    given = [*given, "--cfg-options", *quick(), *options]
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


def test_resuming_in_stage_ones_folder_is_refused_and_changes_nothing(files, capsys):
    before = {path: path.stat().st_mtime_ns for path in files.stage_one_folder.glob("*.pth")}
    given = [TWO, "--work-dir", str(files.stage_one_folder), "--resume", "--cfg-options", *quick()]
    assert train.main([*given, f"stage_one={files.stage_one}"]) == 2
    (sentence,) = refusals(capsys.readouterr().err)
    assert "a run to resume in its own work_dir" in sentence
    assert {path: path.stat().st_mtime_ns for path in files.stage_one_folder.glob("*.pth")} == before


def test_resuming_from_a_malicious_checkpoint_executes_nothing(files, capsys):
    assert train.main([ONE, "--work-dir", str(files.resumable), "--resume", "--cfg-options", *quick()]) == 2
    assert len(refusals(capsys.readouterr().err)) == 1
    assert not files.harm.exists()


def test_a_corrupt_image_leaves_no_predictions(files, tmp_path):
    out = tmp_path / "out.json"
    assert predict.main([ONE, str(files.stage_one), str(files.images), "--out", str(out)]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", [[], [ONE, "a", "b", "--nope"]], ids=["no arguments", "unknown argument"])
def test_wrong_arguments_are_argparses_to_refuse(command, given, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        COMMANDS[command](given)
    assert "usage: " in capsys.readouterr().err


def test_check_lists_every_missing_file(files, capsys):
    options = [option.format(**vars(files)) for option in ann_file("missing_list")]
    assert check.main([ONE, "--all", "--cfg-options", *options]) == 2
    assert f"  missing: {files.images / 'gone.png'}\n" in capsys.readouterr().out


def test_check_says_which_classes_differ(capsys):
    assert check.main([ONE, "--cfg-options", "model.num_classes=11"]) == 2
    train, val, _ = capsys.readouterr().out.splitlines()
    assert "expected a dataset of as many classes as the model, whose num_classes is 11, got 10; correct" in train
    assert val.startswith("val_dataloader: 500 images of 10 classes")


def test_check_says_what_is_there(capsys):
    assert check.main([ONE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("_")[0] for line in lines] == ["train", "val", "test"]
    assert "242 images of 10 classes, 1 to 100 per class" in lines[0]
    assert "many 3, medium 3, few 4" in lines[0]  # by the thresholds of the config's metric


@pytest.mark.parametrize(
    ("command", "case"),
    [
        ("train", "stage one calibrated"),
        ("test", "test stage two without calibration"),
        ("predict", "predict without an image"),
        ("check", "missing image, check"),
    ],
)
def test_the_exit_status_of_the_process_is_2(command, case, files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"disalign_cls.{command}", *arguments(case, files, tmp_path / "work")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(refusals(done.stderr)) == 1
    assert re.search(BAD[case][3], refusals(done.stderr)[0])
    assert "Traceback" not in done.stderr
    assert left_behind(tmp_path) == []


MINE = """
from mmengine.registry import MODELS
from disalign_cls.classifiers import ImageClassifier

@MODELS.register_module(force=True)
class Mine(ImageClassifier):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.head = self.backbone.no_such_layer
"""


@pytest.mark.parametrize(
    ("code", "error"),
    [(MINE, AttributeError), ("import no_such_module_of_mine", ImportError), ("x = 1 / 0", ZeroDivisionError)],
    ids=["in a constructor", "of an import", "while imported"],
)
def test_an_error_in_ones_own_code_keeps_its_traceback(code, error, tmp_path, monkeypatch):
    module = f"mine_{error.__name__.lower()}"
    (tmp_path / f"{module}.py").write_text(code)
    (tmp_path / "config.py").write_text(
        f'_base_ = "{find_config(ONE)}"\n'
        f'custom_imports = dict(imports=["disalign_cls", "{module}"], allow_failed_imports=False)\n'
        'model = dict(type="Mine")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error) as raised:
        train.main([str(tmp_path / "config.py"), "--work-dir", str(tmp_path / "work"), "--cfg-options", *quick()])
    chain, files = raised.value, set()
    while chain is not None:
        files |= {Path(frame.filename).name for frame in traceback.extract_tb(chain.__traceback__)}
        chain = chain.__cause__ or chain.__context__
    assert f"{module}.py" in files
