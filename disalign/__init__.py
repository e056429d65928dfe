"""DisAlign (CVPR 2021): a short second stage that calibrates the decision boundary of a long-tailed recogniser.

Examples in docstrings assume ``import torch, disalign`` and ``from torch import nn``.
"""

from .collecting import collect
from .comparison import compare
from .counts import load_class_counts
from .errors import InputError
from .features import Features
from .fitting import FitReport, fit
from .folding import fold_classifier, fold_model, fold_tensors
from .freezing import FreezeReport, assert_frozen, freeze_except
from .functional import calibrate, generalized_reweight, grw_cross_entropy
from .hand_over import HandOver, load_stage_one
from .io import load_file
from .losses import GRWCrossEntropyLoss
from .modules import (
    CALIBRATED,
    AdaptiveCalibration,
    Calibrated,
    CalibratedConv2d,
    CalibratedCosineClassifier,
    CalibratedLinear,
    CosineClassifier,
    ZeroShotClassifier,
    calibrate_classifier,
    wrap_classifier,
)
from .splits import frequent_common_rare, group_means, head_body_tail, many_medium_few
from .stage_two import at_identity

__version__ = "0.1.0"

__all__ = [
    "CALIBRATED",
    "AdaptiveCalibration",
    "Calibrated",
    "CalibratedConv2d",
    "CalibratedCosineClassifier",
    "CalibratedLinear",
    "CosineClassifier",
    "Features",
    "FitReport",
    "FreezeReport",
    "GRWCrossEntropyLoss",
    "HandOver",
    "InputError",
    "ZeroShotClassifier",
    "assert_frozen",
    "at_identity",
    "calibrate",
    "calibrate_classifier",
    "collect",
    "compare",
    "fit",
    "fold_classifier",
    "fold_model",
    "fold_tensors",
    "freeze_except",
    "frequent_common_rare",
    "generalized_reweight",
    "group_means",
    "grw_cross_entropy",
    "head_body_tail",
    "load_class_counts",
    "load_file",
    "load_stage_one",
    "many_medium_few",
    "wrap_classifier",
]
