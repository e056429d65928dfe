"""The cost of a lean stage-two step, beside three others of the same model on the same regions of interest (RoIs).

    python benchmarks/lean_step.py [--size 320 480] [--images 1] [--repeats 5] [--amp] [KEY VALUE ...]
    python benchmarks/lean_step.py --size 800 1333 --images 2 --repeats 10    # for a GPU
    python benchmarks/lean_step.py --size 96 128 --repeats 1 MODEL.ROI_HEADS.NUM_CLASSES 20   # a quick one

Ratios of the lean step to
(a) stage one's step of the same config: every loss, and training everything that stage one trains;
(b) stage two as the official code does it: frozen by requires_grad, so that every loss is computed for nothing;
(c) the frozen forward alone: proposals, their sampling, box head and scores; no calibration, loss or gradient.

Weights and images are random, the learning rate is 0. An image has as many objects as it may have foreground RoIs, and
the ground truth joins the proposals, so that this many are sampled (the line above the table counts them); the sampling
uses the same seed. The steps take turns in one process after some of each to warm up; ratios are medians over the turns
(least to most). The peak memory is that of a step: resident on a CPU, in a process of its own and above what the
imports take; allocated on a GPU. Images are on the device beforehand. In float32 a GPU convolves in TF32, torch's
default. The shipped schedules have 2 images of 800x1333 on each of 8 GPUs.
"""

import argparse
import functools
import logging
import sys

import numpy as np
import torch
from detectron2.layers import cat
from detectron2.modeling import build_model as build_stock_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from timing import amp_argument, measure, ran_on, report

from disalign.cli import command
from disalign_d2 import DisAlignOutputLayers, build_model
from disalign_d2.freezing import LeanRPN
from disalign_d2.train_net import Trainer, setup

STEPS = {
    "lean": "lean stage two",
    "full": "(a) full fine-tuning",
    "official": "(b) stage two, every loss",
    "forward": "(c) frozen forward",
}


class EveryLoss(DisAlignOutputLayers):
    def losses(self, predictions, proposals):
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        targets = cat([p.gt_boxes.tensor for p in proposals])
        classes = cat([p.gt_classes for p in proposals])
        box_loss = self.box_reg_loss(boxes, targets, predictions[1], classes)
        return super().losses(predictions, proposals) | {"loss_box_reg": box_loss}


class NoLoss(DisAlignOutputLayers):
    def losses(self, predictions, proposals):
        return {}


def build(name, cfg):
    """The model in training mode, its optimizer or None, and what scales its loss.

    All models have the same weights up to the scores.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DISALIGN.CALIBRATE = name in ("lean", "official")
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED &= cfg.MODEL.DISALIGN.CALIBRATE
    cfg.MODEL.PIXEL_STD = [2000.0] * 3  # random weights amplify: with 1 the proposals are 4 boxes as large as the image
    cfg.SOLVER.BASE_LR = 0.0  # and steps must not diverge
    torch.manual_seed(0)
    model = (build_model if name == "lean" else build_stock_model)(cfg).train()
    heads = model.roi_heads
    if name == "official":
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(".calibration." in path)
        heads.mask_on, heads.keypoint_on = cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON
    if name == "forward":
        model.proposal_generator.__class__ = LeanRPN
        heads.mask_on = heads.keypoint_on = False
    for predictor in heads.box_predictors():
        predictor.class_counts = torch.arange(1, predictor.num_classes + 1)  # any counts cost the same
        predictor.__class__ = {"official": EveryLoss, "forward": NoLoss}.get(name, DisAlignOutputLayers)
    heads.label_and_sample_proposals = functools.partial(seeded, heads, heads.label_and_sample_proposals)
    scaler = torch.amp.GradScaler(cfg.MODEL.DEVICE, enabled=cfg.SOLVER.AMP.ENABLED)
    return model, None if name == "forward" else Trainer.build_optimizer(cfg, model), scaler


def seeded(heads, sample, *arguments):
    """The sampling of RoIs, seeded here since an RPN with losses draws random numbers before it."""
    torch.manual_seed(0)
    rois = sample(*arguments)
    heads.sampled = torch.cat([torch.cat([r.proposal_boxes.tensor, r.gt_classes[:, None]], 1) for r in rois])
    return rois


def inputs(cfg, size, num_images) -> list[dict]:
    """Random images of ellipses, a tenth to half as wide and as high as the image."""
    random = np.random.default_rng(0)
    number = int(cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    batch = []
    for _ in range(num_images):
        sides = np.array(size[::-1])
        half = random.uniform(0.05, 0.25, (number, 2)) * sides
        centre = random.uniform(half, sides - half)
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(torch.tensor(np.concatenate([centre - half, centre + half], 1)))
        instances.gt_masks = PolygonMasks([[(c + h * circle).ravel()] for c, h in zip(centre, half, strict=True)])
        instances.gt_classes = torch.tensor(random.integers(cfg.MODEL.ROI_HEADS.NUM_CLASSES, size=number))
        image = torch.tensor(random.integers(256, size=(3, *size)), dtype=torch.uint8, device=cfg.MODEL.DEVICE)
        batch.append({"image": image, "instances": instances})
    return batch


def step(model, optimizer, scaler, batch) -> dict:
    """Its losses; as Detectron2's trainers do it, with and without mixed precision."""
    amp = torch.autocast(model.device.type, enabled=scaler.is_enabled())
    with EventStorage(), torch.set_grad_enabled(optimizer is not None), amp:
        losses = model(batch)
    if optimizer is not None:
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
    return losses


def prepare(cfg, batch, name):
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    return functools.partial(step, *build(name, cfg), batch)


@command
def main(argv=None):
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config-file", default="d2/lvis_v1/disalign_mask-rcnn_r50_fpn_9000it.yaml")
    arguments.add_argument("--size", type=int, nargs=2, default=[320, 480], help="height and width")
    arguments.add_argument("--images", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=5, help="turns")
    amp_argument(arguments)
    arguments.add_argument("--out", help="also write the table, and the seconds of each turn, to this JSON")
    arguments.add_argument("opts", nargs="*", metavar="KEY VALUE", help="of the config, say MODEL.DEVICE cpu")
    arguments.set_defaults(num_gpus=1)  # as in train_net's arguments
    args = arguments.parse_args(argv)
    args.opts += ["SOLVER.AMP.ENABLED", args.amp]
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    cfg = setup(args)
    build_step = functools.partial(prepare, cfg, inputs(cfg, args.size, args.images))
    memory, seconds, built = measure(list(STEPS), build_step, args.repeats, cfg.MODEL.DEVICE, "disalign_d2.train_net")

    rois = [run.args[0].roi_heads.sampled for run in built.values()]
    classes, facts = cfg.MODEL.ROI_HEADS.NUM_CLASSES, ran_on(cfg.MODEL.DEVICE, args.amp, args.repeats)
    foreground = int((rois[0][:, 4] < classes).sum()) / args.images
    same = all(torch.equal(other, rois[0]) for other in rois)
    about = (
        f"{args.images} image(s) of {args.size[0]}x{args.size[1]}, {len(rois[0]) / args.images:g} RoIs an image, "
        f"{foreground:g} of them foreground, {'the same' if same else 'NOT THE SAME'} in every step; K = {classes}"
    )
    report(about, facts, ("lean / it",) * 2, args.out, STEPS, memory, seconds, *[lambda name: ("lean", name)] * 2)


if __name__ == "__main__":
    sys.exit(main())
