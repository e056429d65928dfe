"""Bad input to train_net: one sentence, exit status 2, and nothing written but the framework's logs."""

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

detectron2 = pytest.importorskip("detectron2")

import torch
from core.malicious import Malicious

from . import runs
from .annotations import unique
from .runs import load, log, main

CLS = "roi_heads.box_predictor.cls_score."
MARGIN = f"{CLS}calibration.margin"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return runs.trained(tmp_path_factory.getbasetemp() / "d2")


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Name -> path of every bad file, and of the good ones beside them."""
    folder = tmp_path_factory.mktemp("bad")
    made = SimpleNamespace(**vars(tiny) | {"folder": folder})

    def checkpoint(name, change, source=tiny.weights_one):
        content = load(source)
        content = change(content) or content
        torch.save(content, folder / f"{name}.pth")
        setattr(made, name, folder / f"{name}.pth")

    def altered(tensor, alter):
        return lambda content: content["model"].update({tensor: alter(content["model"][tensor])})

    checkpoint("nan", altered(f"{CLS}weight", lambda weight: weight * float("nan")))
    checkpoint("nan_two", altered(MARGIN, lambda margin: margin / 0), tiny.weights_two)
    checkpoint("four_classes", altered(f"{CLS}weight", lambda weight: weight[1:].clone()))
    checkpoint("text", altered(f"{CLS}bias", lambda bias: "text"))

    def without(tensors, name="roi_heads.mask_head.predictor.bias"):
        return {key: tensor for key, tensor in tensors.items() if key != name}

    checkpoint("lacking", lambda content: dict(content, model=without(content["model"])))
    checkpoint("surplus", lambda content: content["model"].update(unknown=torch.zeros(1)))
    checkpoint("a_list", lambda content: [1, 2])
    checkpoint("nothing", lambda content: {"model": {}})

    def cosine(content):
        content["model"][f"{CLS}scale"] = torch.tensor(20.0)
        del content["model"][f"{CLS}bias"]

    checkpoint("cosine", cosine)
    whole = tiny.weights_one.read_bytes()
    made.truncated = folder / "truncated.pth"
    made.truncated.write_bytes(whole[: len(whole) // 2])

    made.harm = folder / "harm"
    content = {"model": Malicious(str(made.harm))}
    torch.save(content, folder / "malicious.pth")
    (folder / "malicious.pkl").write_bytes(pickle.dumps(content))
    made.malicious, made.malicious_pkl = folder / "malicious.pth", folder / "malicious.pkl"
    for path in (made.malicious, made.malicious_pkl):
        # It would do harm if it were read carelessly.
        load_carelessly = torch.load if path.suffix == ".pth" else pickle.load
        with open(path, "rb") as file:
            load_carelessly(file, **{"weights_only": False} if path.suffix == ".pth" else {})
        made.harm.rmdir()
    made.resumable = folder / "resumable"
    made.resumable.mkdir()
    shutil.copy(made.malicious, made.resumable)
    (made.resumable / "last_checkpoint").write_text("malicious.pth")

    for name, content in {
        "zeros": [8, 0, 3, 0, 1],
        "four_counts": [8, 4, 3, 1],
        "negative_counts": [8, 4, 3, -1, 1],
        "fractions": [8, 4, 3, 1.5, 1],
    }.items():
        setattr(made, name, folder / f"{name}.json")
        getattr(made, name).write_text(json.dumps(content))
    made.broken_counts = folder / "broken_counts.json"
    made.broken_counts.write_text("[8, 4,")

    for name, content in {
        "not_yaml": "MODEL: [\n  - :",
        "list_yaml": "[1, 2]",
        "unknown_key": "MODEL:\n  DISALING:\n    RHO: 0.5\n",
        "without_base": "_BASE_: gone.yaml\n",
    }.items():
        setattr(made, name, folder / f"{name}.yaml")
        getattr(made, name).write_text(content)
    made.nan_rho = folder / "nan_rho.yaml"
    made.nan_rho.write_text(tiny.config_two.read_text().replace("RHO: 0.8", "RHO: .nan"))
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    made.binary = folder / "binary.yaml"

    def config(name, calibrate=True, **data):
        path = runs.write_config(folder, tiny.data | data, name, calibrate=calibrate)
        setattr(made, name, path)

    def dataset(name, change=None):
        """An entry of DATASETS.OWN with training data of its own."""
        images = folder / name
        path = runs.write_dataset(images, 12, seed=0)
        content = json.loads(path.read_text())
        if change is not None:
            change(content, images)
        path.write_text(json.dumps(content))
        return [unique(name), str(path), str(images)]

    def truncate(content, images):
        for path in images.glob("*.png"):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])

    def lose(content, images):
        for number in (3, 7):
            (images / f"{number}.png").unlink()

    def misplace(content, images):
        content["annotations"][4]["category_id"] = 6

    def empty(content, images):
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] != 4]

    def fewer(content, images):
        empty(content, images)
        content["categories"] = [one for one in content["categories"] if one["id"] != 4]

    def without_areas(content, images):
        for annotation in content["annotations"]:
            del annotation["area"]

    def without_a_mask(content, images):
        content["annotations"][3]["segmentation"] = []

    def other_letters(content, images):
        content["categories"][0]["frequency"] = "x"

    for change in (without_areas, without_a_mask, other_letters):
        config(change.__name__, val=dataset(change.__name__, change))
    config("truncated_images", train=dataset("truncated_images", truncate))
    config("truncated_images_one", calibrate=False, train=dataset("truncated_images_one", truncate))
    config("missing_images", train=dataset("missing_images", lose))
    config("out_of_range", train=dataset("out_of_range", misplace))
    config("empty_class", train=dataset("empty_class", empty))
    config("other_classes", train=dataset("other_classes", fewer))
    config("missing_annotations", train=[unique("gone"), str(folder / "gone.json"), str(folder)])
    config("missing_validation", val=[unique("gone"), str(folder / "gone.json"), str(folder)])
    config("truncated_validation", val=dataset("truncated_validation", truncate))
    return made


def weights(name):
    return ["MODEL.WEIGHTS", f"{{{name}}}"]


ONE, TWO = weights("weights_one"), weights("weights_two")
EVAL = ["--eval-only"]
DISALIGN = "MODEL.DISALIGN."

#: What is bad -> the config, the options, the flags, and what the sentence says.
BAD = {
    # the config
    "no config": ("", [], [], "expected a config file, or the name of a shipped one in .*, got ''"),
    "config missing": ("gone.yaml", [], [], "expected a config file, or the name of a shipped one in .*'gone.yaml'"),
    "config not YAML": (
        "{not_yaml}",
        [],
        [],
        "expected settings of Detectron2 and DisAlign, but: while parsing",
    ),
    "config a list": ("{list_yaml}", [], [], "expected settings of Detectron2 and DisAlign, but: "),
    "config binary": ("{binary}", [], [], "expected settings of Detectron2 and DisAlign, but: "),
    "config without its base": ("{without_base}", [], [], "expected settings .*, but: .*gone.yaml"),
    "unknown key in the config": ("{unknown_key}", [], [], "but: Non-existent config key: MODEL.DISALING"),
    "unknown key": ("{config_two}", [*ONE, "MODEL.DISALIGN.RO", "1.0"], [], "but: Non-existent .*MODEL.DISALIGN.RO"),
    "key without a value": ("{config_two}", [*ONE, "SOLVER.MAX_ITER"], [], "odd length.*every KEY its VALUE"),
    "flag after a key": ("{config_two}", ONE, ["MODEL.DEVICE", "cpu", "--eval-only"], "odd length"),
    "integer for a float": ("{config_two}", [*ONE, DISALIGN + "RHO", "1"], [], r"a float needs its point \(1.0\)"),
    "text for a number": ("{config_two}", [*ONE, DISALIGN + "RHO", "nan"], [], "but: .*MODEL.DISALIGN.RHO"),
    "unknown backbone": (
        "{config_two}",
        [*ONE, "MODEL.BACKBONE.NAME", "none"],
        [],
        "expected a config that can be built in '.*stage_two.yaml', but: .*none.*; correct it",
    ),
    "unknown backbone, eval": (
        "{config_one}",
        [*ONE, "MODEL.BACKBONE.NAME", "none"],
        EVAL,
        "expected a config that can be built in '.*stage_one.yaml', but: .*none.*; correct it",
    ),
    # the method's settings
    "negative rho": ("{config_two}", [*ONE, DISALIGN + "RHO", "-0.5"], [], "expected a finite rho >= 0, got -0.5"),
    "NaN rho": ("{nan_rho}", ONE, [], "expected a finite rho >= 0, got nan"),
    "unknown reduction": ("{config_two}", [*ONE, DISALIGN + "REDUCTION", "total"], [], "reduction .*, got 'total'"),
    "unknown confidence": ("{config_two}", [*ONE, DISALIGN + "CONFIDENCE", "two"], [], "confidence .*, got 'two'"),
    "unknown classifier": ("{config_two}", [*ONE, DISALIGN + "CLASSIFIER", "nope"], [], "'cosine', got 'nope'"),
    "unknown classifier, stage one": ("{config_one}", [DISALIGN + "CLASSIFIER", "nope"], [], "'cosine', got 'nope'"),
    "unknown unit": ("{config_two}", [*ONE, DISALIGN + "COUNT_UNIT", "boxes"], [], "COUNT_UNIT among .*, got 'boxes'"),
    "nothing to learn": (
        "{config_two}",
        [*ONE, DISALIGN + "MAGNITUDE", "False", DISALIGN + "MARGIN", "False"],
        [],
        "expected magnitude or margin to be learnt, got neither",
    ),
    "sigmoid": (
        "{config_two}",
        [*ONE, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
        [],
        "expected softmax cross-entropy in stage two, got sigmoid or federated loss",
    ),
    "federated": (
        "{config_two}",
        [*ONE, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
        [],
        "expected softmax cross-entropy in stage two, got sigmoid or federated loss",
    ),
    "stock heads": (
        "{config_two}",
        [*ONE, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
        [],
        "expected MODEL.ROI_HEADS.NAME DisAlignROIHeads or .* for a calibration .*, got StandardROIHeads",
    ),
    "stock heads, cosine": (
        "{config_one}",
        ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", DISALIGN + "CLASSIFIER", "cosine"],
        [],
        "expected MODEL.ROI_HEADS.NAME DisAlignROIHeads or .* a cosine classifier, got StandardROIHeads",
    ),
    "AMP without a GPU": ("{config_two}", [*ONE, "SOLVER.AMP.ENABLED", "True"], [], "a GPU for SOLVER.AMP.ENABLED"),
    "fixed AP of few": ("{config_two}", [*ONE, "TEST.FIXED_AP", "True"], [], "DETECTIONS_PER_IMAGE above LVIS's 300"),
    # class counts
    "counts with zeros": (
        "{config_two}",
        [*ONE, DISALIGN + "CLASS_COUNTS", "{zeros}"],
        [],
        "expected at least one of the instances per class, got none of 2 classes in .*: 1, 3; drop",
    ),
    "counts of wrong length": (
        "{config_two}",
        [*ONE, DISALIGN + "CLASS_COUNTS", "{four_counts}"],
        [],
        "expected 5 class counts, as MODEL.ROI_HEADS.NUM_CLASSES says, got 4",
    ),
    "counts of LVIS": (
        "{config_two}",
        [*ONE, DISALIGN + "CLASS_COUNTS", "lvis_v1"],
        [],
        "got 1203 from lvis_v1; set NUM",
    ),
    "counts negative": ("{config_two}", [*ONE, DISALIGN + "CLASS_COUNTS", "{negative_counts}"], [], "expected .*-1"),
    "counts fractions": ("{config_two}", [*ONE, DISALIGN + "CLASS_COUNTS", "{fractions}"], [], "expected .*1.5"),
    "counts missing": ("{config_two}", [*ONE, DISALIGN + "CLASS_COUNTS", "gone.json"], [], "expected .*gone.json"),
    "counts broken": ("{config_two}", [*ONE, DISALIGN + "CLASS_COUNTS", "{broken_counts}"], [], "broken_counts.json"),
    # data
    "other number of classes": (
        "{config_two}",
        [*ONE, "MODEL.ROI_HEADS.NUM_CLASSES", "6"],
        [],
        "expected MODEL.ROI_HEADS.NUM_CLASSES 5, the classes of '.*', got 6",
    ),
    "other number of classes, eval": (
        "{config_two}",
        [*TWO, "MODEL.ROI_HEADS.NUM_CLASSES", "4"],
        EVAL,
        "expected MODEL.ROI_HEADS.NUM_CLASSES 5, the classes of '.*', got 4",
    ),
    "a set of other classes": ("{other_classes}", ONE, [], "expected MODEL.ROI_HEADS.NUM_CLASSES 4"),
    "a class without instances": ("{empty_class}", ONE, [], "got none of 1 classes in .*: yellow; drop"),
    "category out of range": (
        "{out_of_range}",
        ONE,
        [],
        "expected only annotations of the categories in '.*', but 1 have another category_id: 6 of annotation 5",
    ),
    "annotations missing": ("{missing_annotations}", ONE, [], "expected annotations at '.*gone.json', but there is no"),
    "validation missing": ("{missing_validation}", ONE, [], "expected annotations at '.*gone.json', but there is no"),
    "validation missing, eval": ("{missing_validation}", TWO, EVAL, "annotations at '.*gone.json', but there is no"),
    "images missing": ("{missing_images}", ONE, [], r"expected 12 images of '.*', but 2 are missing: .*3.png, .*7.png"),
    "validation without areas": ("{without_areas}", ONE, [], "in '.*': expected area, .* of each annotation, got"),
    "validation without a mask": (
        "{without_a_mask}",
        ONE,
        [],
        "in '.*': expected a segmentation and a finite area of each annotation, got",
    ),
    "validation of other groups": ("{other_letters}", ONE, [], "in '.*': expected r, c or f as frequency .*, got x"),
    "unknown dataset": ("{config_two}", [*ONE, "DATASETS.TRAIN", "('nope',)"], [], "a registered dataset, got 'nope'"),
    "no training set": ("{config_two}", [*ONE, "DATASETS.TRAIN", "()"], [], "a dataset in DATASETS.TRAIN, got none"),
    "no set to evaluate": ("{config_two}", [*TWO, "DATASETS.TEST", "()"], EVAL, "in DATASETS.TEST, got none"),
    "own set not a triple": ("{config_two}", [*ONE, "DATASETS.OWN", "[['a', 'b']]"], [], r"expected entries \[name"),
    "truncated image": ("{truncated_images}", ONE, [], "expected a whole image of 64 x 64 pixels at '.*png', but: "),
    "truncated image, workers": (
        "{truncated_images}",
        [*ONE, "DATALOADER.NUM_WORKERS", "2"],
        [],
        "^error: expected a whole image of 64 x 64 pixels at '.*png', but: ",
    ),
    "truncated image, stage one": ("{truncated_images_one}", [], [], "expected a whole image of 64 x 64 pixels at "),
    "truncated image, eval": ("{truncated_validation}", TWO, EVAL, "expected a whole image of 64 x 64 pixels at "),
    "truncated image, data check": (
        "{truncated_images}",
        [],
        ["--data-check"],
        r"expected complete data, got 12 problems \(above\)",
    ),
    # stage one's file
    "no weights": ("{config_two}", [], [], "expected the stage-one checkpoint as MODEL.WEIGHTS, got an empty one"),
    "stage one absent": ("{config_two}", ["MODEL.WEIGHTS", "gone.pth"], [], "expected a checkpoint at 'gone.pth'"),
    "stage one a folder": ("{config_two}", weights("folder"), [], "expected a checkpoint at "),
    "stage one NaN": ("{config_two}", weights("nan"), [], f"NaN or infinity in {CLS}weight; use"),
    "stage one truncated": ("{config_two}", weights("truncated"), [], "it can't be read .*; is it truncated"),
    "stage one of other classes": ("{config_two}", weights("four_classes"), [], r"\[5, 16\], not \[6, 16\]"),
    "stage one text": ("{config_two}", weights("text"), [], f"lacks 1: {CLS}bias"),
    "stage one lacking": ("{config_two}", weights("lacking"), [], "lacks 1: roi_heads.mask_head.predictor.bias"),
    "stage one surplus": ("{config_two}", weights("surplus"), [], "no tensors beyond the model's .*: unknown"),
    "stage one a list": ("{config_two}", weights("a_list"), [], "expected a state dict of tensors"),
    "stage one nothing": ("{config_two}", weights("nothing"), [], "expected a state dict of tensors"),
    "stage one malicious": ("{config_two}", weights("malicious"), [], "but it also holds posix.mkdir; re-save it"),
    "stage one malicious pkl": ("{config_two}", weights("malicious_pkl"), [], "it holds a posix.mkdir"),
    "stage one calibrated": ("{config_two}", TWO, [], "but it already holds a calibration"),
    "stage one cosine": ("{config_two}", weights("cosine"), [], f"lacks 1: {CLS}bias"),
    "stage one linear": ("{config_two}", [*ONE, DISALIGN + "CLASSIFIER", "cosine"], [], f"lacks 1: {CLS}scale"),
    "stage one from a foreign file": ("{config_one}", weights("malicious"), [], "but it also holds posix.mkdir"),
    "stage one from nothing there": ("{config_one}", ["MODEL.WEIGHTS", "gone.pth"], [], "a checkpoint at 'gone.pth'"),
    "stage one from truncated": ("{config_one}", weights("truncated"), [], "it can't be read .*; is it truncated"),
    "stage one from a list": ("{config_one}", weights("a_list"), [], "expected a state dict of tensors"),
    # what is evaluated
    "eval nothing": ("{config_two}", [], EVAL, "expected a checkpoint to evaluate as MODEL.WEIGHTS, got an empty one"),
    "eval nothing, stage one": ("{config_one}", [], EVAL, "expected a checkpoint to evaluate as MODEL.WEIGHTS, got an"),
    "eval absent": ("{config_two}", ["MODEL.WEIGHTS", "gone.pth"], EVAL, "expected a checkpoint at 'gone.pth'"),
    "eval malicious": ("{config_two}", weights("malicious"), EVAL, "but it also holds posix.mkdir; re-save it"),
    "eval truncated": ("{config_one}", weights("truncated"), EVAL, "it can't be read .*; is it truncated"),
    "eval NaN": ("{config_two}", weights("nan_two"), EVAL, f"NaN or infinity in {MARGIN}"),
    "eval stage one with calibration": ("{config_two}", ONE, EVAL, "expected a checkpoint of stage two for this"),
    "eval stage two without calibration": ("{config_one}", TWO, EVAL, "got one of stage two in .*; evaluate or"),
    "eval lacking": ("{config_one}", weights("lacking"), EVAL, "lacks 1: roi_heads.mask_head.predictor.bias"),
    "eval of other classes": ("{config_one}", weights("four_classes"), EVAL, r"\[5, 16\], not \[6, 16\]"),
    "eval cosine": ("{config_one}", weights("cosine"), EVAL, f"lacks 1: {CLS}bias"),
}


def refusals(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_in_one_sentence_and_leaves_nothing(case, files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = runs.contents(files.folder)
    config, options, flags, sentence = BAD[case]
    first, last = (flags, []) if flags and flags[0].startswith("--") else ([], flags)
    given = [str(part).format(**vars(files)) for part in (config, *options, *last)]
    assert main(given[0], tmp_path / "work", *given[1:], flags=first) == 2
    err = capfd.readouterr().err
    assert len(refusals(err)) == 1, err
    assert re.search(sentence, refusals(err)[0])
    assert "Traceback" not in err
    assert runs.left_behind(tmp_path) == []
    assert runs.contents(files.folder) == before


def test_resuming_from_a_malicious_checkpoint_executes_nothing(files, tmp_path, capsys):
    folder = tmp_path / "resumable"
    shutil.copytree(files.resumable, folder)
    given = ["MODEL.WEIGHTS", files.weights_one, "SOLVER.MAX_ITER", 1]
    for flags in (["--resume"], ["--resume", "--eval-only"]):
        assert main(files.config_two, folder, *given, flags=flags) == 2
        (sentence,) = refusals(capsys.readouterr().err)
        assert "but it also holds posix.mkdir; re-save it" in sentence
    assert runs.left_behind(folder) == ["last_checkpoint", "malicious.pth"]
    # A fresh run looks which stage it is of, can't say, and goes on without it.
    assert main(files.config_two, folder, *given, "DATASETS.TEST", "()") == 0
    assert not files.harm.exists()


def test_data_check_names_every_truncated_image(files, capsys):
    assert main(files.truncated_images, "unused", flags=["--data-check"]) == 2
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "1.png" in line]
    assert out.count("expected a whole image of 64 x 64 pixels") == 12
    assert not Path("unused").exists()


def test_a_zoo_pickle_is_loaded(tiny, tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in load(tiny.weights_one)["model"].items()}
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, protocol=2))
    options = ["MODEL.WEIGHTS", tmp_path / "zoo.pkl", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
    assert main(tiny.config_two, tmp_path / "out", *options) == 0
    assert "zoo.pkl: loaded " in log(tmp_path / "out")
    loaded = load(tmp_path / "out" / "model_final.pth")["model"]
    assert all(np.array_equal(loaded[name].numpy(), array) for name, array in arrays.items())


def test_a_process_among_two_refuses_bad_input_in_one_sentence(files, tmp_path):
    # The first process alone looks for it.
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    arguments = runs.arguments(files.missing_images, tmp_path, "MODEL.WEIGHTS", files.weights_one, flags=flags)
    process = runs.start("-m", "disalign_d2.train_net", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 2, err
    assert len(refusals(err)) == 1, err
    assert "error: expected 12 images of " in err
    assert "Traceback" not in err
    assert runs.left_behind(tmp_path) == []


# ------------------------------------------------------------------------------------------- code of one's own

OWN = """
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY
from disalign_d2 import DisAlignROIHeads

