"""DisAlign for MMSegmentation 1.x: calibrated decode heads, frozen segmentors, the loss and the metric."""

try:
    import disalign_mmengine  # noqa: F401  (importing registers)

    from . import comparison, hooks, metrics  # noqa: F401
    from .bases import disalign_config, mmseg_config, stage_two
    from .decode_heads import DisAlignHead, calibrated
    from .losses import GRWCrossEntropyLoss
    from .runner import DisAlignSegRunner
    from .segmentors import DisAlignCascadeEncoderDecoder, DisAlignEncoderDecoder
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"disalign_mmseg needs mmsegmentation and its dependencies, but there is no {error.name}; install them with "
        "pip install 'disalign[mmseg]', or individually beside an upstream mmsegmentation",
        name=error.name,
    ) from error

__all__ = [
    "DisAlignCascadeEncoderDecoder",
    "DisAlignEncoderDecoder",
    "DisAlignHead",
    "DisAlignSegRunner",
    "GRWCrossEntropyLoss",
    "calibrated",
    "disalign_config",
    "mmseg_config",
    "stage_two",
]
