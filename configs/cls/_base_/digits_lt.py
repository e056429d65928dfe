# Digits: 242 training images, 100 down to 1 per class; a balanced test split of 500.
model = dict(
    type="ImageClassifier",
    backbone=dict(name="small_cnn", in_chans=1),
    num_classes=10,
    data_preprocessor=dict(type="ImgDataPreprocessor", mean=[127.5], std=[127.5]),
)
train_dataloader = dict(
    dataset=dict(
        type="DigitsLT",
        name="digits-lt",
        split="train",
        seed=0,
        transforms=[dict(type="RandomCrop", size=8, padding=1)],
    ),
    batch_size=64,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    dataset=dict(type="DigitsLT", name="digits-lt", split="test", seed=0),
    batch_size=500,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
# Groups for such a small set: many > 30, medium 6-30, few <= 5 training images.
val_evaluator = dict(type="LongTailAccuracy", many=30, few=6)
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=60)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    constructor="CalibrationOptimWrapperConstructor",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-3),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=60, by_epoch=True)
