# 224 x 224 images named in list files, with classifier-balancing's augmentation and ImageNet's statistics.
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(type="ImgDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
)
train_dataloader = dict(
    dataset=dict(
        type="ListDataset",
        split="train",
        transforms=[
            dict(type="RandomResizedCrop", size=224),
            dict(type="RandomHorizontalFlip"),
            dict(type="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4),
        ],
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
        split="val",
        transforms=[dict(type="Resize", size=256), dict(type="CenterCrop", size=224)],
    ),
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = dict(val_dataloader, dataset=dict(val_dataloader["dataset"], split="test"))
val_evaluator = dict(type="LongTailAccuracy")
test_evaluator = val_evaluator
