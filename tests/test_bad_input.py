"""Bad input to the commands that write something: one sentence, exit status 2, nothing half-made, nothing executed.

Training, testing and prediction have tables of their own in tests/{cls,d2,seg}/test_bad_input.py. Here are the other
commands, the places where nothing can be written, and kinds of files that those tables do not have.
"""

import errno
import importlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import sys
import time
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from core.malicious import Malicious
from PIL import Image

ROOT = Path(__file__).parents[1]
ONE = "cls/digits/baseline_cnn_1xb64-60e_digits-lt.py"
TWO = "cls/digits/disalign_cnn_1xb64-60e_digits-lt.py"

#: Command -> what python runs for it, and the framework without which it can't.
COMMANDS = {
    "cls.train": ("disalign_cls.train", "mmengine"),
    "cls.test": ("disalign_cls.test", "mmengine"),
    "cls.predict": ("disalign_cls.predict", "mmengine"),
    "cls.demo": ("disalign_cls.demo", "mmengine"),
    "d2.train_net": ("disalign_d2.train_net", "detectron2"),
    "d2.evaluate": ("disalign_d2.evaluate", "detectron2"),
    "seg.train": ("disalign_mmseg.train", "mmseg"),
    "seg.test": ("disalign_mmseg.test", "mmseg"),
    "seg.check": ("disalign_mmseg.check", "mmseg"),
    "cls.export": ("disalign_cls.export", "mmengine"),
    "convert": ("scripts/convert_checkpoint.py", "torch"),
    "count_classes": ("scripts/count_classes.py", "PIL"),
    "make_cifar_lt": ("scripts/make_cifar_lt.py", "torchvision"),
    "make_shapes": ("scripts/make_long_tail_shapes.py", "cv2"),
    "make_tiny_ade": ("scripts/make_tiny_ade.py", "PIL"),
}


def main_of(command):
    """Its ``main``; skips where its framework is not installed."""
    name, framework = COMMANDS[command]
    pytest.importorskip(framework)
    if not name.endswith(".py"):
        return importlib.import_module(name).main
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main


