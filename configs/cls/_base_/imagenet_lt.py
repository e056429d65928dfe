# ImageNet-LT: 115,846 training images, 1,000 classes. Layout: docs/datasets.md.
_base_ = "images_224.py"
model = dict(num_classes=1000)
train_dataloader = dict(
    dataset=dict(
        name="imagenet-lt",
        data_root="data/imagenet",
        num_classes=1000,
        ann_file="data/imagenet_lt/ImageNet_LT_train.txt",
    )
)
val_dataloader = dict(
    dataset=dict(
        name="imagenet-lt", data_root="data/imagenet", num_classes=1000, ann_file="data/imagenet_lt/ImageNet_LT_val.txt"
    )
)
test_dataloader = dict(
    dataset=dict(
        name="imagenet-lt",
        data_root="data/imagenet",
        num_classes=1000,
        ann_file="data/imagenet_lt/ImageNet_LT_test.txt",
    )
)
