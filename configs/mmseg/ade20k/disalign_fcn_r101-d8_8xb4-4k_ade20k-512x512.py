# DisAlign: ADE20K, FCN, ResNet-101
#   mim train mmseg configs/mmseg/ade20k/disalign_fcn_r101-d8_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_fcn_r101-d8_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: fcn_r101-d8_512x512_160k_ade20k_20200615_105816-fd192bd5.pth, mIoU 39.91, multi-scale and flip 41.40
# Paper, Table 6, FCN R-101, multi-scale and flip (--tta): mIoU 41.4 -> 43.7 (67.0/43.3/33.2 -> 67.4/46.1/35.7), mean accuracy 50.2 -> 55.9 (80.6/52.9/40.1 -> 80.6/59.7/46.4). Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("fcn/fcn_r101-d8_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
