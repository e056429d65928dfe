# Stage one: CIFAR-10-LT, imbalance 100, ResNet-32, linear classifier
#   python -m disalign_cls.train configs/cls/cifar_lt/baseline_resnet32_1xb128-200e_cifar10-lt.py
# Not in the paper. Ours: not measured yet.
_base_ = ["../_base_/cifar10_lt.py", "../_base_/schedule_200e.py", "../_base_/default_runtime.py"]
