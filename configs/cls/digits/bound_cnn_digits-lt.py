# The empirical bound (Sec. 3.1, Fig. 1): the classifier retrained on balanced digits, 124 of each
#   disalign compare configs/cls/digits/disalign_cnn_1xb64-60e_digits-lt.py --stage-one FILE --bound configs/cls/digits/bound_cnn_digits-lt.py
# Not in the paper, whose bound is on ImageNet-LT. Ours: docs/methods.md.
_base_ = "disalign_cnn_1xb64-60e_digits-lt.py"
train_dataloader = dict(dataset=dict(split="balanced"))