@ROI_HEADS_REGISTRY.register()
class OwnHeads(DisAlignROIHeads):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.box_head.sequential  # no such attribute

@BACKBONE_REGISTRY.register()
def own_backbone(cfg, input_shape):
    import no_such_module
"""


@pytest.fixture
def own(tmp_path):
    """A user's module, and a starter of train_net in a process that imports it first."""
    module = tmp_path / "own.py"
    module.write_text(OWN)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import own;"
        "from disalign_d2.train_net import main; sys.exit(main())"
    )

    def run(config, *options, flags=()):
        arguments = runs.arguments(config, tmp_path / "out", *options, flags=flags)
        process = runs.start("-c", program, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return process.communicate(timeout=300)[1], process.returncode

    return module, run


@pytest.mark.parametrize(
    ("options", "flags", "line", "said"),
    [
        (
            ["MODEL.ROI_HEADS.NAME", "OwnHeads"],
            [],
            "self.box_head.sequential",
            "AttributeError: 'FastRCNNConvFCHead' object has no attribute 'sequential'",
        ),
        (
            ["MODEL.BACKBONE.NAME", "own_backbone"],
            ["--eval-only"],
            "import no_such_module",
            "ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
    ids=["heads", "backbone"],
)
def test_an_error_in_code_of_ones_own_keeps_its_traceback(options, flags, line, said, own, tiny):
    module, run = own
    err, status = run(tiny.config_two, "MODEL.WEIGHTS", tiny.weights_one, *options, flags=flags)
    assert status == 1
    number = next(number for number, text in enumerate(OWN.splitlines(), 1) if line in text)
    assert f'File "{module}", line {number}, in ' in err
    assert said in err
    assert refusals(err) == []
