"""docs/own_data.md as its reader follows it: a path's two configs copied out, its commands run one after the other.

The rule: a command runs as the page prints it, in a folder that looks like a clone, on tiny data laid out as the page
says. Only options at its end are added (:func:`small`): a tiny network without downloads, small images, no worker
processes, and two iterations or epochs, whose checkpoint is named as the whole run's. Nothing else differs.
"""

import contextlib
import importlib
import importlib.util
import itertools
import json
import logging
import re
import shlex
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "own_data.md").read_text()
#: A section's text by its title.
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
#: Those that lead from data to a model; each has its test below.
PATHS = ("A folder of images", "A COCO JSON", "A folder of masks")
COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")
#: Training images of each colour.
TAIL = (24, 12, 8, 5, 3, 2)

_numbers = itertools.count()


def blocks(text, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in found if not languages or language in languages]


def commands_of(*scripts):
    """The commands of bash blocks, continuation lines joined."""
    lines = "".join(scripts).replace("\\\n", "").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def write_configs(text, folder):
    """Each config under the name in its first line, ``# flowers.py: stage one ...``."""
    for block in blocks(text, "python", "yaml"):
        (folder / re.match(r"# ([\w.]+): ", block)[1]).write_text(block)


def run(command):
    """The exit status of one of the page's commands, in this process."""
    python, *words = shlex.split(command)
    assert python == "python"
    if words[0] == "-m":
        program, words = words[1], words[2:]
        module = importlib.import_module(program)
    else:
        program, words = words[0], words[1:]
        spec = importlib.util.spec_from_file_location(Path(program).stem, program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    with quiet_detectron2() if program.startswith("disalign_d2") else contextlib.nullcontext():
        return module.main([*words, *small(program, words)])


def small(program, words):
    """What is added at the end of a command."""
    if program == "disalign_d2.train_net":
        starts = "birds.yaml" in words and "--data-check" not in words
        return [*SMALL_DETECTOR, *(["MODEL.WEIGHTS", ""] if starts else [])]
    if program in ("disalign_cls.train", "disalign_cls.test", "disalign_mmseg.train", "disalign_mmseg.test"):
        return ["--cfg-options", *short(words[0]), *(SMALL_CLASSIFIER if "_cls" in program else small_segmentor(words))]
    if program in ("disalign_cls.predict", "disalign_cls.export"):
        return ["--cfg-options", *SMALL_CLASSIFIER]
    return []


def short(config):
    """Two epochs or iterations; a name of its own, which mmengine's globals go by."""
    from disalign_mmengine.cli import load_config

    length = load_config(config, {}).train_cfg
    unit = "iters" if "max_iters" in length else "epochs"
    return [
        f"experiment_name=own_data_{next(_numbers)}",
        f"train_cfg.max_{unit}=2",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
        f"default_hooks.checkpoint.filename_tmpl={unit.removesuffix('s')}_{length[f'max_{unit}']}.pth",
        "visualizer.vis_backends=[]",
        *(
            f"{split}_dataloader.{option}"
            for split in ("train", "val", "test")
            for option in ("num_workers=0", "persistent_workers=False")
        ),
    ]


SMALL_CLASSIFIER = [
    "model.backbone.name=cifar_resnet20",
    "model.backbone.pretrained=False",
    "train_dataloader.dataset.transforms.0.size=32",
    *(f"{split}_dataloader.dataset.transforms.{step}.size=32" for split in ("val", "test") for step in (0, 1)),
]
SMALL_DETECTOR = [
    *("MODEL.BACKBONE.NAME", "build_small_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3']", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
    *("MODEL.FPN.IN_FEATURES", "['res2', 'res3']", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]", "MODEL.RPN.IN_FEATURES", "['p2', 'p3']"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3']", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "4"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0", "TEST.DETECTIONS_PER_IMAGE", "20"),
]


def small_segmentor(words):
    options = [
        "model.pretrained=None",
        "model.data_preprocessor.size=(64,64)",
        "model.backbone.depth=18",
        *(f"model.backbone.{name}=8" for name in ("base_channels", "stem_channels")),
        "model.decode_head.in_channels=64",
        *(f"model.decode_head.{name}=8" for name in ("channels", "c1_in_channels", "c1_channels")),
        "train_dataloader.dataset.pipeline.2.scale=(64,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        *(f"{split}_dataloader.dataset.pipeline.1.scale=(64,64)" for split in ("val", "test")),
    ]
    if "streets.py" in words:
        options += ["model.auxiliary_head.in_channels=32", "model.auxiliary_head.channels=8"]
    return options


@contextlib.contextmanager
def quiet_detectron2():
    """Its loggers end with the command, as they do with a process; its report on the machine takes longest of all."""
    from detectron2.engine import defaults
    from detectron2.utils.logger import setup_logger

    setup_logger.cache_clear()
    try:
        with mock.patch.object(defaults, "collect_env_info", return_value=""):
            yield
    finally:
        for name in ("detectron2", "fvcore", "disalign_d2"):
            logger = logging.getLogger(name)
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
                handler.close()
        setup_logger.cache_clear()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The current folder: what a clone has for the page's commands."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(label, size, generator):
    """An image of noise with a disc in its class's colour; the disc's box (left, top, right, bottom)."""
    image = Image.fromarray(generator.integers(64, 192, (size, size, 3), dtype=np.uint8))
    x, y = generator.integers(size // 4, 3 * size // 4, 2).tolist()
    radius = size // 5
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[label])
    return image, box


def make_images(root):
    """data/flowers: a long tail to train on, 4 images of each class to validate and to test."""
    generator = np.random.default_rng(0)
    for split, counts in {"train": TAIL, "val": [4] * 6, "test": [4] * 6}.items():
        for label, count in enumerate(counts):
            folder = root / "data" / "flowers" / split / COLOURS[label]
            folder.mkdir(parents=True)
            for number in range(count):
                draw(label, 32, generator)[0].save(folder / f"{number}.jpg")


def make_coco(root):
    """data/birds: a disc on each image, with a polygon of four corners; category ids with gaps."""
    generator = np.random.default_rng(0)
    folder = root / "data" / "birds"
    (folder / "images").mkdir(parents=True)
    numbers = itertools.count(1)
    for split, counts in {"train": TAIL, "val": [2] * 6, "test": [2] * 6}.items():
        content = {
            "categories": [{"id": 10 * label + 3, "name": name} for label, name in enumerate(COLOURS)],
            "images": [],
            "annotations": [],
        }
        for label in np.repeat(np.arange(6), counts).tolist():
            number = next(numbers)
            image, (left, top, right, bottom) = draw(label, 64, generator)
            image.save(folder / "images" / f"{number}.jpg")
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 64})
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": 10 * label + 3,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
        (folder / f"{split}.json").write_text(json.dumps(content))


