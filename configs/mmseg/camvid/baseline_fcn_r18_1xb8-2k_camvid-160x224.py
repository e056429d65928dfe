# Stage one: CamVid, a small FCN on ResNet-18 of half width, from scratch. An example of ours, not in the paper.
#   mim train mmseg configs/mmseg/camvid/baseline_fcn_r18_1xb8-2k_camvid-160x224.py
# Without mim: python -m disalign_mmseg.train mmseg/camvid/baseline_fcn_r18_1xb8-2k_camvid-160x224.py
# Figures of three seeds: docs/results.md.
_base_ = "../_base_/camvid_fcn_r18.py"
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=2000)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type="PolyLR", power=0.9, eta_min=1e-5, begin=100, end=2000, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    plain_checkpoint=dict(type="PlainCheckpointHook"),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
