# DisAlign: long-tailed digits, small CNN, cosine classifier (the demo)
#   python -m disalign_cls.train configs/cls/digits/disalign-cosine_cnn_1xb64-60e_digits-lt.py
# Stage one: baseline-cosine_cnn_1xb64-60e_digits-lt.py; another file: --cfg-options stage_one=FILE
# Not in the paper. Ours: 77.8 +- 2.4 % over five seeds (docs/results.md).
_base_ = "baseline-cosine_cnn_1xb64-60e_digits-lt.py"
stage_one = "work_dirs/baseline-cosine_cnn_1xb64-60e_digits-lt/epoch_60.pth"
model = dict(type="DisAlignClassifier", loss=dict(rho=1.5, reduction="weighted_mean"))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
