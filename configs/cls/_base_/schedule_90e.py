# Stage one from scratch: SGD, 90 epochs, cosine by epoch; lr 0.1 for 256 images a step (official ImageNet-LT setting).
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=10)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    constructor="CalibrationOptimWrapperConstructor",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=90, by_epoch=True)
# The learning rate follows the batch, whatever the number of GPUs.
auto_scale_lr = dict(enable=True, base_batch_size=256)
