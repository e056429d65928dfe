# DisAlign: ADE20K, FCN, ResNeSt-101
#   mim train mmseg configs/mmseg/ade20k/disalign_fcn_s101-d8_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_fcn_s101-d8_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: fcn_s101-d8_512x512_160k_ade20k_20200807_145416-d3160329.pth, mIoU 45.62, multi-scale and flip 46.16
# Paper, Sec. 4.2: +0.7 mIoU, +2.8 mean accuracy over stage one (Table 6 has no such row). The official logs have stage one, multi-scale and flip (--tta): mIoU 46.16 (67.56/47.99/39.12), mean accuracy 57.34 (79.37/61.73/48.24). Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("resnest/resnest_s101-d8_fcn_4xb4-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
