# iNaturalist-2018: 437,513 training images, 8,142 classes; 224 x 224. Layout: docs/datasets.md.
model = dict(
    type="ImageClassifier",
    num_classes=8142,
    data_preprocessor=dict(type="ImgDataPreprocessor", mean=[118.83, 120.105, 96.9], std=[49.725, 49.47, 48.96]),
)
train_dataloader = dict(
    dataset=dict(
        type="ListDataset",
        name="inaturalist2018",
        split="train",
        ann_file="data/inaturalist2018/iNaturalist18_train.txt",
        data_root="data/inaturalist2018",
        num_classes=8142,
        transforms=[dict(type="RandomResizedCrop", size=224), dict(type="RandomHorizontalFlip")],
    ),
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    dataset=dict(
        type="ListDataset",
        name="inaturalist2018",
        split="val",
        ann_file="data/inaturalist2018/iNaturalist18_val.txt",
        data_root="data/inaturalist2018",
        num_classes=8142,
        transforms=[dict(type="Resize", size=256), dict(type="CenterCrop", size=224)],
    ),
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="LongTailAccuracy")
test_evaluator = val_evaluator
