"""The examples of Detectron2: one's own box predictor, and a ViTDet as a LazyConfig in Detectron2's own train loop."""

import pytest

pytest.importorskip("detectron2")

import argparse
import importlib.util
from pathlib import Path

import detectron2
import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image

from disalign import InputError
from disalign.stage_two import calibrations
from disalign_d2 import DisAlignCascadeROIHeads, DisAlignGeneralizedRCNN, DisAlignOutputLayers, freeze

from .conftest import EXAMPLES

CALIBRATION = {
    f"roi_heads.box_predictor.cls_score.calibration.{name}"
    for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
}


# --------------------------------------------------------------------------------------------- one's own box predictor


def test_the_custom_predictor(example, tmp_path, capsys):
    module = example("d2_custom_predictor")
    assert module.main(["--iterations", "3", "--out", str(tmp_path)]) is None
    assert f"{2 * 4 + 32 + 1} numbers trained" in capsys.readouterr().out
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("stage_one.pth", "disalign.pth"))
    assert set(two["model"]) - set(one["model"]) == CALIBRATION
    assert all(
        torch.equal(two["model"][name], one["model"][name]) for name in two["model"].keys() & one["model"].keys()
    )
    assert two["disalign"]["class_counts"] == module.COUNTS


def test_the_custom_predictors_own_part_is_there_in_both_stages(example):
    module = example("d2_custom_predictor")
    own = []
    for calibrate in (False, True):
        predictor = module.build_model(module.config(calibrate)).roi_heads.box_predictor
        assert type(predictor) is module.DisAlignMyOutputLayers
        assert predictor.temperature == 0.1
        features = torch.randn(6, 32)
        scores, deltas = predictor.eval()(features)
        # Normalised, so that the feature's length does not count.
        for first, second in zip((scores, deltas), predictor(3 * features), strict=True):
            torch.testing.assert_close(first, second)
        plain = FastRCNNOutputLayers.forward(predictor, features)
        assert not torch.allclose(plain[0], scores)
        own.append(predictor)
    assert [predictor.calibrated for predictor in own] == [False, True]


def test_a_cascade_takes_the_class_too(example):
    module = example("d2_custom_predictor")

    @ROI_HEADS_REGISTRY.register()
    class MyCascadeROIHeads(DisAlignCascadeROIHeads):
        output_layers = module.DisAlignMyOutputLayers

    cfg = module.config(calibrate=True)
    cfg.MODEL.ROI_HEADS.NAME = "MyCascadeROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    predictors = module.build_model(cfg).roi_heads.box_predictors()
    assert [type(predictor) for predictor in predictors] == [module.DisAlignMyOutputLayers] * 3
    weights = [predictor.box2box_transform.weights for predictor in predictors]
    assert weights == [tuple(one) for one in cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS]


def test_a_temperature_reaches_the_class_through_disaligns(example):
    module = example("d2_custom_predictor")
    options = dict(box2box_transform=Box2BoxTransform((1, 1, 1, 1)), num_classes=4)
    for calibrate in (False, True):
        predictor = module.DisAlignMyOutputLayers(
            ShapeSpec(channels=8), temperature=0.5, calibrate=calibrate, class_counts=module.COUNTS, **options
        )
        assert predictor.temperature == 0.5


# ----------------------------------------------------------------------------------------------------------- LazyConfig

#: The same file at 64 pixels: a ViT of two blocks of width 16.
TINY = [
    "model.backbone.net.img_size=64",
    "model.backbone.net.embed_dim=16",
    "model.backbone.net.depth=2",
    "model.backbone.net.num_heads=2",
    "model.backbone.net.window_size=2",
    "model.backbone.net.window_block_indexes=[0]",
    "model.backbone.net.drop_path_rate=0.5",
    "model.backbone.square_pad=64",
    "model.backbone.out_channels=16",
    "model.proposal_generator.head.in_channels=16",
    "model.proposal_generator.post_nms_topk=[30,30]",
    "model.roi_heads.num_classes=5",
    "model.roi_heads.box_head.input_shape.channels=16",
    "model.roi_heads.box_head.conv_dims=[16]",
    "model.roi_heads.box_head.fc_dims=[32]",
    "model.roi_heads.mask_head.input_shape.channels=16",
    "model.roi_heads.mask_head.conv_dims=[16,16]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
]
FOR_STAGE_TWO = ["model.roi_heads.box_predictor.class_counts=[80,40,20,10,5]"]
RUN = [
    "train.device=cpu",
    "train.max_iter=2",
    "train.checkpointer.period=2",
    "dataloader.train.num_workers=0",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "dataloader.train.mapper.augmentations.0.max_size=64",
    "lr_multiplier.warmup_length=0",
]


