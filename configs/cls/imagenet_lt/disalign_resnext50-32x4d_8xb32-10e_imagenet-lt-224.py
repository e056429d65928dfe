# DisAlign: ImageNet-LT, ResNeXt-50 32x4d, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/imagenet_lt/disalign_resnext50-32x4d_8xb32-10e_imagenet-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Stage one: baseline_resnext50-32x4d_8xb32-90e_imagenet-lt-224.py; another file: --cfg-options stage_one=FILE
# Paper, Table 1, DisAlign ResNeXt-50 32x4d: 52.6 % (61.5/50.7/33.1). Ours: not measured yet.
_base_ = "baseline_resnext50-32x4d_8xb32-90e_imagenet-lt-224.py"
stage_one = "work_dirs/baseline_resnext50-32x4d_8xb32-90e_imagenet-lt-224/epoch_90.pth"
model = dict(type="DisAlignClassifier", loss=dict(rho=1.2, reduction="weighted_mean"))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = dict(T_max=10)
train_cfg = dict(max_epochs=10, val_interval=5)
