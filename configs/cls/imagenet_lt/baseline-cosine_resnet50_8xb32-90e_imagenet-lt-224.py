# Stage one: ImageNet-LT, ResNet-50, cosine classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/imagenet_lt/baseline-cosine_resnet50_8xb32-90e_imagenet-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 1, Baseline* ResNet-50: 48.4 % (68.4/41.7/15.2). Ours: not measured yet.
_base_ = "baseline_resnet50_8xb32-90e_imagenet-lt-224.py"
model = dict(classifier="cosine")
