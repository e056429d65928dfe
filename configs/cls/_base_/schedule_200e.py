# CIFAR's stage one: SGD, 200 epochs, cosine.
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=20)
optim_wrapper = dict(
    constructor="CalibrationOptimWrapperConstructor",
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=200, by_epoch=True)
val_cfg = dict()
test_cfg = dict()
