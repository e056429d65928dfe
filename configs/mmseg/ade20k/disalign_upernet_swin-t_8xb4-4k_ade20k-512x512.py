# DisAlign: ADE20K, UPerNet, Swin-T
#   mim train mmseg configs/mmseg/ade20k/disalign_upernet_swin-t_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_upernet_swin-t_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth, mIoU 44.41, multi-scale and flip 45.79
# Not in the paper: a recent architecture as an example. Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config(
    "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
)
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
