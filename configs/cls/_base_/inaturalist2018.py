# iNaturalist-2018: 437,513 training images, 8,142 classes; its test labels are not public, so tests are on val. Layout: docs/datasets.md.
_base_ = "images_224.py"
model = dict(num_classes=8142, data_preprocessor=dict(mean=[118.83, 120.105, 96.9], std=[49.725, 49.47, 48.96]))
train_dataloader = dict(
    dataset=dict(
        name="inaturalist2018",
        data_root="data/inaturalist2018",
        num_classes=8142,
        ann_file="data/inaturalist2018/iNaturalist18_train.txt",
        transforms=[dict(type="RandomResizedCrop", size=224), dict(type="RandomHorizontalFlip")],
    )
)
val_dataloader = dict(
    dataset=dict(
        name="inaturalist2018",
        data_root="data/inaturalist2018",
        num_classes=8142,
        ann_file="data/inaturalist2018/iNaturalist18_val.txt",
    )
)
test_dataloader = dict(
    dataset=dict(
        name="inaturalist2018",
        data_root="data/inaturalist2018",
        num_classes=8142,
        ann_file="data/inaturalist2018/iNaturalist18_val.txt",
        split="val",
    )
)
