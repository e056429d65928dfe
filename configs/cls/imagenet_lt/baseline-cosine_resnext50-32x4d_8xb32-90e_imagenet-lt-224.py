# Stage one: ImageNet-LT, ResNeXt-50 32x4d, cosine classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/imagenet_lt/baseline-cosine_resnext50-32x4d_8xb32-90e_imagenet-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 1, Baseline* ResNeXt-50 32x4d: 49.2 % (68.9/42.8/15.6). Ours: not measured yet.
_base_ = "baseline_resnext50-32x4d_8xb32-90e_imagenet-lt-224.py"
model = dict(classifier="cosine")
