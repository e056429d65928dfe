"""DisAlign on a Detectron2 box predictor of your own: one class statement, and ROI heads that use it.

    python examples/d2_custom_predictor.py [--seed 0]

Stage one, the strict hand-over and stage two of a Mask R-CNN that is small enough for a CPU, on coloured squares drawn
on the fly. It shows how the parts fit together, not what DisAlign gains: for that see the long-tailed shapes of
docs/results.md. It printed:

stage one: {'loss_cls': 0.255, 'loss_box_reg': 0.384, 'loss_mask': 0.298, 'loss_rpn_cls': 0.024, 'loss_rpn_loc': 0.003}
stage two: {'loss_cls': 0.161}, 41 numbers trained
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.config import configurable, get_cfg
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from disalign_d2 import DisAlignCheckpointer, DisAlignOutputLayers, DisAlignROIHeads, add_disalign_config, build_model

COUNTS = [600, 120, 30, 8]  # training instances of each class


class MyOutputLayers(FastRCNNOutputLayers):
    """Your own: it classifies and regresses normalised features, of length 1 / temperature."""

    @configurable
    def __init__(self, input_shape, *, temperature: float = 0.1, **options):
        super().__init__(input_shape, **options)
        self.temperature = temperature

    def forward(self, x):
        return super().forward(F.normalize(x.flatten(1), dim=1) / self.temperature)


# First DisAlign, then yours: your class does everything in stage one, and what stage two does not change.
class DisAlignMyOutputLayers(DisAlignOutputLayers, MyOutputLayers):
    pass


@ROI_HEADS_REGISTRY.register()
class MyROIHeads(DisAlignROIHeads):
    output_layers = DisAlignMyOutputLayers


def config(calibrate):
    cfg = get_cfg()
    add_disalign_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "MyROIHeads"  # in both stages
    cfg.MODEL.DISALIGN.CALIBRATE = calibrate
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(COUNTS)

    # A Mask R-CNN of a few thousand numbers.
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_small_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.PIXEL_STD = [60.0, 60.0, 60.0]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    return cfg


def squares(images=4, size=64):
    """Inputs in the form of Detectron2's mapper: one square per image, in the colour of a long-tailed class."""
    batch = []
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
    for label in torch.multinomial(torch.tensor(COUNTS).float(), images, replacement=True).tolist():
        left, top = torch.randint(4, size - 28, (2,)).tolist()
        image = torch.randint(96, 160, (3, size, size), dtype=torch.uint8)
        image[:, top : top + 24, left : left + 24] = colours[label][:, None, None]
        mask = torch.zeros(1, size, size, dtype=torch.bool)
        mask[0, top : top + 24, left : left + 24] = True
        boxes = Boxes(torch.tensor([[left, top, left + 24, top + 24]], dtype=torch.float32))
        instances = Instances((size, size), gt_boxes=boxes, gt_classes=torch.tensor([label]), gt_masks=BitMasks(mask))
        batch.append({"image": image, "height": size, "width": size, "instances": instances})
    return batch


def train(model, iterations, lr):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    model.train()
    with EventStorage():
        for _ in range(iterations):
            losses = model(squares())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return {name: round(float(loss.detach()), 3) for name, loss in losses.items()}


@torch.no_grad()
def scores(model, inputs):
    return torch.cat([output["instances"].scores for output in model.eval()(inputs)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=60, help="of either stage; default: %(default)s")
    parser.add_argument("--out", default="work_dirs/d2_custom_predictor", help="folder of the checkpoints")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    out = Path(args.out)

    one = build_model(config(calibrate=False))
    print("stage one:", train(one, args.iterations, lr=0.02))
    DisAlignCheckpointer(one, str(out)).save("stage_one")

    two = build_model(config(calibrate=True))  # frozen already
    DisAlignCheckpointer(two, str(out), training=True).resume_or_load(str(out / "stage_one.pth"), resume=False)
    two.roi_heads.box_predictor.class_counts = COUNTS  # or MODEL.DISALIGN.CLASS_COUNTS FILE.json in the config
    inputs = squares()
    assert torch.equal(scores(one, inputs), scores(two, inputs))
    losses = train(two, args.iterations, lr=0.02)
    trained = sum(parameter.numel() for parameter in two.parameters() if parameter.requires_grad)
    print(f"stage two: {losses}, {trained} numbers trained")
    DisAlignCheckpointer(two, str(out)).save("disalign")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
