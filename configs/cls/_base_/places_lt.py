# Places-LT: 62,500 training images, 365 classes. Layout: docs/datasets.md.
_base_ = "images_224.py"
model = dict(num_classes=365)
train_dataloader = dict(
    dataset=dict(
        name="places-lt", data_root="data/places365", num_classes=365, ann_file="data/places_lt/Places_LT_train.txt"
    )
)
val_dataloader = dict(
    dataset=dict(
        name="places-lt", data_root="data/places365", num_classes=365, ann_file="data/places_lt/Places_LT_val.txt"
    )
)
test_dataloader = dict(
    dataset=dict(
        name="places-lt", data_root="data/places365", num_classes=365, ann_file="data/places_lt/Places_LT_test.txt"
    )
)
