# Stage one on CIFAR-100-LT (imbalance 100), ResNet-32. Not in the paper; elsewhere 38.2-40.5 % top-1.
#   python -m disalign_cls.train configs/cls/cifar_lt/baseline_resnet32_1xb128-200e_cifar100-lt.py
# Ours, shortened for a CPU: docs/results.md.
_base_ = ["../_base_/cifar100_lt.py", "../_base_/schedule_200e.py", "../_base_/default_runtime.py"]
