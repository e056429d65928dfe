# DisAlign: long-tailed digits, small CNN, linear classifier (the demo)
#   python -m disalign_cls.train configs/cls/digits/disalign_cnn_1xb64-60e_digits-lt.py
# Stage one: baseline_cnn_1xb64-60e_digits-lt.py; another file: --cfg-options stage_one=FILE
# Not in the paper. Ours: 77.6 +- 3.4 % over five seeds (docs/results.md).
_base_ = "baseline_cnn_1xb64-60e_digits-lt.py"
stage_one = "work_dirs/baseline_cnn_1xb64-60e_digits-lt/epoch_60.pth"
model = dict(type="DisAlignClassifier", loss=dict(rho=1.5, reduction="weighted_mean"))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
