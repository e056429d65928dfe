# Stage one: CIFAR-100-LT, imbalance 100, ResNet-32, cosine classifier
#   python -m disalign_cls.train configs/cls/cifar_lt/baseline-cosine_resnet32_1xb128-200e_cifar100-lt.py
# Not in the paper. Ours: 38.8, two seeds (docs/results.md).
_base_ = "baseline_resnet32_1xb128-200e_cifar100-lt.py"
model = dict(classifier="cosine")
