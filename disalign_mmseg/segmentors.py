"""Segmentors of stage two: frozen from the start but for the calibration of their last head."""

from typing import TYPE_CHECKING, Any

from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import add_prefix
from torch import Tensor

from disalign import InputError
from disalign.stage_two import freeze

from .decode_heads import REFUSED, DisAlignHead

if TYPE_CHECKING:  # what the mixin is put before
    from mmseg.models.segmentors import EncoderDecoder as _Host
else:
    _Host = object


class FrozenSegmentor(_Host):
    """Mixin before a segmentor whose (last) decode head is a :class:`~disalign_mmseg.decode_heads.DisAlignHead`.

    Everything else is frozen and stays in eval mode from the constructor on, so DDP needs no
    ``find_unused_parameters``, and no command-line flag decides what trains. An auxiliary head has nothing to learn and
    is not built; its tensors in a stage-one checkpoint are left aside. Nothing is initialised from ``pretrained`` or
    ``init_cfg``: stage one's checkpoint holds all of it.

    Attributes:
        not_needed: patterns of stage one's tensors that stage two has no use for.
        freeze_report: a :class:`disalign.FreezeReport`.

    Raises:
        InputError: a decode head without a calibration.
    """

    not_needed = ("auxiliary_head.*",)

    def __init__(self, *args: Any, auxiliary_head: Any = None, pretrained: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        head = self.calibrated_head
        if not isinstance(head, DisAlignHead):
            kind = type(head).__name__
            why = f"it can't have one: {REFUSED[kind]}" if kind in REFUSED else f"set its type to DisAlign{kind}"
            raise InputError(f"expected a decode head with a calibration, got {kind}; {why}")
        self.freeze_report = freeze(self)

    @property
    def _last_head(self) -> str:
        return "decode_head"

    @property
    def calibrated_head(self) -> DisAlignHead:
        """The head whose scores are calibrated."""
        return self.get_submodule(self._last_head)

    def init_weights(self) -> None:
        """Nothing: stage one's checkpoint holds all of it."""


@MODELS.register_module()
class DisAlignEncoderDecoder(FrozenSegmentor, EncoderDecoder):
    """``EncoderDecoder`` as stage two; see :class:`FrozenSegmentor`."""


@MODELS.register_module()
class DisAlignCascadeEncoderDecoder(FrozenSegmentor, CascadeEncoderDecoder):
    """``CascadeEncoderDecoder`` as stage two of its last head; the earlier heads are stage one's, without a loss."""

    def __init__(self, *args: Any, decode_head: Any, **options: Any) -> None:
        if not isinstance(decode_head, (list, tuple)):
            raise InputError(
                "expected decode_head as the list of all heads, got one; restate the list in the config, with DisAlign "
                "before the type of its last"
            )
        super().__init__(*args, decode_head=decode_head, **options)

    @property
    def _last_head(self) -> str:
        return f"decode_head.{self.num_stages - 1}"

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """mmseg's, of the last head alone; inputs (N, 3, H, W)."""
        features = self.extract_feat(inputs)
        *earlier, last = self.decode_head
        outputs = earlier[0].forward(features)
        for head in earlier[1:]:
            outputs = head.forward(features, outputs)
        losses = last.loss(features, outputs, data_samples, self.train_cfg)
        return add_prefix(losses, f"decode_{self.num_stages - 1}")