def make_masks(root):
    """data/streets: 5 classes, a disc of one on a ground of class 0; the image's border is not labelled."""
    generator = np.random.default_rng(0)
    for split, images in {"train": 24, "val": 8, "test": 8}.items():
        for kind in ("images", "masks"):
            (root / "data" / "streets" / kind / split).mkdir(parents=True)
        for number in range(images):
            label = (1, 1, 2, 1, 3, 1, 2, 4)[number % 8]
            image, box = draw(label, 64, generator)
            mask = Image.new("L", image.size, 0)
            ImageDraw.Draw(mask).ellipse(box, fill=label)
            ImageDraw.Draw(mask).rectangle((0, 0, 63, 63), outline=255)
            image.save(root / "data" / "streets" / "images" / split / f"{number}.jpg")
            mask.save(root / "data" / "streets" / "masks" / split / f"{number}.png")


def saved(path):
    return torch.load(path, weights_only=True)


def moved(state_dict):
    """Whether a calibration has left its start."""
    (magnitude,) = (tensor for name, tensor in state_dict.items() if name.endswith("calibration.magnitude"))
    return bool((magnitude != 1).any())


def test_a_folder_of_images(clone):
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    from torchvision.models import resnet50

    section = SECTIONS[PATHS[0]]
    write_configs(section, clone)
    make_images(clone)
    torch.save(resnet50(num_classes=6).state_dict(), "mine.pth")
    for command in commands_of(*blocks(section, "bash")):
        assert run(command) == 0, command

    expected = dict(zip(COLOURS, TAIL, strict=True))
    counted = json.loads(Path("flowers_counts.json").read_text())
    assert dict(zip(counted["class_names"], counted["train_counts"], strict=True)) == expected
    stage_two = saved("work_dirs/flowers_disalign/epoch_10.pth")
    assert moved(stage_two["state_dict"])
    assert stage_two["meta"]["disalign"]["class_counts"] == counted["train_counts"]
    results = json.loads(Path("work_dirs/flowers_disalign/results_test.json").read_text())
    assert results["images"] == 24
    assert results["figures"].keys() == results["stage_one"]["figures"].keys()
    assert len(json.loads(Path("top5.json").read_text())) == 24
    assert Path("flowers.pt").stat().st_size


