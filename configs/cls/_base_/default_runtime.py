# Common to all runs: hooks, logs (text, JSON, TensorBoard), one seed.
custom_imports = dict(imports=["disalign_cls"], allow_failed_imports=False)
default_scope = "mmengine"
runner_type = "DisAlignRunner"
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    plain_checkpoint=dict(type="PlainCheckpointHook"),
    class_counts=dict(type="ClassCountsHook"),
    broadcast_buffers=dict(type="BroadcastBuffersHook"),
    stage_two=dict(type="StageTwoHook"),
    results=dict(type="ResultsHook"),
)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
log_processor = dict(by_epoch=True)
env_cfg = dict(cudnn_benchmark=True)
randomness = dict(seed=0)
