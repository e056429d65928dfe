"""MMEngine's Runner, with what it loads read safely and fitting exactly."""

import os

from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmseg.models import SegTTAModel

from disalign import InputError, load_stage_one
from disalign.errors import some
from disalign.hand_over import require_tensors, state_dict_of
from disalign_mmengine.checkpoints import class_names, load_checkpoint
from disalign_mmengine.cli import latest_checkpoint
from disalign_mmengine.hooks import unwrapped

from .annotations import guard
from .data_check import build_dataset
from .segmentors import FrozenSegmentor


@RUNNERS.register_module()
class DisAlignRunner(Runner):
    """Stage two's Runner (``runner_type = "DisAlignRunner"`` in a config).

    - ``load_from`` in training is stage one's checkpoint, a file or an http(s) address: handed over strictly, or the
      run stops before its first step.
    - ``--resume`` goes on from the run's own last checkpoint, whatever ``load_from`` says.
    - In testing the checkpoint must be stage two's, whole.
    - Files are read with ``weights_only``, on upstream MMEngine too.

    Raises:
        InputError: nothing to start from, or a checkpoint that does not fit; see :func:`disalign.load_stage_one`.
    """

    _trains = False

    def train(self):
        self._trains = True
        return super().train()

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        """mmengine's, over a dataset whose broken files and wrong labels are said in one sentence."""
        if isinstance(dataloader, dict):
            dataset = dataloader["dataset"]
            dataset = build_dataset(dataset) if isinstance(dataset, dict) else dataset
            if classes := getattr(dataset, "metainfo", {}).get("classes"):
                guard(dataset, len(classes), getattr(dataset, "ignore_index", 255))
            dataloader = dict(dataloader, dataset=dataset)
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def load_or_resume(self) -> None:
        if self._trains and self._resume:
            self._load_from = latest_checkpoint(self.work_dir)
        elif not self._load_from:
            raise InputError(
                "expected the stage-one checkpoint, got none; give it: --cfg-options load_from=FILE"
                if self._trains
                else "expected a checkpoint to test, got none; give it as CHECKPOINT"
            )
        super().load_or_resume()

    def load_checkpoint(self, filename, map_location="cpu", strict=True, revise_keys=()) -> dict:
        """Load a checkpoint completely or not at all; tensors are read on the CPU whatever ``map_location`` says."""
        model = segmentor(self.model)
        checkpoint = load_checkpoint(filename)
        if self._trains and not self._resume and isinstance(model, FrozenSegmentor):
            self._hand_over(model, checkpoint, os.fspath(filename))
        else:
            model.load_state_dict(whole(model, checkpoint, where=f" in {os.fspath(filename)!r}"))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        self._has_loaded = True
        return checkpoint

    def _hand_over(self, model, checkpoint, filename) -> None:
        if os.path.dirname(os.path.abspath(filename)) == os.path.abspath(self.work_dir):
            raise InputError(
                f"expected a work folder of stage two's own, got stage one's, {self.work_dir!r}, whose checkpoints "
                "have the same names; give another --work-dir"
            )
        theirs = class_names(checkpoint)
        ours = self.train_dataloader.dataset.metainfo.get("classes")
        if theirs and ours and theirs != list(ours):
            raise InputError(
                f"expected a stage one of the training set's {len(ours)} classes, but {filename!r} was trained with "
                f"{len(theirs)}, others or in another order ({some(theirs, 3)})"
            )
        report = load_stage_one(model, checkpoint, new=model.freeze_report.trainable, name=filename)
        self.logger.info(f"{os.path.basename(filename)}: {report}")


def segmentor(model):
    """The segmentor itself, without DDP's and test-time augmentation's wrappers."""
    model = unwrapped(model)
    return model.module if isinstance(model, SegTTAModel) else model


def whole(model, checkpoint, where: str = "") -> dict:
    """The tensors of a checkpoint that holds exactly the model's.

    Raises:
        InputError: it does not; ``where`` names it in the sentence.
    """
    tensors = state_dict_of(checkpoint)
    try:
        require_tensors(tensors, model.state_dict(), "tensors of the config's model", where=where)
    except InputError as error:
        hint = "stage one is tested with a config of its own, and a run resumes in a work_dir of its own"
        raise InputError(f"{error} ({hint})") from None
    return tensors