def lazy(*overrides):
    config = LazyConfig.load(str(EXAMPLES / "d2_lazy_vitdet.py"))
    return LazyConfig.apply_overrides(config, [*TINY, *FOR_STAGE_TWO, *overrides])


def stock_model():
    """Stage one: the same file with Detectron2's own classes in place of ours."""
    model = lazy().model
    model._target_, model.roi_heads._target_ = GeneralizedRCNN, StandardROIHeads
    predictor = model.roi_heads.box_predictor
    predictor._target_ = FastRCNNOutputLayers
    for ours in ("calibrate", "class_counts", "rho"):
        predictor.pop(ours)
    return model


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A stock model in eval mode, and its checkpoint as Detectron2 saves it."""
    torch.manual_seed(0)
    model = lively(instantiate(stock_model())).eval()
    path = tmp_path_factory.mktemp("lazy") / "stage_one.pth"
    torch.save({"model": model.state_dict(), "iteration": 7}, path)
    return model, path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Name of a registered set of two images."""
    folder = tmp_path_factory.mktemp("images")
    records = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        box = dict(bbox=[8, 8, 40, 40], bbox_mode=BoxMode.XYXY_ABS, category_id=number)
        sizes = dict(height=64, width=64)
        records.append(dict(file_name=str(folder / f"{number}.png"), image_id=number, annotations=[box], **sizes))
    name = "examples_lazy"
    DatasetCatalog.register(name, lambda: records)
    yield name
    DatasetCatalog.remove(name)


@pytest.fixture(scope="module")
def loop():
    """Detectron2's own tools/lazyconfig_train_net.py, which is installed beside it."""
    path = Path(detectron2.__file__).parents[1] / "tools" / "lazyconfig_train_net.py"
    if not path.is_file():
        pytest.skip("needs Detectron2's tools/lazyconfig_train_net.py, which is not installed beside it")
    spec = importlib.util.spec_from_file_location("lazyconfig_train_net", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images():
    return [{"image": torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)} for _ in range(2)]


@torch.no_grad()
def outputs(model, inputs):
    return [output["instances"].get_fields() for output in model.eval()(inputs)]


def identical(one, two):
    return all(
        torch.equal(getattr(first[name], "tensor", first[name]), getattr(second[name], "tensor", second[name]))
        for first, second in zip(one, two, strict=True)
        for name in first
    )


def test_the_config_is_lvis_v1s_as_it_stands():
    config = LazyConfig.load(str(EXAMPLES / "d2_lazy_vitdet.py"))
    predictor = config.model.roi_heads.box_predictor
    assert (predictor.num_classes, predictor.class_counts, predictor.rho) == (1203, "lvis_v1", 0.8)
    assert instantiate(predictor).calibrated
    assert config.dataloader.evaluator.dataset_name == config.dataloader.test.dataset.names == "lvis_v1_val"
    assert config.model.input_format == config.dataloader.test.mapper.image_format == "RGB"
    schedule = instantiate(config.lr_multiplier)
    assert [round(schedule(step / 9000), 3) for step in (0, 4500, 7999, 8000, 8999)] == [0.001, 1, 1, 0.1, 0.1]


def test_vitdet_starts_at_stage_one_bit_for_bit(stage_one):
    model, path = stage_one
    two = instantiate(lazy().model)
    state = torch.load(path, weights_only=True)["model"] | {"pixel_mean": torch.zeros(3)}  # as old checkpoints have it
    missing = two.load_state_dict(state, strict=False).missing_keys
    assert set(missing) == CALIBRATION
    inputs = images()
    before, after = outputs(model, inputs), outputs(two, inputs)
    assert sum(len(image["scores"]) for image in before) > 5
    assert identical(before, after)
    with torch.no_grad():
        two.roi_heads.box_predictor.cls_score.calibration.margin.add_(torch.randn(5))
    assert [image["scores"].tolist() for image in outputs(two, inputs)] != [
        image["scores"].tolist() for image in before
    ]