class Files:
    """Every file that the cases name, good and bad, made when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.file = self.write("file", "mine")
        self.empty = self.write("empty.json", "")
        self.cut = self.write("cut.json", '{"images": [{"id": 1')
        self.binary = self.write("binary.json", bytes(range(256)))
        self.harm = folder / "harm"
        content = Malicious(str(self.harm))
        self.pickled = self.write("pickled.json", pickle.dumps(content))
        self.yaml = self.write("calls.yaml", f"MODEL: !!python/object/apply:os.mkdir [{self.harm}]\n")
        # numpy keeps objects in its files as pickles.
        np.savez(folder / "pickled.npz", train_images=np.array([content], object), train_labels=np.array([0]))
        self.npz = folder / "pickled.npz"

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def json(self, name, content):
        return self.write(f"{name}.json", json.dumps(content))

    # checkpoints to convert

    def torch(self, name, content):
        torch.save(content, self.folder / name)
        return self.folder / name

    @cached_property
    def layers(self):
        """As torchvision names them."""
        generator = torch.Generator().manual_seed(0)
        shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "fc.weight": (5, 64), "fc.bias": (5,)}
        shapes |= {f"layer{stage}.0.conv1.weight": (64, 1, 1, 1) for stage in (1, 2, 3, 4)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    @cached_property
    def source(self):
        return self.torch("source.pth", self.layers)

    @cached_property
    def array_among_tensors(self):
        return self.torch("array.pth", self.layers | {"fc.bias": self.layers["fc.bias"].numpy()})

    @cached_property
    def two_sets(self):
        return self.torch("two_sets.pth", {"model": self.layers, "model_ema": self.layers})

    @cached_property
    def lone_classifier(self):
        return self.torch("lone.pth", {name: self.layers[name] for name in ("fc.weight", "fc.bias")})

    @cached_property
    def other_trunk(self):
        return self.torch("other_trunk.pth", self.layers | {"layer5.0.conv1.weight": torch.ones(2)})

    @cached_property
    def cut_source(self):
        return self.write("cut.pth", self.source.read_bytes()[:300])

    @cached_property
    def nan_source(self):
        return self.torch("nan.pth", self.layers | {"fc.bias": self.layers["fc.bias"] / 0})

    @cached_property
    def no_classes(self):
        return self.torch("no_classes.pth", {name: self.layers[name][:0] for name in ("fc.weight", "fc.bias")})

    @cached_property
    def sparse(self):
        return self.torch("sparse.pth", self.layers | {"fc.weight": self.layers["fc.weight"].to_sparse()})

    @cached_property
    def foreign(self):
        return self.torch("foreign.pth", {"state_dict": {"a.b": torch.ones(2)}})

    @cached_property
    def malicious(self):
        return self.torch("malicious.pth", {"state_dict": self.layers, "optimizer": Malicious(str(self.harm))})

    @cached_property
    def malicious_pkl(self):
        return self.write("malicious.pkl", self.pickled.read_bytes())

    # examples to count

    @cached_property
    def list(self):
        return self.write("list.txt", "a.png 0\nb.png 1\n")

    @cached_property
    def list_without_labels(self):
        return self.write("without_labels.txt", "a.png 0\nb.png\n")

    @cached_property
    def cut_mask(self):
        """A folder of masks of which one is cut."""
        folder = self.folder / "masks"
        folder.mkdir()
        for name in ("a", "b"):
            Image.fromarray(np.random.default_rng(0).integers(0, 4, (64, 64), dtype=np.uint8)).save(
                folder / f"{name}.png"
            )
        (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:500])
        return folder

    # classification

    def classifier(self, config, name):
        from mmengine.registry import MODELS

        from disalign_mmengine.cli import load_config

        torch.save({"state_dict": MODELS.build(load_config(config, {}).model).state_dict()}, self.folder / name)
        return self.folder / name

    @cached_property
    def stage_one(self):
        return self.classifier(ONE, "epoch_1.pth")

    @cached_property
    def stage_two(self):
        return self.classifier(TWO, "stage_two.pth")

    @cached_property
    def nan_two(self):
        content = torch.load(self.stage_two, weights_only=True)
        content["state_dict"]["classifier.calibration.margin"] /= 0
        return self.torch("nan_two.pth", content)

    @cached_property
    def image(self):
        Image.effect_noise((8, 8), 50).save(self.folder / "image.png")
        return self.folder / "image.png"

    @cached_property
    def onnx(self):
        return self.write("mine.onnx", "mine")

    @cached_property
    def broken_chunk(self):
        """An image whose second block of pixels has another name: Pillow raises no OSError at that."""
        Image.effect_noise((512, 512), 90).save(self.folder / "whole.png")
        content = (self.folder / "whole.png").read_bytes()
        second = content.index(b"IDAT", content.index(b"IDAT") + 4)
        return self.write("broken_chunk.png", content[:second] + b"\0\1\2\3" + content[second + 4 :])

    @cached_property
    def nine_digits(self):
        """Long-tailed images of ten classes, of which the last has none."""
        labels = np.repeat(np.arange(9), 9)
        images = np.zeros((len(labels), 8, 8), np.uint8)
        np.savez(self.folder / "nine.npz", train_images=images, train_labels=labels)
        return self.folder / "nine.npz"

    @cached_property
    def empty_npz(self):
        return self.write("empty.npz", b"")

    @cached_property
    def cut_npz(self):
        content = self.nine_digits.read_bytes()
        return self.write("cut.npz", content[: len(content) // 2])

    def cifar(self, name):
        """A folder in CIFAR-10's format, 20 training images per class, random pixels."""
        folder = self.folder / name / "cifar-10-batches-py"
        generator = np.random.default_rng(0)
        for batch in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            content = {
                "data": generator.integers(0, 256, (40, 3072), dtype=np.uint8),
                "labels": np.repeat(np.arange(10), 4).tolist(),
            }
            self.write(f"{folder}/{batch}", pickle.dumps(content))
        self.write(f"{folder}/batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
        return folder.parent

    @cached_property
    def cifar_10(self):
        return self.cifar("cifar")

    @cached_property
    def malicious_cifar(self):
        root = self.cifar("malicious_cifar")
        shutil.copy(self.pickled, root / "cifar-10-batches-py" / "data_batch_1")
        return root

    # detection

    @cached_property
    def d2(self):
        from d2 import runs

        folder = self.folder / "d2"
        return runs.write_config(folder, runs.write_data(folder), "one")

    @cached_property
    def d2_two(self):
        from d2 import runs

        folder = self.folder / "d2_two"
        return runs.write_config(folder, runs.write_data(folder), "two", calibrate=True)

    @cached_property
    def d2_weights(self):
        (self.folder / "d2_one").mkdir()
        return self.torch("d2_one/model_0000004.pth", {"model": {"weight": torch.ones(1)}})

    def own(self, name, content):
        """A config whose annotations for training hold something else."""
        path = self.write(f"{name}/annotations.json", content)
        from d2 import runs

        data = runs.write_data(self.folder / f"{name}_data")
        return runs.write_config(self.folder, data | {"train": [data["train"][0], str(path), data["train"][2]]}, name)

    @cached_property
    def d2_empty(self):
        return self.own("d2_empty", "")

    @cached_property
    def d2_cut(self):
        return self.own("d2_cut", self.annotations.read_text()[:1000])

    @cached_property
    def d2_pickled(self):
        return self.own("d2_pickled", self.pickled.read_bytes())

    @cached_property
    def annotations(self):
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
        from d2 import runs

        return runs.write_dataset(self.folder / "lvis", 6, seed=0)

    def changed(self, name, change):
        content = json.loads(self.annotations.read_text())
        change(content)
        return self.json(name, content)

    @cached_property
    def detections(self):
        found = json.loads(self.annotations.read_text())["annotations"]
        keys = ("image_id", "category_id", "bbox")
        return self.json("detections", [{key: one[key] for key in keys} | {"score": 0.5} for one in found])

    @cached_property
    def without_letters(self):
        return self.changed("without_letters", lambda content: [one.pop("frequency") for one in content["categories"]])

    @cached_property
    def long_names(self):
        return self.changed(
            "long_names", lambda content: [one.update(name=2000 * "x") for one in content["categories"]]
        )

    @cached_property
    def three_numbers(self):
        return self.changed("three_numbers", lambda content: content["annotations"][2].update(bbox=[1, 2, 3]))

    @cached_property
    def text_area(self):
        return self.changed("text_area", lambda content: content["annotations"][2].update(area="large"))

    @cached_property
    def nan_box(self):
        return self.changed("nan_box", lambda content: content["annotations"][2].update(bbox=[float("nan")] * 4))

    @cached_property
    def list_id(self):
        return self.changed("list_id", lambda content: content["images"][2].update(id=[3]))

    @cached_property
    def repeated_id(self):
        return self.changed("repeated_id", lambda content: content["categories"][2].update(id=1))

    @cached_property
    def four_counts(self):
        return self.json("four_counts", [4, 3, 2, 1])

    @cached_property
    def negative_counts(self):
        return self.json("negative_counts", [4, 3, 2, 1, -1])

    # segmentation

    @cached_property
    def seg(self):
        from seg import runs

        runs.make_ade(self.folder / "ade")
        return runs.write_configs(self.folder, self.folder / "ade")

    @cached_property
    def segmentor(self):
        from mmengine.registry import DefaultScope
        from mmseg.registry import MODELS
        from mmseg.utils import register_all_modules

        from disalign_mmengine.cli import load_config

        register_all_modules(init_default_scope=False)
        with DefaultScope.overwrite_default_scope("mmseg"):
            tensors = MODELS.build(load_config(str(self.seg.one), {}).model).state_dict()
        torch.save({"state_dict": tensors}, self.folder / "segmentor.pth")
        return self.folder / "segmentor.pth"

    @cached_property
    def broken_config(self):
        return self.write("broken.py", "model = dict(\n")

    @cached_property
    def raising_config(self):
        return self.write("raising.py", "model = 1 / 0\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = Files(tmp_path_factory.mktemp("bad"))
    # They would do harm if they were read carelessly.
    for read in (
        lambda: pickle.loads(made.pickled.read_bytes()),
        lambda: np.load(made.npz, allow_pickle=True)["train_images"],
    ):
        read()
        made.harm.rmdir()
    return made


EVALUATE = ["{f.detections}", "{f.annotations}", "--out", "out.json"]
CIFAR = ["cifar10", "out.npz", "--imbalance", "10", "--no-download", "--root"]
ARRAYS = ["train_dataloader.dataset._delete_=True", "train_dataloader.dataset.type=ArrayDataset"]
COUNTS = "model.decode_head.loss_decode.class_counts"

CONVERT = ["out.pth", "--to", "cls"]
COUNT = ["--out", "out.json"]

#: What is bad -> the command, its arguments ("{f.NAME}": a file of Files), and what the sentence says.
BAD = {
    # convert
    "convert: missing": (
        "convert",
        ["gone.pth", *CONVERT],
        "expected a checkpoint at 'gone.pth', but there is no such",
    ),
    "convert: empty": ("convert", ["{f.empty}", *CONVERT], "expected .*empty.json', but it can't be read"),
    "convert: a folder": ("convert", ["{f.folder}", *CONVERT], "expected a checkpoint at '.*', but it can't be read"),
    "convert: cut": (
        "convert",
        ["{f.cut_source}", *CONVERT],
        "it can't be read .*; is it truncated or of another form",
    ),
    "convert: malicious": ("convert", ["{f.malicious}", *CONVERT], "it also holds posix.mkdir; .* --trust-checkpoint"),
    "convert: malicious pkl": (
        "convert",
        ["{f.malicious_pkl}", *CONVERT],
        "it holds a posix.mkdir; .* --trust-checkpoint",
    ),
    "convert: NaN": ("convert", ["{f.nan_source}", *CONVERT], "expected finite numbers in '.*nan.pth', but got NaN or"),
    "convert: no classes": (
        "convert",
        ["{f.no_classes}", *CONVERT],
        "expected a weight of shape .*, got .0, 64.; is it",
    ),
    "convert: sparse": (
        "convert",
        ["{f.sparse}", *CONVERT],
        "expected dense tensors in '.*sparse.pth', got .* fc.weight",
    ),
    "convert: to another format": (
        "convert",
        ["{f.source}", "out.safetensors", "--to", "cls"],
        "expected a DEST in .pth for --to cls, got 'out.safetensors'",
    ),
    "convert: foreign": ("convert", ["{f.foreign}", *CONVERT], "its tensors' names .a.b. are of none; .* --classifier"),
    "convert: another model": (
        "convert",
        ["{f.source}", *CONVERT, "--config", ONE],
        "expected all 20 tensors .* lacks 18",
    ),
    "convert: numpy among the weights": (
        "convert",
        ["{f.array_among_tensors}", *CONVERT],
        "but 1 are not: fc.bias; .* --trust-checkpoint",
    ),
    "convert: two sets of weights": (
        "convert",
        ["{f.two_sets}", *CONVERT],
        "got averaged ones; add --ema for the averaged ones .model_ema. or --no-ema for the trained ones .model.",
    ),
    "convert: a trunk that is none": (
        "convert",
        ["{f.lone_classifier}", *CONVERT],
        "expected a trunk beside the class",
    ),
    "convert: an unknown trunk": (
        "convert",
        ["{f.other_trunk}", *CONVERT],
        "expected --config for torchvision or timm",
    ),
    "convert: a fold in vain": (
        "convert",
        ["{f.source}", "out.pth", "--to", "d2", "--fold"],
        "no --fold for a backbone",
    ),
    "convert: onto itself": (
        "convert",
        ["{f.source}", "{f.source}", "--to", "cls", "--force"],
        "expected a file of its own as DEST, got '.*source.pth', which is read; name another",
    ),
    "convert: exists": (
        "convert",
        ["{f.source}", "{f.foreign}", "--to", "cls"],
        "expected a new file as DEST, but '.*foreign.pth' exists; add --force to replace it",
    ),
    "convert: a pattern in vain": (
        "convert",
        ["{f.source}", *CONVERT, "--drop", "nope*"],
        "expected --drop of names that the source has, got 'nope",
    ),
    "convert: another package": ("convert", ["{f.source}", "out.pth", "--to", "mmseg"], "expected --to cls or .*; "),
    "convert: a config that is none": (
        "convert",
        ["{f.source}", *CONVERT, "--config", "gone.py"],
        "expected a config file, or the name of a shipped one in .*, got 'gone.py'",
    ),
    # count_classes
    "count: missing": ("count_classes", ["gone.txt", *COUNT], "at 'gone.txt', but: No such file or directory"),
    "count: empty": ("count_classes", ["{f.empty}", *COUNT], "expected 'path label' lines in '.*', but it is empty"),
    "count: no labels": ("count_classes", ["{f.list_without_labels}", *COUNT], "but 1 differ: line 2: 'b.png'"),
    "count: cut": ("count_classes", ["{f.cut}", *COUNT], "expected annotations as JSON in '.*cut.json', but: "),
    "count: pickled": ("count_classes", ["{f.pickled}", *COUNT], "expected a list file of .* 'utf-8' codec"),
    "count: detections": ("count_classes", ["{f.detections}", *COUNT], "expected lists 'images', 'annotations' and"),
    "count: NaN": (
        "count_classes",
        ["{f.nan_box}", *COUNT],
        r"expected boxes .* got \[nan, nan, nan, nan\] in annotation",
    ),
    "count: two kinds": ("count_classes", ["{f.list}", "{f.annotations}", *COUNT], "expected sources of one kind, got"),
    "count: cut mask": ("count_classes", ["{f.cut_mask}", *COUNT], "but 1 of 2 can't be read: b.png .*--skip-corrupt"),
    "count: other classes": (
        "count_classes",
        ["{f.list}", "--num-classes", "1", *COUNT],
        "expected labels 0..0 in '.*list.txt', but 1 are not: 1 of b.png",
    ),
    "count: exists": (
        "count_classes",
        ["{f.list}", "--out", "{f.four_counts}"],
        "expected a new file as --out, but '.*four_counts.json' exists; add --force to replace it",
    ),
    "count: onto itself": (
        "count_classes",
        ["{f.annotations}", "--out", "{f.annotations}", "--force"],
        "expected a file of its own as --out, got '.*annotations.json', which is read; name another",
    ),
    # export
    "export: config missing": ("cls.export", ["gone.py", "{f.stage_two}", "out.pt"], "expected a config file, or the "),
    "export: missing": ("cls.export", [TWO, "gone.pth", "out.pt"], "expected a checkpoint at 'gone.pth', but there is"),
    "export: malicious": ("cls.export", [TWO, "{f.malicious}", "out.pt"], "but it also holds posix.mkdir; re-save it"),
    "export: NaN": (
        "cls.export",
        [TWO, "{f.nan_two}", "out.pt"],
        "expected finite numbers in '.*', .* in classifier.cal",
    ),
    "export: unknown key": (
        "cls.export",
        [TWO, "{f.stage_two}", "out.pt", "--cfg-options", "modle.x=1"],
        "expected --cfg-options of keys that the config has, got modle",
    ),
    "export: another model": (
        "cls.export",
        [TWO, "{f.stage_one}", "out.pt"],
        "24 tensors .* lacks 4: classifier.calib",
    ),
    "export: other classes": (
        "cls.export",
        [ONE, "{f.stage_one}", "out.pt", "--cfg-options", "model.num_classes=9"],
        "of the model's shapes in '.*', but got 2 of others: classifier.weight",
    ),
    "export: another format": ("cls.export", [TWO, "{f.stage_two}", "out.pth"], "expected OUT to end in .pt or .onnx"),
    "export: exists": (
        "cls.export",
        [TWO, "{f.stage_two}", "{f.onnx}"],
        "expected a new file as OUT, but '.*' exists; ",
    ),
    "export: no size": (
        "cls.export",
        [TWO, "{f.stage_two}", "out.pt", "--size", "0"],
        "expected a size of at least 1 pixel, got 0",
    ),
    "export: negative size": (
        "cls.export",
        [TWO, "{f.stage_two}", "out.pt", "--size", "-8"],
        "expected a size of at least 1 pixel, got -8",
    ),
    # make_cifar_lt
    "cifar: nothing there": ("make_cifar_lt", [*CIFAR, "{f.folder}"], "expected cifar10 in '.*', but: .*; leave out"),
    "cifar: malicious": (
        "make_cifar_lt",
        [*CIFAR, "{f.malicious_cifar}"],
        "expected cifar10 in '.*', but: Dataset not",
    ),
    "cifar: other images": ("make_cifar_lt", [*CIFAR, "{f.cifar_10}"], "expected cifar10 in '.*', but: Dataset not"),
    "cifar: a file as root": ("make_cifar_lt", [*CIFAR, "{f.file}"], "expected cifar10 in '.*file', but: "),
    "cifar: infinite": ("make_cifar_lt", ["cifar10", "out.npz", "--imbalance", "inf"], "expected an imbalance .* inf"),
    "cifar: no name": ("make_cifar_lt", ["cifar10", "{f.folder}/.npz/"], "expected the name of an .npz file to write"),
    # make_long_tail_shapes
    "shapes: a file": (
        "make_shapes",
        ["--out", "{f.file}"],
        "expected a place to write '.*file', but: .* not a folder",
    ),
    "shapes: too few images": ("make_shapes", ["--images", "1"], "expected .* --images for .* instances, got 1"),
    "shapes: too few instances": ("make_shapes", ["--most", "0"], "expected .* as --most .*, got 0, 0 and 40"),
    # make_tiny_ade
    "ade: a file": ("make_tiny_ade", ["{f.file}"], "expected a new or an empty folder, but '.*file' holds something"),
    "ade: no images": ("make_tiny_ade", ["out", "--val", "0"], "expected at least 1 as --train, --val .* got 16, 0"),
    "ade: too many classes": ("make_tiny_ade", ["out", "--classes", "151"], "expected 1 to 150 --classes, got 151"),
    # the demo
    "demo: negative seed": ("cls.demo", ["--seeds", "-1"], "expected --seeds from 0 to 4294967295, each once, got -1"),
    "demo: large seed": ("cls.demo", ["--seeds", "4294967296"], "expected --seeds from 0 to 4294967295"),
    "demo: the same seed twice": ("cls.demo", ["--seeds", "3", "3"], "each once, got 3 3; give others"),
    # evaluate
    "detections missing": (
        "d2.evaluate",
        ["gone.json", *EVALUATE[1:]],
        "expected detections at 'gone.json', but there",
    ),
    "detections empty": ("d2.evaluate", ["{f.empty}", *EVALUATE[1:]], "expected detections as JSON in '.*empty.json'"),
    "detections cut": ("d2.evaluate", ["{f.cut}", *EVALUATE[1:]], "expected detections as JSON in '.*cut.json', but: "),
    "detections binary": ("d2.evaluate", ["{f.binary}", *EVALUATE[1:]], "expected detections as JSON .*, but: 'utf-8'"),
    "detections pickled": ("d2.evaluate", ["{f.pickled}", *EVALUATE[1:]], "expected detections as JSON in '.*pickled"),
    "detections swapped": (
        "d2.evaluate",
        ["{f.annotations}", "{f.detections}", "--out", "out.json"],
        "expected a list of detections, got dict; give the detections first",
    ),
    "annotations missing": ("d2.evaluate", ["{f.detections}", "gone.json"], "expected annotations at 'gone.json', but"),
    "annotations empty": ("d2.evaluate", ["{f.detections}", "{f.empty}"], "expected annotations as JSON in '.*empty"),
    "annotations cut": ("d2.evaluate", ["{f.detections}", "{f.cut}"], "expected annotations as JSON in '.*cut.json'"),
    "annotations pickled": (
        "d2.evaluate",
        ["{f.detections}", "{f.pickled}"],
        "expected annotations as JSON in '.*pick",
    ),
    "annotations of three numbers": (
        "d2.evaluate",
        ["{f.detections}", "{f.three_numbers}"],
        r"expected boxes \[x, y, width, height\], got \[1, 2, 3\] in annotation 3",
    ),
    "annotations with text": ("d2.evaluate", ["{f.detections}", "{f.text_area}"], "a finite area of .*'large'"),
    "annotations with a list": (
        "d2.evaluate",
        ["{f.detections}", "{f.list_id}"],
        r"numbers as ids of the images, .* got \[3\]",
    ),
    "annotations repeated": (
        "d2.evaluate",
        ["{f.detections}", "{f.repeated_id}"],
        "ids of the categories, each once, got 1 again",
    ),
    "masks of boxes": ("d2.evaluate", [*EVALUATE, "--iou-type", "segm"], "expected .* segmentation of each detection"),
    "no detections wanted": ("d2.evaluate", [*EVALUATE, "--max-dets", "0"], "expected 1 or more as --max-dets, or -1"),
    "image counts missing": (
        "d2.evaluate",
        ["{f.detections}", "{f.without_letters}", "--image-counts", "gone.json"],
        "expected a JSON file or a bundled name among .*, got 'gone.json'",
    ),
    "image counts too few": (
        "d2.evaluate",
        ["{f.detections}", "{f.without_letters}", "--image-counts", "{f.four_counts}"],
        "expected image counts of the annotations' 5 categories, got 4",
    ),
    "image counts negative": (
        "d2.evaluate",
        ["{f.detections}", "{f.without_letters}", "--image-counts", "{f.negative_counts}"],
        "expected counts that are whole numbers >= 0, got -1 at class 4",
    ),
    "image counts pickled": (
        "d2.evaluate",
        ["{f.detections}", "{f.without_letters}", "--image-counts", "{f.pickled}"],
        "expected class counts as JSON in '.*pickled.json', but: ",
    ),
    "out is the annotations": (
        "d2.evaluate",
        ["{f.detections}", "{f.annotations}", "--out", "{f.annotations}"],
        "expected a file of its own as --out, got '.*annotations.json', which is read",
    ),
    "out is the image counts": (
        "d2.evaluate",
        ["{f.detections}", "{f.annotations}", "--image-counts", "{f.four_counts}", "--out", "{f.four_counts}"],
        "expected a file of its own as --out, got '.*four_counts.json', which is read",
    ),
    # prediction
    "out is an image": (
        "cls.predict",
        [ONE, "{f.stage_one}", "{f.image}", "--out", "{f.image}"],
        "expected a file of its own as --out, got '.*image.png', which is read; name another",
    ),
    "out is the checkpoint": (
        "cls.predict",
        [ONE, "{f.stage_one}", "{f.image}", "--out", "{f.stage_one}"],
        "expected a file of its own as --out, got '.*epoch_1.pth', which is read; name another",
    ),
    "an image that is none": (
        "cls.predict",
        [ONE, "{f.stage_one}", "{f.file}"],
        "a whole image at '.*file', but: .*; f",
    ),
    "a broken image": (
        "cls.predict",
        [ONE, "{f.stage_one}", "{f.image}", "{f.broken_chunk}", "--out", "out.json"],
        "expected a whole image at '.*broken_chunk.png', but: .*; fetch it again, or leave it out",
    ),
    # training and testing a classifier
    "stage two in stage one's folder": (
        "cls.train",
        [TWO, "--work-dir", "{f.folder}", "--cfg-options", "stage_one={f.stage_one}"],
        "expected a folder of stage two's own as work_dir, got '.*' with a checkpoint of stage one .'.*epoch_1.pth'.",
    ),
    "arrays empty": (
        "cls.train",
        [ONE, "--cfg-options", *ARRAYS, "train_dataloader.dataset.file={f.empty_npz}"],
        "expected 'train_images' and 'train_labels' in '.*empty.npz', but: ",
    ),
    "arrays cut": (
        "cls.train",
        [ONE, "--cfg-options", *ARRAYS, "train_dataloader.dataset.file={f.cut_npz}"],
        "expected 'train_images' and 'train_labels' in '.*cut.npz', but: ",
    ),
    "arrays pickled": (
        "cls.train",
        [ONE, "--cfg-options", *ARRAYS, "train_dataloader.dataset.file={f.npz}"],
        "expected .* in '.*pickled.npz', but: Object arrays cannot",
    ),
    "a class without images": (
        "cls.train",
        [
            TWO,
            "--cfg-options",
            "stage_one={f.stage_one}",
            *ARRAYS,
            "train_dataloader.dataset.file={f.nine_digits}",
            "train_dataloader.dataset.num_classes=10",
        ],
        "expected .* class 9",
    ),
    "thresholds in the wrong order": (
        "cls.train",
        [ONE, "--cfg-options", "val_evaluator.many=5"],
        "expected the lower threshold at or below the upper, got 6 and 5",
    ),
    "no evaluation": (
        "cls.train",
        [ONE, "--cfg-options", "train_cfg.val_interval=0"],
        "expected 1 or more as train_cfg.val_interval, got 0",
    ),
    "checkpoints where there is no place": (
        "cls.train",
        [ONE, "--cfg-options", "default_hooks.checkpoint.out_dir={f.file}"],
        "expected a place to write '.*file', but: '.*file' is not a folder",
    ),
    "not torchrun's": ("cls.train", [ONE, "--launcher", "pytorch"], "expected a process of torchrun for --launcher"),
    "metric's counts missing": (
        "cls.test",
        [ONE, "{f.stage_one}", "--cfg-options", "test_evaluator.class_counts=gone.json"],
        "expected a JSON file or a bundled name among .*, got 'gone.json'",
    ),
    "metric's counts pickled": (
        "cls.test",
        [ONE, "{f.stage_one}", "--cfg-options", "test_evaluator.class_counts={f.pickled}"],
        "expected class counts as JSON in '.*pickled.json', but: ",
    ),
    # train_net
    "a config that calls": (
        "d2.train_net",
        ["--config-file", "{f.yaml}"],
        "expected settings .*, but: could not determine",
    ),
    "own annotations empty": (
        "d2.train_net",
        ["--config-file", "{f.d2_empty}"],
        "expected annotations as JSON in '.*'",
    ),
    "own annotations cut": (
        "d2.train_net",
        ["--config-file", "{f.d2_cut}"],
        "expected annotations as JSON in '.*', but",
    ),
    "own annotations pickled": ("d2.train_net", ["--config-file", "{f.d2_pickled}"], "expected annotations as JSON in"),
    "counts pickled": (
        "d2.train_net",
        ["--config-file", "{f.d2_two}", "MODEL.DISALIGN.CLASS_COUNTS", "{f.pickled}"],
        "expected class counts as JSON in '.*pickled.json', but: ",
    ),
    "counts empty": (
        "d2.train_net",
        ["--config-file", "{f.d2_two}", "MODEL.DISALIGN.CLASS_COUNTS", "{f.empty}"],
        "expected class counts as JSON in '.*empty.json', but: ",
    ),
    "stage two where stage one lies": (
        "d2.train_net",
        ["--config-file", "{f.d2_two}", "MODEL.WEIGHTS", "{f.d2_weights}", "OUTPUT_DIR", "{f.d2_weights.parent}"],
        "expected a folder of stage two's own as OUTPUT_DIR, .* with a checkpoint of stage one .'.*_0000004.pth'.",
    ),
    "a batch of none": (
        "d2.train_net",
        ["--config-file", "{f.d2}", "SOLVER.IMS_PER_BATCH", "0"],
        r"can be built in '.*one.yaml', but: Total batch size \(0\) .*; correct it",
    ),
    "no checkpoints": (
        "d2.train_net",
        ["--config-file", "{f.d2}", "SOLVER.CHECKPOINT_PERIOD", "0"],
        "expected 1 or more as SOLVER.CHECKPOINT_PERIOD, got 0",
    ),
    "unknown backbone": (
        "d2.train_net",
        ["--config-file", "{f.d2}", "MODEL.BACKBONE.NAME", "nope"],
        "can be built in '.*one.yaml', but: No object named 'nope' found in 'BACKBONE' registry",
    ),
    "unknown sampler": (
        "d2.train_net",
        ["--config-file", "{f.d2}", "DATALOADER.SAMPLER_TRAIN", "Nope"],
        "can be built in '.*one.yaml', but: Unknown training sampler: Nope",
    ),
    # segmentation
    "check: config missing": (
        "seg.check",
        ["gone.py"],
        "expected a config file, or the name of a shipped one .* 'gone.py'",
    ),
    "check: config broken": ("seg.check", ["{f.broken_config}"], "can be built in '.*broken.py', but: "),
    "check: config raising": ("seg.check", ["{f.raising_config}"], "can be built in '.*', but: division by zero"),
    "check: unknown key": (
        "seg.check",
        ["{f.seg.two}", "--cfg-options", "modle.x=1"],
        "expected --cfg-options of keys that the config has, got modle",
    ),
    "check: config of another kind": ("seg.check", [ONE], "can be built in '.*', but: .* 'decode_head';"),
    "check: counts of no data": (
        "seg.check",
        ["{f.seg.two}", "--counts", "out.json", "--cfg-options", "train_dataloader.dataset.data_root=gone"],
        "expected whole data, but 1 of its sets can't be used, see above",
    ),
    "check: a list that is missing": (
        "seg.check",
        ["{f.seg.two}", "--counts", "out.json", "--cfg-options", "train_dataloader.dataset.ann_file=gone.txt"],
        "expected whole data, but 1 of its sets can't be used, see above",
    ),
    "seg: counts pickled": (
        "seg.train",
        ["{f.seg.two}", "--cfg-options", "load_from={f.segmentor}", f"{COUNTS}={{f.pickled}}"],
        "expected class counts as JSON in '.*pickled.json', but: ",
    ),
    "seg: counts empty": (
        "seg.train",
        ["{f.seg.two}", "--cfg-options", "load_from={f.segmentor}", f"{COUNTS}={{f.empty}}"],
        "expected class counts as JSON in '.*empty.json', but: ",
    ),
    "seg: list empty": (
        "seg.train",
        ["{f.seg.two}", "--cfg-options", "load_from={f.segmentor}", "train_dataloader.dataset.ann_file={f.empty}"],
        "expected the list of images of ADE20KDataset in '.*empty.json', but it is missing or empty",
    ),
    "seg: checkpoint a pickle": ("seg.test", ["{f.seg.two}", "{f.pickled}"], "expected .*pickled.json', but "),
}


def run(command, given):
    """The exit status of a command in this process."""
    main = main_of(command)
    if command == "d2.train_net":
        from d2 import runs

        _, config, *options = given
        return runs.main(config, "work", *options)  # a second OUTPUT_DIR wins
    if COMMANDS[command][1] not in ("mmengine", "mmseg"):
        return main(given)
    from mmengine.registry import DefaultScope

    scope = "mmseg" if command.startswith("seg.") else "mmengine"
    with DefaultScope.overwrite_default_scope(scope):
        return main(quick(command, given))


def quick(command, given):
    """With options that every run of MMEngine gets: no TensorBoard, and a name of its own, which its globals go by."""
    if command not in ("cls.train", "cls.test", "seg.train", "seg.test"):
        return given
    options = [f"experiment_name=bad{time.monotonic_ns()}", "visualizer.vis_backends=[]"]
    return [*given, *([] if "--cfg-options" in given else ["--cfg-options"]), *options]


def only_sentence(err):
    """The one sentence of an error."""
    assert "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, err
    return sentences[0]


def contents(folder):
    """Every file below a folder and what it holds, but for the logs of a framework."""
    logs = ("config.yaml", "metrics.json", "log.txt", "events.out")
    return {
        path: path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix not in (".log", ".py") and not path.name.startswith(logs)
    }


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_in_one_sentence_and_leaves_nothing(case, files, tmp_path, monkeypatch, capfd):
    command, given, sentence = BAD[case]
    main_of(command)
    given = [str(part).format(f=files) for part in given]
    before = contents(files.folder)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert run(command, given) == 2
    assert re.search(f"^error: .*{sentence}", only_sentence(capfd.readouterr().err))
    assert contents(tmp_path) == {}
    assert contents(files.folder) == before
    assert not files.harm.exists()


#: Command -> its arguments, and the suffix of the file that it writes ("": a folder).
WRITERS = {
    "cls.train": ([ONE, "--work-dir", "{out}"], ""),
    "cls.test": ([ONE, "{f.stage_one}", "--work-dir", "{out}"], ""),
    "cls.predict": ([ONE, "{f.stage_one}", "{f.image}", "--out", "{out}"], ".json"),
    "cls.demo": (["--out", "{out}", "--seeds", "0"], ""),
    "d2.train_net": (
        ["--config-file", "{f.d2}", "OUTPUT_DIR", "{out}", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"],
        "",
    ),
    "d2.evaluate": (["{f.detections}", "{f.long_names}", "--out", "{out}"], ".json"),
    "seg.train": (["{f.seg.two}", "--work-dir", "{out}", "--cfg-options", "load_from={f.segmentor}"], ""),
    "seg.test": (["{f.seg.one}", "{f.segmentor}", "--work-dir", "{out}"], ""),
    "seg.check": (["{f.seg.two}", "--counts", "{out}"], ".json"),
    "cls.export": ([TWO, "{f.stage_two}", "{out}", "--size", "8"], ".pt"),
    "convert": (["{f.source}", "{out}", "--to", "cls"], ".pth"),
    "count_classes": (["{f.list}", "--out", "{out}"], ".json"),
    "make_cifar_lt": (["cifar10", "{out}", "--imbalance", "2", "--no-download", "--root", "{f.cifar_10}"], ".npz"),
    "make_shapes": (["--out", "{out}", "--images", "13", "--most", "6", "--val-per-class", "1"], ""),
    "make_tiny_ade": (["{out}", "--size", "128"], ""),
}


@pytest.fixture
def write(files, capsys, monkeypatch):
    """Run a command with a place to write; the exit status and all that it said as an error.

    No file may then grow beyond ``limit`` bytes: the system refuses, so it is a real error from a real write.
    """
    # Only the checksums of the real files are left out.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))

    def write(command, out, *more, limit=resource.RLIM_INFINITY):
        main_of(command)
        given = [str(part).format(f=files, out=out) for part in (*WRITERS[command][0], *more)]
        capsys.readouterr()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            return run(command, given), capsys.readouterr().err
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return write


@pytest.mark.parametrize("command", WRITERS)
def test_a_place_below_a_file_is_refused(command, write, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "new" / f"out{WRITERS[command][1]}"
    status, err = write(command, out)
    assert status == 2
    sentence = only_sentence(err)
    assert re.search("expected a place to write '.*', but: '.*file' is not a folder; free it, or give anoth", sentence)
    assert contents(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize("command", WRITERS)
def test_a_place_that_is_taken_is_refused_and_kept(command, write, tmp_path):
    out = tmp_path / f"out{WRITERS[command][1]}"
    kept = out / "file" if WRITERS[command][1] else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    status, err = write(command, out)
    assert status == 2
    assert re.search(f"expected .*{re.escape(str(out))}'.*; ", only_sentence(err))
    assert contents(tmp_path) == {kept: b"mine"}


@pytest.fixture
def refuse(monkeypatch):
    """Python's own calls fail that make or write something below a folder; the tests run as root, who may do all."""

    def refuse(folder, number):
        def refusing(function, writes):
            def call(path, *args, **kwargs):
                below = isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(folder)
                if below and writes(*args, **kwargs):
                    raise OSError(number, os.strerror(number), path)
                return function(path, *args, **kwargs)

            return call

        monkeypatch.setattr(os, "mkdir", refusing(os.mkdir, lambda *_, **__: True))
        monkeypatch.setattr(os, "open", refusing(os.open, lambda flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR)))
        monkeypatch.setattr("builtins.open", refusing(open, lambda mode="r", *_, **__: set(mode) & set("wax+")))

    return refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES], ids=["read-only", "full", "denied"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(command, number, write, refuse, tmp_path):
    refuse(tmp_path, number)
    status, err = write(command, tmp_path / "new" / f"out{WRITERS[command][1]}")
    assert status == 2
    sentence = only_sentence(err)
    assert re.search(f"expected a place to write '.*', but: {os.strerror(number)}; free it, or give another", sentence)
    assert list(tmp_path.iterdir()) == []


#: Command -> bytes after which a file is full, more than it takes to look whether there is room; and more arguments.
FULL = {
    "cls.train": (80_000, []),
    "d2.train_net": (80_000, []),
    "d2.evaluate": (5_000, ["--force"]),
    "seg.train": (300_000, []),
    "seg.check": (4_200, ["--force"]),
    "cls.export": (60_000, ["--force"]),
    "convert": (10_000, ["--force"]),
    "count_classes": (10_000, ["--force", "--num-classes", "5000"]),
    "make_cifar_lt": (60_000, ["--force"]),
    "make_shapes": (35_000, []),
    "make_tiny_ade": (5_000, []),
}


@pytest.mark.parametrize("command", FULL)
def test_a_disk_that_gets_full_on_the_way_leaves_what_was_there(command, write, tmp_path):
    out = tmp_path / f"out{WRITERS[command][1]}"
    kept = {}
    if WRITERS[command][1]:
        kept = {out: b"old"}
        out.write_bytes(b"old")
    elif not command.startswith("make_"):
        out.mkdir()
        tensor = "decode_head.calibration.margin" if command == "seg.train" else "weight"  # of the run's own stage
        for name in ("epoch_1.pth", "iter_2.pth", "model_final.pth"):
            torch.save({"model": {tensor: torch.ones(1)}}, out / name)
        kept = contents(out)
    limit, more = FULL[command]
    status, err = write(command, out, *more, limit=limit)
    assert status == 2, err
    assert re.search(
        "expected a place to write '.*', but: File too large; free it, or give another", only_sentence(err)
    )
    assert contents(tmp_path) == kept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_gets_full_while_the_framework_writes_is_one_sentence(number, write, tmp_path, monkeypatch):
    from mmengine.runner import Runner

    def train(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Runner, "train", train)
    status, err = write("cls.train", tmp_path)
    assert status == 2
    assert re.search(f"expected room to write in '.*', but: {os.strerror(number)}; .* --resume", only_sentence(err))


def test_another_error_of_the_system_keeps_its_traceback(write, tmp_path, monkeypatch):
    from mmengine.runner import Runner

    def train(self):
        raise ConnectionResetError(errno.ECONNRESET, "a worker is gone")

    monkeypatch.setattr(Runner, "train", train)
    with pytest.raises(ConnectionResetError):
        write("cls.train", tmp_path)


#: Command -> a case of the table, or a place that is none, for a process of its own.
PROCESSES = {
    "cls.train": "arrays pickled",
    "cls.test": "metric's counts missing",
    "cls.predict": "out is an image",
    "cls.demo": "demo: the same seed twice",
    "d2.train_net": "a config that calls",
    "d2.evaluate": "annotations with text",
    "seg.train": "seg: counts pickled",
    "seg.test": "seg: checkpoint a pickle",
    "seg.check": "check: config broken",
    "cls.export": "export: another format",
    "convert": "convert: malicious",
    "count_classes": "count: no labels",
    "make_cifar_lt": "cifar: infinite",
    "make_shapes": "shapes: a file",
    "make_tiny_ade": "ade: a file",
}


def test_every_command_has_a_process():
    assert list(PROCESSES) == list(COMMANDS)
    assert {BAD[case][0] for case in PROCESSES.values()} == set(COMMANDS)


@pytest.mark.parametrize("command", PROCESSES)
def test_the_exit_status_of_the_process_is_2(command, files, tmp_path):
    """As ``python -m`` runs it, in a process that inherits what is imported: the other tables start fresh ones."""
    main_of(command)
    _, given, sentence = BAD[PROCESSES[command]]
    name, given = COMMANDS[command][0], quick(command, [str(part).format(f=files) for part in given])
    err = tmp_path / "err"

    def child():
        os.chdir(tmp_path)
        sys.argv = [name, *given]
        sys.stderr = err.open("w")
        warnings.simplefilter("ignore")  # runpy would rather have imported it itself
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 2, err.read_text()
    assert re.search(f"^error: .*{sentence}", only_sentence(err.read_text()))
    assert not files.harm.exists()


#: Commands whose tables do not say it of themselves yet.
@pytest.mark.parametrize("command", ["cls.demo", "cls.export", "convert", "count_classes", "d2.evaluate", "seg.check"])
def test_unknown_arguments_are_argparses_to_refuse(command, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main_of(command)(["a", "b", "c", "--nope"])
    assert "usage: " in capsys.readouterr().err
