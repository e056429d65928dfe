import re
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads

from disalign import CosineClassifier
from disalign.cli import find_config
from disalign.counts import load_class_counts
from disalign_d2 import add_disalign_config, build_model

FOLDER = Path(__file__).parents[2] / "configs" / "d2"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
LEAVES = [name for name in FILES if not Path(name).name.startswith("Base-")]
LVIS = [name for name in LEAVES if name.startswith("lvis_")]
STAGE_ONE = [name for name in LVIS if "/baseline" in name]
STAGE_TWO = [name for name in LVIS if "/disalign" in name]
CLASSES = {"lvis_v0.5": 1230, "lvis_v1": 1203}

MASK_V05 = "lvis_v0.5/baseline_mask-rcnn_r50_fpn_90k.yaml"
RFS_V05 = "lvis_v0.5/baseline-rfs_mask-rcnn_r50_fpn_90k.yaml"
CASCADE_V05 = "lvis_v0.5/baseline_cascade-mask-rcnn_r50_fpn_90k.yaml"
MASK_V1 = "lvis_v1/baseline_mask-rcnn_r50_fpn_180k.yaml"
# What a stage one of ours may differ in from Detectron2's config of the same model.
OURS = {"SEED", "OUTPUT_DIR", "MODEL.ROI_HEADS.NAME", "MODEL.DISALIGN.CLASS_COUNTS"}
PLAIN_SAMPLER = {"DATALOADER.SAMPLER_TRAIN", "DATALOADER.REPEAT_THRESHOLD"}


@cache
def text(name):
    return (FOLDER / name).read_text()


def settings(name):
    """The lines that are no comments."""
    return [line for line in text(name).splitlines() if line.strip() and not line.lstrip().startswith("#")]


def header(name):
    """The comment at the top."""
    return text(name)[: text(name).index(settings(name)[0])]


def fresh():
    """Detectron2's keys and ours."""
    cfg = get_cfg()
    add_disalign_config(cfg)
    return cfg


@cache
def config(name):
    cfg = fresh()
    cfg.merge_from_file(str(FOLDER / name))
    return cfg


def zoo(name):
    """Detectron2's own config, with our keys at their defaults."""
    cfg = fresh()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return cfg


def differences(one, two, prefix=""):
    """The full names of the keys that differ."""
    found = set()
    for key in one.keys() | two.keys():
        left, right = one.get(key), two.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.add(prefix + key)
    return found


def stage_one_of(name):
    """The stage-one file that a stage-two file inherits."""
    base = yaml.safe_load(text(name))["_BASE_"][0]
    return f"{name.split('/')[0]}/{base}"


def build(cfg):
    """The model on the meta device: shapes without memory."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def overrides(backbone):
    """The documented override of a backbone: the keys for both stages, and stage one's weights."""
    return re.findall(rf"^#   {backbone}: (.+)$", text("_base_/Base-Mask-RCNN-R50-FPN.yaml"), re.MULTILINE)


def test_the_papers_rows_have_a_file_each():
    assert sorted(STAGE_ONE + STAGE_TWO) == LVIS
    # v0.5: 2 architectures x 2 classifiers, COCO x 2, RFS. v1: Mask R-CNN x 2 and Cascade R-CNN's cosine.
    assert len(STAGE_ONE) == 4 + 2 + 1 + 3
    # The repeat-factor stage one takes the stage two of the plain one.
    assert len(STAGE_TWO) == len(STAGE_ONE) - 1
    assert sorted(map(stage_one_of, STAGE_TWO)) == sorted(set(STAGE_ONE) - {RFS_V05})


@pytest.mark.parametrize("name", FILES)
def test_a_file_loads_with_our_keys_alone(name):
    # A key that neither Detectron2 nor we know is a KeyError here.
    assert config(name).VERSION == 2


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_short(name):
    assert 2 <= len(settings(name)) <= 10


@pytest.mark.parametrize("name", LEAVES)
def test_its_header_says_command_paper_and_ours(name):
    file = re.search(r"disalign_d2\.train_net .*--config-file (\S+)", header(name))[1]
    assert file.removeprefix("configs/") == f"d2/{name}"
    assert re.search(r"# (Paper, Table \d, .*\d\d\.\d|Not in the paper)", header(name))
    assert re.search(r"\bOurs\b.*(not measured yet|docs/results\.md|\d\d\.\d)", header(name))
    assert header(name).startswith("# DisAlign: " if "/disalign" in name else "# Stage one")


