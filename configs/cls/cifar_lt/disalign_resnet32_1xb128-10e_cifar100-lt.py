# DisAlign: CIFAR-100-LT, imbalance 100, ResNet-32, linear classifier
#   python -m disalign_cls.train configs/cls/cifar_lt/disalign_resnet32_1xb128-10e_cifar100-lt.py
# Stage one: baseline_resnet32_1xb128-200e_cifar100-lt.py; another file: --cfg-options stage_one=FILE
# Not in the paper. Ours: 42.3 and 41.9 (docs/results.md).
_base_ = "baseline_resnet32_1xb128-200e_cifar100-lt.py"
stage_one = "work_dirs/baseline_resnet32_1xb128-200e_cifar100-lt/epoch_200.pth"
model = dict(type="DisAlignClassifier", loss=dict(rho=1.2, reduction="weighted_mean"))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = dict(T_max=10)
train_cfg = dict(max_epochs=10, val_interval=5)
