"""Small segmentors, as stage one and as stage two."""

import copy

import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

COUNTS = [80, 40, 20, 10, 5]

FCN = dict(
    type="EncoderDecoder",
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        base_channels=8,
        stem_channels=8,
        strides=(1, 2, 2, 1),
        norm_cfg=dict(type="BN"),
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=64,
        in_index=3,
        channels=6,
        num_convs=1,
        num_classes=5,
        norm_cfg=dict(type="BN"),
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    auxiliary_head=dict(
        type="FCNHead", in_channels=32, in_index=2, channels=4, num_convs=1, num_classes=5, norm_cfg=dict(type="BN")
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
OCR = {
    **FCN,
    "type": "CascadeEncoderDecoder",
    "num_stages": 2,
    "decode_head": [
        {**FCN["decode_head"], "in_channels": 32, "in_index": 2},
        dict(
            type="OCRHead",
            in_channels=64,
            in_index=3,
            channels=6,
            ocr_channels=4,
            num_classes=5,
            norm_cfg=dict(type="BN"),
            loss_decode=dict(type="CrossEntropyLoss"),
        ),
    ],
}
THREE = {**OCR, "num_stages": 3, "decode_head": [*OCR["decode_head"], dict(OCR["decode_head"][-1])]}


def stage_one(config=FCN):
    """A stock segmentor, with scores like a trained one's."""
    model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    heads = model.decode_head if isinstance(config["decode_head"], list) else [model.decode_head]
    for head in heads:
        torch.nn.init.normal_(head.conv_seg.weight, std=0.5)
    return model


def stage_two_config(config=FCN, **loss):
    config = copy.deepcopy(config)
    config["type"] = f"DisAlign{config['type']}"
    last = config["decode_head"][-1] if isinstance(config["decode_head"], list) else config["decode_head"]
    last["type"] = f"DisAlign{last['type']}"
    last["loss_decode"] = dict(type="GRWCrossEntropyLoss", **{"class_counts": COUNTS, **loss})
    return config


def stage_two(config=FCN, **loss):
    return MODELS.build(ConfigDict(stage_two_config(config, **loss)))


def samples(labels):
    """Data samples of (N, H, W) labels."""
    found = []
    for one in labels:
        sample = SegDataSample(metainfo=dict(img_shape=tuple(one.shape), ori_shape=tuple(one.shape)))
        sample.gt_sem_seg = PixelData(data=one[None])
        found.append(sample)
    return found
