# DisAlign: iNaturalist-2018, ResNet-50, 200 epochs, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/inaturalist2018/disalign_resnet50-200e_8xb32-10e_inaturalist2018-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Stage one: baseline_resnet50_8xb32-200e_inaturalist2018-224.py; another file: --cfg-options stage_one=FILE
# Paper, Table 3, DisAlign ResNet-50 200 E: 70.6 %. Ours: not measured yet.
# The paper gives neither rho nor the number of epochs for stage two here; these are ImageNet-LT's.
_base_ = "baseline_resnet50_8xb32-200e_inaturalist2018-224.py"
stage_one = "work_dirs/baseline_resnet50_8xb32-200e_inaturalist2018-224/epoch_200.pth"
model = dict(type="DisAlignClassifier", loss=dict(rho=1.2, reduction="weighted_mean"))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
param_scheduler = dict(T_max=10)
train_cfg = dict(max_epochs=10, val_interval=5)
