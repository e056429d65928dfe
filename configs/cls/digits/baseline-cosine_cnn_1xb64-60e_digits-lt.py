# Stage one: long-tailed digits, small CNN, cosine classifier (the demo)
#   python -m disalign_cls.train configs/cls/digits/baseline-cosine_cnn_1xb64-60e_digits-lt.py
# Not in the paper. Ours: 70.2 +- 1.8 % over five seeds (docs/results.md).
_base_ = "baseline_cnn_1xb64-60e_digits-lt.py"
model = dict(classifier="cosine")
