# Stage two over any stage-one config of MMSegmentation 1.x:
#   _base_ = "my_stage_one.py"
#   __import__("disalign_mmseg").stage_two(_base_)
# applies it, with the matching segmentor and head.
# Official: rho 0.2, 4,000 iterations of 8 x 4 images, SGD at lr 0.01, polynomial to 1e-4.
stage_two = dict(
    custom_imports=dict(imports=["disalign_mmseg"], allow_failed_imports=False),
    runner_type="DisAlignSegRunner",
    # All weights come from stage one: --cfg-options stage_one=FILE. Its own initial weights are not inherited.
    stage_one=None,
    load_from=None,
    resume=False,
    work_dir=None,
    model=dict(
        pretrained=None,
        backbone=dict(init_cfg=None),
        decode_head=dict(
            # Official: weights of mean 1, divided by the number of all pixels, including ignored ones.
            loss_decode=dict(
                _delete_=True, type="GRWCrossEntropyLoss", rho=0.2, reduction="mean", avg_non_ignore=False
            ),
        ),
        auxiliary_head=None,
    ),
    train_dataloader=dict(batch_size=4),
    train_cfg=dict(_delete_=True, type="IterBasedTrainLoop", max_iters=4000, val_interval=4000),
    optim_wrapper=dict(
        _delete_=True,
        type="OptimWrapper",
        constructor="CalibrationOptimWrapperConstructor",
        optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4),
        # Ours: without it the confidence can fall to 0 for all pixels in the first steps; docs/deviations.md.
        clip_grad=dict(max_norm=1.0),
    ),
    param_scheduler=[dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=4000, by_epoch=False)],
    log_processor=dict(by_epoch=False),
    # The learning rate scales with the batch, whatever the number of GPUs.
    auto_scale_lr=dict(enable=True, base_batch_size=32),
    default_hooks=dict(
        checkpoint=dict(by_epoch=False, interval=1000, max_keep_ckpts=2),
        plain_checkpoint=dict(type="PlainCheckpointHook"),
        class_counts=dict(type="ClassCountsHook"),
        stage_two=dict(type="StageTwoHook"),
        comparison=dict(type="ComparisonHook"),
    ),
    val_evaluator=dict(_delete_=True, type="LongTailIoUMetric"),
    test_evaluator=dict(_delete_=True, type="LongTailIoUMetric"),
    randomness=dict(seed=0),
)
