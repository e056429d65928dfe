# The empirical bound (Sec. 3.1): the classifier of a ResNet-50 from ImageNet-LT, retrained on balanced ImageNet
#   disalign compare configs/cls/imagenet_lt/disalign_resnet50_8xb32-10e_imagenet-lt-224.py --stage-one FILE --bound configs/cls/imagenet_lt/bound_resnet50_imagenet-lt-224.py
# ImageNet's training images except ImageNet-LT's validation images; docs/datasets.md has the command for the list.
# Paper, Fig. 1 and 2, which print no number. Ours: not measured yet.
_base_ = "disalign_resnet50_8xb32-10e_imagenet-lt-224.py"
train_dataloader = dict(dataset=dict(ann_file="data/imagenet_lt/ImageNet_balanced_train.txt"))
