# Stage two: DisAlign on CamVid, on the small FCN of the baseline config. An example of ours, not in the paper.
#   mim train mmseg configs/mmseg/camvid/disalign_fcn_r18_1xb8-400_camvid-160x224.py --cfg-options stage_one=FILE
# Without mim: python -m disalign_mmseg.train mmseg/camvid/disalign_fcn_r18_1xb8-400_camvid-160x224.py --cfg-options stage_one=FILE
# rho 0.5 and lr 0.1 were chosen on the val set of seed 0.
# Stage one: work_dirs/baseline_fcn_r18_1xb8-2k_camvid-160x224/iter_2000.pth. Figures of three seeds: docs/results.md.
_base_ = "baseline_fcn_r18_1xb8-2k_camvid-160x224.py"
__import__("disalign_mmseg").stage_two(_base_, class_counts="dataset", rho=0.5)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.1))
train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=400, by_epoch=False)]
auto_scale_lr = dict(enable=False)
# Groups for CamVid, by share of all training pixels: head > 5 %, body 1-5 %, tail < 1 %.
val_evaluator = dict(groups=dict(head=0.05, tail=0.01))
test_evaluator = dict(groups=dict(head=0.05, tail=0.01))
