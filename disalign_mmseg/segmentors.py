"""Segmentors of stage two: frozen from the start, except for the calibration of their last head."""

from typing import Any

from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import add_prefix
from torch import Tensor

from disalign import InputError
from disalign.stage_two import freeze

from .decode_heads import DisAlignHead


@MODELS.register_module()
class DisAlignEncoderDecoder(EncoderDecoder):
    """``EncoderDecoder`` as stage two: its decode head is a :class:`~disalign_mmseg.decode_heads.DisAlignHead`.

    Everything else is frozen and stays in eval mode from the constructor on, so DDP needs no
    ``find_unused_parameters``, and no command-line flag affects what trains. An auxiliary head has nothing to learn and
    is not built; its tensors in a stage-one checkpoint are ignored. Nothing is initialised from ``pretrained`` or
    ``init_cfg``: stage one's checkpoint has all tensors.

    Attributes:
        not_needed: patterns of stage one's tensors that stage two does not need.
        freeze_report: a :class:`disalign.FreezeReport`.

    Raises:
        InputError: a decode head without a calibration.
    """

    not_needed = ("auxiliary_head.*",)

    def __init__(self, *args: Any, auxiliary_head: Any = None, pretrained: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        kind = type(self.calibrated_head).__name__
        if not isinstance(self.calibrated_head, DisAlignHead):
            raise InputError(f"expected a decode head with a calibration, got {kind}; set its type to DisAlign{kind}")
        self.freeze_report = freeze(self)

    @property
    def calibrated_head(self) -> DisAlignHead:
        """The head whose scores are calibrated."""
        return self.decode_head

    def init_weights(self) -> None:
        """Do nothing: stage one's checkpoint has all tensors."""


@MODELS.register_module()
class DisAlignCascadeEncoderDecoder(DisAlignEncoderDecoder, CascadeEncoderDecoder):
    """``CascadeEncoderDecoder`` as stage two of its last head; the earlier heads are stage one's, without a loss."""

    def __init__(self, *args: Any, decode_head: Any, **options: Any) -> None:
        if not isinstance(decode_head, (list, tuple)):
            raise InputError("expected decode_head as the list of all heads, got one; restate the list in the config")
        super().__init__(*args, decode_head=decode_head, **options)

    @property
    def calibrated_head(self) -> DisAlignHead:
        return self.decode_head[-1]

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """mmseg's, of the last head alone; inputs (N, 3, H, W)."""
        features = self.extract_feat(inputs)
        *earlier, last = self.decode_head
        outputs = earlier[0].forward(features)
        for head in earlier[1:]:
            outputs = head.forward(features, outputs)
        losses = last.loss(features, outputs, data_samples, self.train_cfg)
        return add_prefix(losses, f"decode_{self.num_stages - 1}")
