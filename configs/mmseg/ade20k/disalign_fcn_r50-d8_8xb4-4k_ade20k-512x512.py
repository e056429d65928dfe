# DisAlign: ADE20K, FCN, ResNet-50
#   mim train mmseg configs/mmseg/ade20k/disalign_fcn_r50-d8_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_fcn_r50-d8_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: fcn_r50-d8_512x512_160k_ade20k_20200615_100713-4edbc3b4.pth, mIoU 36.10, multi-scale and flip 38.08
# Paper, Table 6, FCN R-50, multi-scale and flip (--tta): mIoU 38.1 -> 40.1 (64.6/40.0/29.6 -> 65.0/42.8/31.3), mean accuracy 46.3 -> 51.4 (78.6/49.3/35.4 -> 78.6/56.1/40.6). Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
