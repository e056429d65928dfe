# DisAlign: ADE20K, DeepLabV3+, ResNet-101
#   mim train mmseg configs/mmseg/ade20k/disalign_deeplabv3plus_r101-d8_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_deeplabv3plus_r101-d8_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: deeplabv3plus_r101-d8_512x512_160k_ade20k_20200615_123232-38ed86bb.pth, mIoU 45.47, multi-scale and flip 46.35
# Paper, Table 6, DeepLabV3+ R-101, multi-scale and flip (--tta): mIoU 46.4 -> 47.1 (68.7/49.0/38.4 -> 68.7/49.4/39.6), mean accuracy 56.7 -> 59.5 (80.9/61.5/46.7 -> 81.4/64.2/50.3). Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("deeplabv3plus/deeplabv3plus_r101-d8_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
