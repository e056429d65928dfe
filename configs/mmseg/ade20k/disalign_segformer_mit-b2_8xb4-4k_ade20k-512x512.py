# DisAlign: ADE20K, SegFormer, MiT-B2
#   mim train mmseg configs/mmseg/ade20k/disalign_segformer_mit-b2_8xb4-4k_ade20k-512x512.py --launcher pytorch --gpus 8 --cfg-options stage_one=FILE
# On one GPU: python -m disalign_mmseg.train mmseg/ade20k/disalign_segformer_mit-b2_8xb4-4k_ade20k-512x512.py --cfg-options stage_one=FILE
# Stage one, in MMSegmentation's zoo: segformer_mit-b2_512x512_160k_ade20k_20210726_112103-cbd414ac.pth, mIoU 45.58, multi-scale and flip 47.03
# Not in the paper: a recent architecture as an example. Ours: not measured yet.
_base_ = __import__("disalign_mmseg").mmseg_config("segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py")
__import__("disalign_mmseg").stage_two(_base_, "_base_/disalign_4k_ade20k.py")
