"""Detectron2's checkpointer, but safe and strict: it runs no code from a file, and refuses missing tensors."""

import copy
import os
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from disalign import GRWCrossEntropyLoss, InputError, load_file, load_stage_one
from disalign.errors import input_errors
from disalign.hand_over import COUNTERS, require_tensors, state_dict_of
from disalign.io import atomic_file
from disalign.stage_two import calibrations, is_calibrated

from .freezing import NOT_NEEDED


def _open(path, mode="r", **options):
    """Detectron2's, but a file is written completely or not at all: a full disk loses no earlier checkpoint."""
    if mode in ("w", "wb") and "://" not in path:
        return atomic_file(path, mode)
    return PathManager.open(path, mode, **options)


class DisAlignCheckpointer(DetectionCheckpointer):
    """Reads stage one, a run to resume, and a model to evaluate; saves the class counts and rho beside the model.

    Missing or mis-shaped tensors are errors in stage two, ``--resume`` and evaluation. A fresh stage one starts from
    the tensors that fit (ImageNet or COCO weights), as in Detectron2.

    Args:
        model, save_dir, checkpointables: as in ``DetectionCheckpointer``.
        training: a run that starts without ``--resume`` starts from another stage's or another dataset's weights.

    Raises:
        InputError: on loading: no file, more than tensors and plain values, or another model or stage.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, training: bool = False, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = copy.copy(PathManager)
        self.path_manager.open = _open
        self.training = training
        self._calibrations = calibrations(self.model)

    def save(self, name: str, **kwargs: Any) -> None:
        """As in Detectron2, with the calibration's counts and rho under ``"disalign"``."""
        losses = [module for module in self.model.modules() if isinstance(module, GRWCrossEntropyLoss)]
        if losses:  # a cascade's are alike
            kwargs["disalign"] = losses[0].metadata() | kwargs.get("disalign", {})
        super().save(name, **kwargs)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As in Detectron2, but an empty path or a missing file is bad input.

        In a fresh run ``resume_or_load`` asks for no ``checkpointables``; ``path`` is then its stage one.
        """
        self._name = path
        self._fresh = self.training and checkpointables is not None
        if not path and (self._calibrations or not self.training):
            what = "the stage-one checkpoint" if self._fresh else "a checkpoint to evaluate"
            raise InputError(f"expected {what} as MODEL.WEIGHTS, got an empty one; add MODEL.WEIGHTS FILE")
        try:
            with input_errors(f"expected a checkpoint at {path!r}", "check MODEL.WEIGHTS"):  # records may have any type
                return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # the base class leaves it set where loading fails

    def _torch_load(self, f):
        content = load_file(f)
        return content if isinstance(content, dict) else {"model": content}

    def _load_file(self, filename):
        if filename.endswith(".pyth"):
            self._torch_load(filename)  # Detectron2 reads pycls' files itself: now it is safe
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        content = self._torch_load(filename)
        if "model" in content:
            return content
        # Detectron2 takes any other .pkl for Caffe2's.
        blobs = content.get("blobs", content).items()
        weights = {name: blob for name, blob in blobs if isinstance(blob, Tensor) and not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    def _load_model(self, checkpoint):
        source = state_dict_of(checkpoint["model"])
        if self._fresh and not self._calibrations:
            return super()._load_model(checkpoint)
        if self._fresh:
            report = load_stage_one(self.model, source, name=self._name)
            self.logger.info(f"{os.path.basename(self._name)}: {report}")
        else:
            self._restore(source)
        checkpoint.pop("model")
        return None

    def _restore(self, source):
        if is_calibrated(source) != bool(self._calibrations):
            ours, theirs = ("two", "one") if self._calibrations else ("one", "two")
            raise InputError(
                f"expected a checkpoint of stage {ours} for this config, got one of stage {theirs} in {self._name!r}; "
                "evaluate or resume it with its own config, in an OUTPUT_DIR of its own"
            )
        target = self.model.state_dict()
        what, where = "tensors of the config's model", f" in {self._name!r}"
        require_tensors(source, target, what, (COUNTERS, *NOT_NEEDED), where)
        self.model.load_state_dict({name: source[name] for name in target})
