"""DisAlign for Detectron2: ROI heads and box predictors for stage two of LVIS detection and instance segmentation.

Importing it registers ``DisAlignROIHeads`` and ``DisAlignCascadeROIHeads``.
"""

from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ImportError(
        "disalign_d2 needs detectron2, which is on no package registry; install it with: pip install "
        "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
    )

from . import backbones  # noqa: F401
from .checkpoint import DisAlignCheckpointer
from .config import add_disalign_config
from .fast_rcnn import DisAlignOutputLayers
from .freezing import build_model, freeze
from .rcnn import DisAlignGeneralizedRCNN
from .roi_heads import DisAlignCascadeROIHeads, DisAlignROIHeads

__all__ = [
    "DisAlignCascadeROIHeads",
    "DisAlignCheckpointer",
    "DisAlignGeneralizedRCNN",
    "DisAlignOutputLayers",
    "DisAlignROIHeads",
    "add_disalign_config",
    "build_model",
    "freeze",
]
