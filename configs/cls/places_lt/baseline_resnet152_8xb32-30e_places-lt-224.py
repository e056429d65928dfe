# Stage one: Places-LT, ResNet-152 from ImageNet weights, linear classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/places_lt/baseline_resnet152_8xb32-30e_places-lt-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 4, Baseline: 30.2 % (many/medium/few 45.7/27.3/8.2). Ours: not measured yet.
_base_ = ["../_base_/places_lt.py", "../_base_/schedule_90e.py", "../_base_/default_runtime.py"]
# torchvision's ImageNet weights, downloaded by timm. The trunk's learning rate is a tenth of the classifier's; both are
# those of the reference of Sec. 4.1 (classifier-balancing, config/Places_LT/cls_crt.yaml: 0.01 and 0.1).
model = dict(backbone=dict(name="resnet152.tv_in1k", pretrained=True))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
param_scheduler = dict(T_max=30)
train_cfg = dict(max_epochs=30)
