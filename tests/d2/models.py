"""Small Detectron2 models and batches for the tests."""

import torch
from detectron2.config import get_cfg
from detectron2.structures import BitMasks, Boxes, Instances

from disalign import load_stage_one
from disalign_d2 import add_disalign_config, build_model

COUNTS = [80, 40, 20, 10, 5]


def tiny_cfg(*options, cascade=False, calibrate=False, classifier="linear"):
    """A Mask or Cascade Mask R-CNN of five classes that takes a few ms an image; ``options``: KEY, VALUE, ..."""
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_STD = [60.0, 60.0, 60.0]
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_small_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "DisAlignCascadeROIHeads" if cascade else "DisAlignROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(COUNTS)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0001
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = cascade
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.DISALIGN.CALIBRATE = calibrate
    cfg.MODEL.DISALIGN.CLASSIFIER = classifier
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.merge_from_list(list(options))
    return cfg


def lively(model):
    """Weights and BatchNorm statistics far from their starts, so that scores, boxes and masks differ."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "calibration" in name or not tensor.is_floating_point() or tensor.dim() == 0:
                continue
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif "running_mean" in name or tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            else:
                fan_in = tensor[0].numel()
                tensor.normal_(std=(2 / fan_in) ** 0.5)
    return model


def random_calibration(model):
    """A calibration that is anywhere but at its start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".calibration." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def batch(num_images=2, num_instances=4, size=64):
    """Training inputs with boxes and masks, as Detectron2's mapper gives them."""
    inputs = []
    for index in range(num_images):
        corner = torch.rand(num_instances, 2) * size / 2
        boxes = torch.cat([corner, corner + 8 + torch.rand(num_instances, 2) * (size / 2 - 8)], dim=1)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.arange(index, index + num_instances) % len(COUNTS)
        masks = torch.zeros(num_instances, size, size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
        inputs.append({"image": image, "height": size, "width": size, "instances": instances})
    return inputs


def stages(*options, **kind):
    """A lively stage one, and its stage two at the start; both in eval mode."""
    one = lively(build_model(tiny_cfg(*options, **kind))).eval()
    two = build_model(tiny_cfg(*options, calibrate=True, **kind)).eval()
    load_stage_one(two, one.state_dict())
    for predictor in two.roi_heads.box_predictors():
        predictor.class_counts = COUNTS
    return one, two


def detections(model, inputs):
    """Image by image: field (boxes, scores, classes, masks, ...) -> tensor."""
    with torch.no_grad():
        outputs = [output["instances"].get_fields() for output in model(inputs)]
    return [{name: getattr(value, "tensor", value) for name, value in fields.items()} for fields in outputs]


def identical(one, two):
    """Whether two lists of dicts of tensors (or two such dicts) hold the same names and bits."""
    if isinstance(one, list):
        return len(one) == len(two) and all(map(identical, one, two))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
