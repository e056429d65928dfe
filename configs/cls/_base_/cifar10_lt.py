# CIFAR-10-LT, imbalance 100 (12,406 training images): CIFAR-100-LT's file with other data.
_base_ = "cifar100_lt.py"
model = dict(num_classes=10, data_preprocessor=dict(mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]))
train_dataloader = dict(dataset=dict(file="data/cifar10_lt_if100.npz", name="cifar10-lt"))
val_dataloader = dict(dataset=dict(file="data/cifar10_lt_if100.npz", name="cifar10-lt"))
test_dataloader = dict(dataset=dict(file="data/cifar10_lt_if100.npz", name="cifar10-lt"))