def test_a_coco_json(clone):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    section = SECTIONS[PATHS[1]]
    write_configs(section, clone)
    make_coco(clone)
    for command in commands_of(*blocks(section, "bash")):
        assert run(command) == 0, command

    counted = json.loads(Path("birds_counts.json").read_text())
    assert counted["train_counts"] == list(TAIL)
    stage_two = saved("output/birds_disalign/model_final.pth")
    assert moved(stage_two["model"])
    assert stage_two["disalign"]["class_counts"] == list(TAIL)
    for folder, dataset in (("birds_disalign", "birds_val"), ("birds_test", "birds_test")):
        results = json.loads(Path("output", folder, "results.json").read_text())
        assert results[dataset].keys() == {"bbox", "segm"}
        for report in results[dataset].values():
            assert report["figures"].keys() == report["stage_one"]["figures"].keys()
            assert report["figures"]["APf"] is None


def test_a_folder_of_masks(clone):
    pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    section = SECTIONS[PATHS[2]]
    write_configs(section, clone)
    make_masks(clone)
    for command in commands_of(*blocks(section, "bash")):
        assert run(command) == 0, command

    masks = [np.asarray(Image.open(path)).ravel() for path in Path("data/streets/masks/train").iterdir()]
    counted = json.loads(Path("streets_counts.json").read_text())
    assert counted["train_counts"] == np.bincount(np.concatenate(masks), minlength=256)[:5].tolist()
    stage_two = saved("work_dirs/streets_disalign/iter_1000.pth")
    assert moved(stage_two["state_dict"])
    assert stage_two["meta"]["disalign"]["class_counts"] == counted["train_counts"]
    for split in ("val", "test"):
        results = json.loads(Path(f"work_dirs/streets_disalign/results_{split}.json").read_text())
        assert results["images"] == 8
        assert results["total_pixels"] == 24 * 64 * 64
        assert results["figures"].keys() == results["stage_one"]["figures"].keys()


@pytest.mark.parametrize("title", PATHS)
def test_a_path_is_two_configs_and_five_commands(title):
    section = SECTIONS[title]
    assert len(blocks(section, "python", "yaml")) == 2
    assert len(commands_of(blocks(section, "bash")[0])) == 5


def test_no_command_of_the_page_is_left_out():
    run = [block for title in PATHS for block in blocks(SECTIONS[title], "bash")]
    assert blocks(PAGE, "bash") == run
    # The rest are configs, which the commands read, and folders and tables, which are no commands.
    others = [block for block in blocks(PAGE) if block not in (*run, *blocks(PAGE, "python", "yaml"))]
    assert not [block for block in others if re.search(r"^\W*(python|pip|mim|torchrun)\b", block, re.MULTILINE)]
