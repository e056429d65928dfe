import json
import subprocess
import sys

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate

from disalign import InputError
from disalign_d2 import (
    DisAlignCascadeROIHeads,
    DisAlignOutputLayers,
    DisAlignROIHeads,
    add_disalign_config,
    build_model,
    freeze,
)

from .models import COUNTS, batch, detections, tiny_cfg


def python(program, *arguments):
    """Output of a fresh interpreter."""
    command = [sys.executable, "-W", "error:::disalign_d2", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


FRESH = """
import json, sys
import disalign_d2
frameworks = {name.split(".")[0] for name in sys.modules} & {"mmseg", "mmcv", "mmengine", "mmdet", "disalign_cls"}
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY
trains = {}
for file in sys.argv[1:]:
    cfg = get_cfg()
    disalign_d2.add_disalign_config(cfg)
    cfg.merge_from_file(file)
    model = disalign_d2.build_model(cfg)
    assert type(model).__name__ == "GeneralizedRCNN"
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trains[type(model.roi_heads).__name__] = names
registered = [name for registry in (BACKBONE_REGISTRY, ROI_HEADS_REGISTRY) for name, _ in registry]
print(json.dumps({"frameworks": sorted(frameworks), "registered": registered, "trains": trains}))
"""
KINDS = {
    "DisAlignROIHeads": dict(calibrate=True),
    "DisAlignCascadeROIHeads": dict(calibrate=True, classifier="cosine", cascade=True),
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a fresh interpreter finds after ``import disalign_d2``, and builds from YAML files."""
    folder = tmp_path_factory.mktemp("yaml")
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text(tiny_cfg(**kind).dump())
    return json.loads(python(FRESH, *sorted(folder.iterdir())))


# ---------------------------------------------------------------------------------------------------- the import


def test_importing_it_registers_the_heads_and_the_backbone(fresh):
    assert {"DisAlignROIHeads", "DisAlignCascadeROIHeads", "build_small_fpn_backbone"} <= set(fresh["registered"])


def test_it_imports_no_other_framework(fresh):
    assert fresh["frameworks"] == []


def test_a_yaml_builds_the_model(fresh):
    assert set(fresh["trains"]) == set(KINDS)
    for name, kind in KINDS.items():
        model = build_model(tiny_cfg(**kind))
        assert fresh["trains"][name] == [name for name, p in model.named_parameters() if p.requires_grad]


def test_without_detectron2_the_import_says_how_to_install_it():
    program = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import disalign\n"
        "print(disalign.AdaptiveCalibration.__name__)\n"
        "try:\n"
        "    import disalign_d2\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    core, sentence = python(program).splitlines()
    assert core == "AdaptiveCalibration"
    assert sentence.startswith("disalign_d2 needs detectron2, ")
    assert sentence.endswith(
        "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
    )


# ---------------------------------------------------------------------------------------------------- the config

DEFAULTS = {
    "MODEL.DISALIGN.CLASSIFIER": "linear",
    "MODEL.DISALIGN.SCALE": 20.0,
    "MODEL.DISALIGN.LEARN_SCALE": True,
    "MODEL.DISALIGN.CALIBRATE": False,
    "MODEL.DISALIGN.MAGNITUDE": True,
    "MODEL.DISALIGN.MARGIN": True,
    "MODEL.DISALIGN.CONFIDENCE": "learnt",
    "MODEL.DISALIGN.RHO": 0.8,
    "MODEL.DISALIGN.CLASS_COUNTS": "",
    "MODEL.DISALIGN.COUNT_UNIT": "instances",
    "MODEL.DISALIGN.REDUCTION": "weighted_mean",
    "MODEL.DISALIGN.BACKGROUND_BALANCE": "fixed",
    "MODEL.DISALIGN.BACKGROUND_WEIGHT": 1.0,
    "MODEL.DISALIGN.EVAL_STAGE_ONE": True,
    "DATASETS.OWN": [],
    "TEST.FIXED_AP": False,
}


def flat(cfg, prefix=""):
    found = {}
    for key, value in cfg.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_the_config_only_gains_keys():
    stock, ours = get_cfg(), get_cfg()
    add_disalign_config(ours)
    before, after = flat(stock), flat(ours)
    assert {key: value for key, value in after.items() if key not in before} == DEFAULTS
    assert {key: after[key] for key in before} == before


# ------------------------------------------------------------------------------------------------------ LazyConfig


def target(kind):
    return f"{kind.__module__}.{kind.__qualname__}"


def lazy_model(cascade, **options):
    """Detectron2's own LazyConfig of Mask or Cascade R-CNN, with our heads and predictors, and little in it."""
    name = "cascade_rcnn" if cascade else "mask_rcnn_fpn"
    model = model_zoo.get_config(f"common/models/{name}.py").model
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.bottom_up.stages.pop("stride_in_1x1")  # of bottlenecks
    model.proposal_generator.post_nms_topk = (20, 20)
    model.roi_heads.mask_head.conv_dims = [8, 8]
    model.roi_heads.num_classes = len(COUNTS)
    model.roi_heads._target_ = target(DisAlignCascadeROIHeads if cascade else DisAlignROIHeads)
    for predictor in model.roi_heads.box_predictors if cascade else [model.roi_heads.box_predictor]:
        predictor._target_ = target(DisAlignOutputLayers)
        predictor.input_shape.channels = 16
        predictor.test_score_thresh = 0.0001
        predictor.update(options)
    for head in model.roi_heads.box_heads if cascade else [model.roi_heads.box_head]:
        head.fc_dims = [16]
    return model


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("cascade", [False, True])
def test_a_lazy_config_trains_stage_two(tmp_path, cascade):
    config = lazy_model(cascade, calibrate=True, classifier="cosine", class_counts=COUNTS, rho=1.2)
    LazyConfig.save(config, str(tmp_path / "model.yaml"))
    model = instantiate(LazyConfig.load(str(tmp_path / "model.yaml")))
    report = freeze(model)
    predictors = model.roi_heads.box_predictors()
    assert len(predictors) == (3 if cascade else 1)
    assert report.num_trainable == len(predictors) * (2 * 5 + 16 + 1)
    inputs = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = model.train()(inputs)
    assert set(losses) == ({f"loss_cls_stage{index}" for index in range(3)} if cascade else {"loss_cls"})
    sum(losses.values()).backward()
    optimizer.step()
    assert [predictor.loss.rho for predictor in predictors] == [1.2] * len(predictors)
    assert all(predictor.cls_score.calibration.margin.any() for predictor in predictors)
    assert "pred_masks" in detections(model.eval(), inputs)[0]


@pytest.mark.usefixtures("storage")
def test_a_lazy_config_that_was_not_frozen_is_refused():
    model = instantiate(lazy_model(False, calibrate=True, class_counts=COUNTS)).train()
    with pytest.raises(InputError, match=r"call disalign_d2\.freeze\(model\) before training"):
        model(batch())


@pytest.mark.usefixtures("storage")
def test_a_lazy_config_trains_stage_one():
    losses = instantiate(lazy_model(False, classifier="cosine")).train()(batch())
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
