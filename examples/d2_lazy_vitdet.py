"""Stage two of a ViTDet as a LazyConfig, for Detectron2's own tools/lazyconfig_train_net.py, unchanged.

    python tools/lazyconfig_train_net.py --num-gpus 8 --config-file examples/d2_lazy_vitdet.py \\
        train.init_checkpoint=STAGE_ONE.pth
    python tools/lazyconfig_train_net.py --num-gpus 8 --config-file examples/d2_lazy_vitdet.py --eval-only \\
        train.init_checkpoint=output/disalign_vitdet_b/model_final.pth

Stage one: ViTDet-B trained on LVIS v1 with softmax cross-entropy. Detectron2's own ViTDet on LVIS was trained with the
sigmoid federated loss, which has no background score and can't be calibrated. We have not run it at this size. The
tests build it at 64 pixels and train it by Detectron2's own loop on a generated set.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from disalign_d2 import DisAlignGeneralizedRCNN, DisAlignOutputLayers, DisAlignROIHeads
from disalign_d2.lvis_evaluation import DisAlignLVISEvaluator

# Stage one's model: here Detectron2's own ViTDet-B.
model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.roi_heads.num_classes = 1203
model.roi_heads.box_predictor.update(test_score_thresh=0.0001, test_topk_per_image=300)

# Stage two: the model freezes itself and loads a checkpoint completely or not at all; training skips the masks.
model._target_ = DisAlignGeneralizedRCNN
model.roi_heads._target_ = DisAlignROIHeads
model.roi_heads.box_predictor.update(_target_=DisAlignOutputLayers, calibrate=True, class_counts="lvis_v1", rho=0.8)

# The plain sampler, without repeated images: the loss re-weights the classes.
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.mapper.update(image_format="RGB", use_instance_mask=False)
dataloader.train.mapper.augmentations[0].update(short_edge_length=1024, max_size=1024)
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=1024, max_size=1024)
dataloader.evaluator = L(DisAlignLVISEvaluator)(
    dataset_name="${..test.dataset.names}", tasks=("bbox", "segm"), output_dir="output/disalign_vitdet_b"
)

# Official for LVIS v1: 9,000 iterations of 16 images at lr 0.02, a tenth from 8,000 on. This loop does not clip
# gradients; where disalign/confidence_mean falls to 0 in the log, lower the lr.
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.params.overrides = {"magnitude": {"weight_decay": 0.0}}  # its identity is 1, not 0
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[8000], num_updates=9000),
    warmup_length=0.1,
    warmup_factor=0.001,
)
train = model_zoo.get_config("common/train.py").train
train.update(max_iter=9000, eval_period=9000, output_dir="output/disalign_vitdet_b")
train.init_checkpoint = "???"  # required: stage one's checkpoint
train.checkpointer.period = 1000
