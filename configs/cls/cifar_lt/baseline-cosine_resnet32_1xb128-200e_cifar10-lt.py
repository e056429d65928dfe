# Stage one: CIFAR-10-LT, imbalance 100, ResNet-32, cosine classifier
#   python -m disalign_cls.train configs/cls/cifar_lt/baseline-cosine_resnet32_1xb128-200e_cifar10-lt.py
# Not in the paper. Ours: not measured yet.
_base_ = "baseline_resnet32_1xb128-200e_cifar10-lt.py"
model = dict(classifier="cosine")