@pytest.mark.parametrize("name", LVIS)
def test_its_header_says_which_weights_are_public(name):
    assert re.search(r"^# Public (weights|stage one): ", header(name), re.MULTILINE)


@pytest.mark.parametrize("name", STAGE_TWO)
def test_its_command_takes_the_last_weights_of_its_stage_one(name):
    assert f"# Stage one: {Path(stage_one_of(name)).name};" in header(name)
    weights = re.search(r"--config-file \S+ MODEL\.WEIGHTS (\S+)", header(name))[1]
    assert weights == f"{config(stage_one_of(name)).OUTPUT_DIR}/model_final.pth"


def test_every_leaf_has_a_folder_of_its_own():
    folders = [config(name).OUTPUT_DIR for name in LEAVES]
    assert len(set(folders)) == len(LEAVES)
    for name in LVIS:
        assert f"output/{name.removesuffix('.yaml')}" == config(name).OUTPUT_DIR


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh().merge_from_file(find_config(f"d2/{STAGE_TWO[0]}"))


@pytest.mark.parametrize("name", LVIS)
def test_classes_and_counts_are_the_datasets(name):
    dataset = name.split("/")[0]
    cfg = config(name)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == CLASSES[dataset] == len(load_class_counts(dataset))
    assert dataset == cfg.MODEL.DISALIGN.CLASS_COUNTS
    assert ((f"{dataset}_train",), (f"{dataset}_val",)) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)


@pytest.mark.parametrize("name", LVIS)
def test_evaluation_is_lvis_own(name):
    cfg = config(name)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.0001


@pytest.mark.parametrize("name", LVIS)
def test_names_say_what_the_files_do(name):
    method, arch, backbone, neck, schedule = Path(name).stem.split("_")
    cfg = config(name)
    classifier = "cosine" if method.endswith("-cosine") else "linear"
    assert classifier == cfg.MODEL.DISALIGN.CLASSIFIER
    heads = "DisAlignCascadeROIHeads" if arch == "cascade-mask-rcnn" else "DisAlignROIHeads"
    assert heads == cfg.MODEL.ROI_HEADS.NAME
    assert (cfg.MODEL.RESNETS.DEPTH, neck) == (50, "fpn")
    assert method.startswith("disalign") == cfg.MODEL.DISALIGN.CALIBRATE
    assert ("COCO" in cfg.MODEL.WEIGHTS) == (backbone == "r50-coco" and method.startswith("baseline"))
    assert {"90k": 90000, "180k": 180000, "4500it": 4500, "9000it": 9000}[schedule] == cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize(
    ("name", "stock", "more"),
    [
        (RFS_V05, "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", set()),
        (MASK_V05, "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", PLAIN_SAMPLER),
        (MASK_V1, "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", PLAIN_SAMPLER),
    ],
)
def test_stage_one_is_detectron2s_own_but_for_the_sampler(name, stock, more):
    assert differences(config(name), zoo(stock)) == OURS | more


