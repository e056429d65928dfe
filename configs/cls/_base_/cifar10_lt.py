# CIFAR-10-LT, imbalance 100 (12,406 training images), ResNet-32; the usual crop and flip. Layout: docs/datasets.md.
model = dict(
    type="ImageClassifier",
    backbone=dict(name="cifar_resnet32"),
    num_classes=10,
    data_preprocessor=dict(type="ImgDataPreprocessor", mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]),
)
train_dataloader = dict(
    dataset=dict(
        type="ArrayDataset",
        file="data/cifar10_lt_if100.npz",
        name="cifar10-lt",
        split="train",
        transforms=[dict(type="RandomCrop", size=32, padding=4), dict(type="RandomHorizontalFlip")],
    ),
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    dataset=dict(type="ArrayDataset", file="data/cifar10_lt_if100.npz", name="cifar10-lt", split="test"),
    batch_size=500,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="LongTailAccuracy")
test_evaluator = val_evaluator
