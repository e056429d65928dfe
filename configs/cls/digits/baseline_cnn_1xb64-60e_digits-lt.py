# Stage one: long-tailed digits, small CNN, linear classifier (the demo)
#   python -m disalign_cls.train configs/cls/digits/baseline_cnn_1xb64-60e_digits-lt.py
# Not in the paper. Ours: 64.6 +- 2.4 % over five seeds (docs/results.md).
_base_ = ["../_base_/digits_lt.py", "../_base_/default_runtime.py"]
