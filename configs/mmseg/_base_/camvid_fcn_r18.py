# CamVid at 240 x 180, 11 classes, and a small FCN from scratch. Layout: docs/datasets.md.
default_scope = "mmseg"
custom_imports = dict(imports=["disalign_mmseg"], allow_failed_imports=False)
classes = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
palette = [
    [128, 128, 128],
    [128, 0, 0],
    [192, 192, 128],
    [128, 64, 128],
    [60, 40, 222],
    [128, 128, 0],
    [192, 128, 128],
    [64, 64, 128],
    [64, 0, 128],
    [64, 64, 0],
    [0, 128, 192],
]
crop_size = (160, 224)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
        test_cfg=dict(size_divisor=4),
    ),
    backbone=dict(
        type="ResNetV1c", depth=18, base_channels=32, stem_channels=32, norm_cfg=dict(type="BN"), norm_eval=False
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        input_transform="resize_concat",
        channels=64,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        num_classes=11,
        norm_cfg=dict(type="BN"),
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=dict(classes=classes, palette=palette),
        data_root="data/camvid",
        data_prefix=dict(img_path="images/train", seg_map_path="annotations/train"),
        reduce_zero_label=False,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=(240, 180), ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.9),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=dict(classes=classes, palette=palette),
        data_root="data/camvid",
        data_prefix=dict(img_path="images/val", seg_map_path="annotations/val"),
        reduce_zero_label=False,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=dict(classes=classes, palette=palette),
        data_root="data/camvid",
        data_prefix=dict(img_path="images/test", seg_map_path="annotations/test"),
        reduce_zero_label=False,
        pipeline=test_pipeline,
    ),
)
# Groups for CamVid, by share of all training pixels: head > 5 %, body 1-5 %, tail < 1 %.
val_evaluator = dict(type="LongTailIoUMetric", class_counts=None, groups=dict(head=0.05, tail=0.01))
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