def test_the_cascade_is_detectron2s_own():
    data = {"DATASETS.TRAIN", "DATASETS.TEST", "TEST.DETECTIONS_PER_IMAGE"}
    data |= {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.SCORE_THRESH_TEST"}
    stock = zoo("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml")
    # The zoo's is COCO's, with the same image sizes and the same 90,000 iterations.
    assert differences(config(CASCADE_V05), stock) == OURS | data


@pytest.mark.parametrize("name", [name for name in STAGE_ONE if "-cosine_" in name])
def test_the_cosine_stage_one_differs_by_its_classifier_alone(name):
    cfg = config(name)
    linear = name.replace("-cosine", "")
    if linear in STAGE_ONE:
        assert differences(cfg, config(linear)) == {"MODEL.DISALIGN.CLASSIFIER", "OUTPUT_DIR"}
    # Official: learnt, from 20.
    assert (cfg.MODEL.DISALIGN.SCALE, cfg.MODEL.DISALIGN.LEARN_SCALE) == (20.0, True)


def test_the_coco_start_is_the_zoos():
    coco = MASK_V05.replace("r50", "r50-coco")
    assert differences(config(coco), config(MASK_V05)) == {"MODEL.WEIGHTS", "OUTPUT_DIR"}
    url = model_zoo.get_checkpoint_url("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    assert url.endswith(config(coco).MODEL.WEIGHTS.removeprefix("detectron2://"))


@pytest.mark.parametrize("name", [RFS_V05, "lvis_v0.5/disalign_mask-rcnn_r50_fpn_4500it.yaml"])
def test_the_public_weights_are_the_zoos(name):
    url = model_zoo.get_checkpoint_url("LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    assert url.endswith(re.search(r"MODEL\.WEIGHTS detectron2://(\S+)", header(name))[1])


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_is_its_stage_one_with_method_and_schedule(name):
    method = {"MODEL.DISALIGN.CALIBRATE", "MODEL.WEIGHTS", "OUTPUT_DIR"}
    schedule = {"SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD"}
    clipping = {f"SOLVER.CLIP_GRADIENTS.{key}" for key in ("ENABLED", "CLIP_TYPE")}
    assert differences(config(name), config(stage_one_of(name))) == method | schedule | clipping


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_has_the_official_values(name):
    cfg = config(name)
    steps, iterations = ((4000,), 4500) if name.startswith("lvis_v0.5") else ((8000,), 9000)
    assert (steps, iterations, 0.1) == (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (0.02, 16)
    assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS) == ("WarmupMultiStepLR", 1000)
    assert cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"
    disalign = cfg.MODEL.DISALIGN
    assert (disalign.RHO, disalign.COUNT_UNIT, disalign.BACKGROUND_WEIGHT) == (0.8, "instances", 1.0)
    assert (disalign.MAGNITUDE, disalign.MARGIN, disalign.CONFIDENCE) == (True, True, "learnt")
    assert disalign.REDUCTION == "weighted_mean"
    # Ours, against the collapse of the confidence.
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    assert (cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE) == ("norm", 1.0)


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_has_no_weights_that_it_could_start_from_by_mistake(name):
    assert config(name).MODEL.WEIGHTS == ""


def test_stage_two_after_repeat_factor_sampling_samples_plainly(tmp_path):
    method = FOLDER / "_base_" / "Base-DisAlign-4500it.yaml"
    file = tmp_path / "own.yaml"
    file.write_text(f"_BASE_: [{FOLDER / RFS_V05}, {method}]\n")
    cfg = fresh()
    cfg.merge_from_file(str(file))
    assert cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"


@pytest.mark.parametrize("backbone", ["R-101", "X-101"])
def test_a_backbones_override_is_detectron2s(backbone):
    stock = {"R-101": "mask_rcnn_R_101_FPN_1x.yaml", "X-101": "mask_rcnn_X_101_32x8d_FPN_1x.yaml"}[backbone]
    both_stages, weights = overrides(backbone)
    cfg = config(MASK_V1).clone()
    cfg.merge_from_list(f"{both_stages} {weights}".split())
    assert differences(cfg, zoo(f"LVISv1-InstanceSegmentation/{stock}")) == OURS | PLAIN_SAMPLER


@pytest.mark.parametrize("name", [MASK_V1, CASCADE_V05])
def test_stage_one_trains_the_heads_and_the_trunk_from_res3(name):
    model = build(config(name))
    frozen = {name.split(".")[2] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem", "res2"}  # Detectron2's FREEZE_AT


@pytest.mark.parametrize("name", STAGE_TWO)
def test_stage_two_trains_2k_plus_d_plus_1_numbers_per_box_head(name):
    cfg = config(name)
    model = build(cfg)
    cascade = "cascade" in name
    assert isinstance(model.roi_heads, CascadeROIHeads if cascade else StandardROIHeads)
    predictors = list(model.roi_heads.box_predictor) if cascade else [model.roi_heads.box_predictor]
    assert len(predictors) == (3 if cascade else 1)
    classifier = CosineClassifier if "-cosine" in name else torch.nn.Linear
    assert all(isinstance(predictor.cls_score, classifier) for predictor in predictors)
    assert trainable(model) == len(predictors) * (2 * CLASSES[name.split("/")[0]] + 1024 + 1)
    assert model.roi_heads.mask_head.predictor.out_channels == cfg.MODEL.ROI_HEADS.NUM_CLASSES


@pytest.mark.parametrize("backbone", ["R-101", "X-101"])
def test_stage_two_builds_with_every_backbone_of_the_paper(backbone):
    cfg = config("lvis_v1/disalign-cosine_cascade-mask-rcnn_r50_fpn_9000it.yaml").clone()
    cfg.merge_from_list(overrides(backbone)[0].split())
    model = build(cfg)
    assert len(model.backbone.bottom_up.res4) == 23
    assert trainable(model) == 3 * (2 * 1203 + 1024 + 1)
