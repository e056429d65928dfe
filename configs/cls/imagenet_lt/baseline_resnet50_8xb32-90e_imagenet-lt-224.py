# Stage one: ImageNet-LT, ResNet-50, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/imagenet_lt/baseline_resnet50_8xb32-90e_imagenet-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 1, Baseline ResNet-50: 41.6 % (many/medium/few 64.0/33.8/5.8). Ours: not measured yet.
_base_ = ["../_base_/imagenet_lt.py", "../_base_/schedule_90e.py", "../_base_/default_runtime.py"]
model = dict(backbone=dict(name="resnet50"))
