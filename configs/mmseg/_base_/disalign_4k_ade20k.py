# ADE20K: bundled pixel counts, the official head/body/tail (20/55/75 classes), the official multi-scale and flip test.
_base_ = "disalign_4k.py"
stage_two = dict(
    model=dict(decode_head=dict(loss_decode=dict(class_counts="ade20k"))),
    val_evaluator=dict(class_counts="ade20k", groups="ade20k"),
    test_evaluator=dict(class_counts="ade20k", groups="ade20k"),
    # MMSegmentation 0.x, hence the paper, scales the plain test's 2048 x 512; 1.x scales the original image.
    tta_pipeline=[
        dict(type="LoadImageFromFile"),
        dict(
            type="TestTimeAug",
            transforms=[
                [
                    dict(type="Resize", scale=(int(ratio * 2048), int(ratio * 512)), keep_ratio=True)
                    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
                ],
                [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
                [dict(type="LoadAnnotations", reduce_zero_label=True)],
                [dict(type="PackSegInputs")],
            ],
        ),
    ],
)
