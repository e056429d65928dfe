# DisAlign: ADE20K, DeepLabV3+, ResNet-50
#   mim train mmseg configs/mmseg/ade20k/disalign_deeplabv3plus_r50-d8_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_deeplabv3plus_r50-d8_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: deeplabv3plus_r50-d8_512x512_160k_ade20k_20200615_124504-6135c7e0.pth, mIoU 43.95, multi-scale and flip 44.93
# Paper, Table 6, DeepLabV3+ R-50, multi-scale and flip (--tta): mIoU 44.9 -> 45.7 (67.7/48.3/36.4 -> 67.7/48.6/37.8), mean accuracy 55.0 -> 57.3 (80.1/60.8/44.1 -> 80.8/63.0/46.9). Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