def test_detectron2s_own_loop_trains_the_calibration_alone(loop, dataset, stage_one, tmp_path):
    overrides = [f"train.init_checkpoint={stage_one[1]}", f"train.output_dir={tmp_path}", "optimizer.lr=0.5"]
    config = lazy(*RUN, *overrides, f"dataloader.train.dataset.names={dataset}")
    config.dataloader.pop("evaluator")
    loop.do_train(argparse.Namespace(resume=False), config)
    after = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    before = stage_one[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(after) - set(before) == CALIBRATION
    assert after["roi_heads.box_predictor.cls_score.calibration.margin"].any()

    # Evaluation and --resume take the whole of it, and no less.
    two = instantiate(config.model)
    two.load_state_dict(after, strict=True)
    name = "roi_heads.box_predictor.cls_score.calibration.margin"
    assert torch.equal(two.state_dict()[name], after[name])
    after.pop(name)
    with pytest.raises(InputError, match=r"lacks 1: .*margin"):
        two.load_state_dict(after, strict=False)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "unknown"])
def test_the_loop_stops_at_a_stage_one_that_does_not_fit(loop, dataset, stage_one, tmp_path, damage):
    state = {name: tensor.clone() for name, tensor in stage_one[0].state_dict().items()}
    name = "roi_heads.box_head.fc1.weight"
    if damage == "missing":
        state.pop(name)
    elif damage == "shape":
        state[name] = state[name][:, :3]
    elif damage == "nan":
        state[name][0, 0] = float("nan")
    else:
        state["roi_heads.other"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "broken.pth")
    overrides = [f"train.init_checkpoint={tmp_path / 'broken.pth'}", f"train.output_dir={tmp_path}"]
    config = lazy(*RUN, *overrides, f"dataloader.train.dataset.names={dataset}")
    with pytest.raises(InputError, match=r"roi_heads\.(box_head\.fc1\.weight|other)"):
        loop.do_train(argparse.Namespace(resume=False), config)
    assert not (tmp_path / "model_final.pth").exists()


def test_the_magnitude_does_not_decay():
    config = lazy("optimizer.weight_decay=0.3")
    model = config.optimizer.params.model = instantiate(config.model)
    groups = instantiate(config.optimizer).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    trained = {
        name: decays.pop(id(parameter)) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert not decays
    assert {name.rpartition("calibration.")[2]: decay for name, decay in trained.items()} == {
        "magnitude": 0.0,
        "margin": 0.3,
        "confidence.weight": 0.3,
        "confidence.bias": 0.3,
    }


def test_it_survives_yaml(tmp_path):
    LazyConfig.save(lazy("train.init_checkpoint=stage_one.pth"), str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()
    model = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == CALIBRATION


def test_dropped_paths_stay_in_stage_two():
    torch.manual_seed(0)
    model = lively(instantiate(lazy().model)).train()
    pixels = torch.randn(1, 3, 64, 64)
    first, second = model.backbone(pixels), model.backbone(pixels)
    assert all(torch.equal(first[name], second[name]) for name in first)
    stock = lively(instantiate(stock_model())).train()
    first, second = stock.backbone(pixels), stock.backbone(pixels)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_without_a_calibration_is_refused():
    with pytest.raises(InputError, match="expected a model with a calibrated box predictor, got none"):
        instantiate(lazy("model.roi_heads.box_predictor.calibrate=False").model)


def test_the_federated_loss_of_detectron2s_lvis_vitdet_is_refused():
    with pytest.raises(InputError, match="no background score"):
        instantiate(lazy("+model.roi_heads.box_predictor.use_sigmoid_ce=True").model)


def test_stock_roi_heads_are_enough_without_masks_and_refused_with_them(example):
    config = lazy().model
    config._target_, config.roi_heads._target_ = GeneralizedRCNN, StandardROIHeads
    with pytest.raises(InputError, match=r"expected DisAlignROIHeads .* got StandardROIHeads, which would train them"):
        freeze(instantiate(config))
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        config.roi_heads.pop(part)
    model = instantiate(config)
    assert freeze(model).num_trainable == 2 * 5 + 32 + 1
    assert list(calibrations(model)) == ["roi_heads.box_predictor.cls_score.calibration"]
    with EventStorage():
        losses = model.train()(example("d2_custom_predictor").squares())
    assert set(losses) == {"loss_cls"}
    sum(losses.values()).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == CALIBRATION


def test_a_cascade_is_calibrated_stage_by_stage():
    model = model_zoo.get_config("common/models/cascade_rcnn.py").model
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.bottom_up.stages.pop("stride_in_1x1")  # of bottlenecks
    model.roi_heads.num_classes = 5
    # As docs/own_model.md says.
    model._target_ = DisAlignGeneralizedRCNN
    model.roi_heads._target_ = DisAlignCascadeROIHeads
    for predictor in model.roi_heads.box_predictors:
        predictor.update(_target_=DisAlignOutputLayers, calibrate=True, class_counts=[80, 40, 20, 10, 5], rho=0.8)
    model = instantiate(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (2 * 5 + 1024 + 1)
