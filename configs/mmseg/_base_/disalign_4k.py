# Stage two over any stage-one config of MMSegmentation 1.x. It stands after that config in `_base_`, and the line
#   _base_.merge(_base_.pop("stage_two"))
# lays it over. mmengine does not let two bases set the same key, so all of it is under one key of its own.
# Official: rho 0.2, 4,000 iterations of 8 x 4 images, SGD at lr 0.01, polynomial to 1e-4.
stage_two = dict(
    custom_imports=dict(imports=["disalign_mmseg"], allow_failed_imports=False),
    runner_type="DisAlignRunner",
    # All weights come from stage one: --cfg-options load_from=FILE. Stage one's own start is not stage two's.
    load_from=None,
    resume=False,
    work_dir=None,
    model=dict(
        type="DisAlignEncoderDecoder",
        pretrained=None,
        backbone=dict(init_cfg=None),
        decode_head=dict(
            # Official: weights of mean 1, divided by the number of all pixels, ignored ones too.
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
        # Weight decay would pull the magnitude to 0; its identity is 1.
        paramwise_cfg=dict(custom_keys={"calibration.magnitude": dict(decay_mult=0.0)}),
    ),
    param_scheduler=[dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=4000, by_epoch=False)],
    log_processor=dict(by_epoch=False),
    # The learning rate follows the batch, whatever the number of GPUs.
    auto_scale_lr=dict(enable=True, base_batch_size=32),
    default_hooks=dict(
        checkpoint=dict(by_epoch=False, interval=1000, max_keep_ckpts=2),
        plain_checkpoint=dict(type="PlainCheckpointHook"),
        class_counts=dict(type="ClassCountsHook"),
        frozen=dict(type="FrozenHook"),
        confidence=dict(type="ConfidenceHook"),
        comparison=dict(type="ComparisonHook"),
    ),
    val_evaluator=dict(_delete_=True, type="LongTailIoUMetric"),
    test_evaluator=dict(_delete_=True, type="LongTailIoUMetric"),
    randomness=dict(seed=0),
)
