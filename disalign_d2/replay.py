"""Many calibrations of a detector at the cost of one: everything before them is computed once per image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from disalign import AdaptiveCalibration


@contextmanager
def detector_of(model: Any, calibrations: Sequence[Sequence[AdaptiveCalibration]]) -> Iterator[Callable]:
    """Context in which a stage-two model, in eval mode, without masks and keypoints, detects with several calibrations.

    A box head's input does not depend on scores, nor does a cascade's, whose box regression is class-agnostic. So the
    backbone, the proposals, the box pooler and the box heads run for the first calibration, and their outputs are
    reused for the others.

    Args:
        model: ``GeneralizedRCNN``.
        calibrations: one for each box predictor, of each candidate.

    Yields:
        A function from Detectron2's inputs to the model's outputs, on the CPU, for each candidate.
    """
    heads, training = model.roi_heads, model.training
    classifiers = [predictor.cls_score for predictor in heads.box_predictors()]
    own = [classifier.calibration for classifier in classifiers]
    box_heads = heads.box_head if isinstance(heads.box_head, nn.ModuleList) else [heads.box_head]
    steps = [one for one in (model.backbone, model.proposal_generator, heads.box_pooler, *box_heads) if one is not None]
    # A cascade calls its pooler for each stage; the last output will do, since the cached box heads do not read it.
    memory: dict[nn.Module, Any] = {}
    first = True

    def remembered(step: nn.Module, forward: Callable, *inputs: Any, **options: Any) -> Any:
        if first:
            memory[step] = forward(*inputs, **options)
        return memory[step]

    @torch.no_grad()
    def detect(inputs: list[dict]) -> list[list[dict]]:
        nonlocal first
        outputs = []
        for number, candidate in enumerate(calibrations):
            first = number == 0
            for classifier, calibration in zip(classifiers, candidate, strict=True):
                classifier.calibration = calibration
            outputs.append([{name: found.to("cpu") for name, found in one.items()} for one in model(inputs)])
        return outputs

    model.eval()
    heads.mask_on = heads.keypoint_on = False
    for step in steps:
        step.forward = partial(remembered, step, step.forward)
    try:
        yield detect
    finally:
        for step in steps:
            del step.forward
        for classifier, calibration in zip(classifiers, own, strict=True):
            classifier.calibration = calibration
        model.train(training)  # and with it the masks and keypoints, see LeanTraining
