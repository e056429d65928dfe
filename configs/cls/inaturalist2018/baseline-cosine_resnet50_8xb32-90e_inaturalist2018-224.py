# Stage one: iNaturalist-2018, ResNet-50, 90 epochs, cosine classifier
#   torchrun --nproc-per-node 8 -m disalign_cls.train configs/cls/inaturalist2018/baseline-cosine_resnet50_8xb32-90e_inaturalist2018-224.py --launcher pytorch
# On one GPU: python -m disalign_cls.train without --launcher; the learning rate scales with the batch.
# Paper, Table 3, Baseline* ResNet-50 90 E: 64.8 %. Ours: not measured yet.
_base_ = "baseline_resnet50_8xb32-90e_inaturalist2018-224.py"
model = dict(classifier="cosine")
