# DisAlign: ADE20K, DeepLabV3+, ResNeSt-101
#   mim train mmseg configs/mmseg/ade20k/disalign_deeplabv3plus_s101-d8_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_deeplabv3plus_s101-d8_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: deeplabv3plus_s101-d8_512x512_160k_ade20k_20200807_144503-27b26226.pth, mIoU 46.47, multi-scale and flip 47.27
# Paper, Table 6, DeepLabV3+ S-101, multi-scale and flip (--tta): mIoU 47.3 -> 47.8 (69.0/49.7/39.7 -> 68.9/49.8/40.7), mean accuracy 58.1 -> 60.1 (80.8/63.4/48.2 -> 81.0/65.5/52.0). Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("resnest/resnest_s101-d8_deeplabv3plus_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
