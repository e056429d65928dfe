# Stage one: iNaturalist-2018, ResNet-50, 200 epochs, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/inaturalist2018/baseline_resnet50_8xb32-200e_inaturalist2018-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 3, Baseline ResNet-50 200 E: 65.8 %. Ours: not measured yet.
_base_ = ["../_base_/inaturalist2018.py", "../_base_/schedule_90e.py", "../_base_/default_runtime.py"]
model = dict(backbone=dict(name="resnet50"))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
param_scheduler = dict(T_max=200)
train_cfg = dict(max_epochs=200)
