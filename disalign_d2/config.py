"""The config keys that DisAlign adds to Detectron2's."""

from detectron2.config import CfgNode


def add_disalign_config(cfg: CfgNode) -> None:
    """Add the keys, in place, with their defaults; with ``MODEL.DISALIGN.CALIBRATE`` off it is stock Detectron2."""
    cfg.MODEL.DISALIGN = CfgNode()
    # z: "linear" scores (eq. 2, Baseline and DisAlign) or "cosine" ones (eq. 3, Baseline* and DisAlign*).
    cfg.MODEL.DISALIGN.CLASSIFIER = "linear"
    # s of eq. 3 at the start, and whether stage one learns it.
    cfg.MODEL.DISALIGN.SCALE = 20.0
    cfg.MODEL.DISALIGN.LEARN_SCALE = True
    # Stage two: freeze everything and learn the calibration of eq. 4-5 on top of z.
    cfg.MODEL.DISALIGN.CALIBRATE = False
    # alpha of eq. 4: learn it, or leave it at 1.
    cfg.MODEL.DISALIGN.MAGNITUDE = True
    # beta of eq. 4: learn it, or leave it at 0.
    cfg.MODEL.DISALIGN.MARGIN = True
    # sigma(x) of eq. 5: "learnt", or "one" for a fixed 1.
    cfg.MODEL.DISALIGN.CONFIDENCE = "learnt"
    # rho of eq. 11 (official for LVIS: 0.8).
    cfg.MODEL.DISALIGN.RHO = 0.8
    # r of eq. 11: a bundled name ("lvis_v0.5", "lvis_v1"), a JSON file, or "" to count DATASETS.TRAIN.
    cfg.MODEL.DISALIGN.CLASS_COUNTS = ""
    # What r counts: "instances" or "images".
    cfg.MODEL.DISALIGN.COUNT_UNIT = "instances"
    # Of eq. 9: "weighted_mean" divides by the summed weights (official), "mean" by the number of RoIs (the paper).
    cfg.MODEL.DISALIGN.REDUCTION = "weighted_mean"
    # w of the background: "fixed" (the release), BACKGROUND_WEIGHT beside foreground weights that average 1; or
    # "balanced", the classes' mean weight over their examples, which keeps stage one's balance of fore- and background.
    cfg.MODEL.DISALIGN.BACKGROUND_BALANCE = "fixed"
    cfg.MODEL.DISALIGN.BACKGROUND_WEIGHT = 1.0
    # After stage two evaluate stage one too (once per stage-one file) and print both.
    cfg.MODEL.DISALIGN.EVAL_STAGE_ONE = True

    # Own data: (name, annotation file in LVIS or COCO format, image folder) of each dataset to register.
    cfg.DATASETS.OWN = []
    # Also the fixed AP of Dave et al.: 10,000 detections per class, no limit per image.
    cfg.TEST.FIXED_AP = False
