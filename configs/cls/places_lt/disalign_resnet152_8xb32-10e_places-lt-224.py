# DisAlign: Places-LT, ResNet-152 from ImageNet weights, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/places_lt/disalign_resnet152_8xb32-10e_places-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Stage one: baseline_resnet152_8xb32-30e_places-lt-224.py; another file: --cfg-options stage_one=FILE
# Paper, Table 4, DisAlign: 39.3 % (40.4/42.4/30.1). Ours: not measured yet.
# The paper gives neither rho nor the number of epochs for stage two here; these are ImageNet-LT's.
_base_ = "baseline_resnet152_8xb32-30e_places-lt-224.py"
stage_one = "work_dirs/baseline_resnet152_8xb32-30e_places-lt-224/epoch_30.pth"
model = dict(backbone=dict(pretrained=False), type="DisAlignClassifier", loss=dict(rho=1.2, reduction="weighted_mean"))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = dict(T_max=10)
train_cfg = dict(max_epochs=10, val_interval=5)
