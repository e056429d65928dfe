# Stage one: ImageNet-LT, ResNeXt-50 32x4d, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/imagenet_lt/baseline_resnext50-32x4d_8xb32-90e_imagenet-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 1, Baseline ResNeXt-50 32x4d: 44.4 % (many/medium/few 65.9/37.5/7.7). Ours: not measured yet.
_base_ = ["../_base_/imagenet_lt.py", "../_base_/schedule_90e.py", "../_base_/default_runtime.py"]
model = dict(backbone=dict(name="resnext50_32x4d"))
