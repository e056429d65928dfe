"""The sources of checkpoints, one small parser each."""

from torch import Tensor

from disalign import InputError
from disalign.errors import some

from . import balancing, cvpods, detectron2, disalign_cls, mmpretrain, mmseg, timm
from .frame import Source

#: Name for --from -> source. timm's is the last, since other models also have layers of its names.
SOURCES: dict[str, Source] = {
    module.SOURCE.name: module.SOURCE
    for module in (cvpods, balancing, detectron2, mmseg, disalign_cls, mmpretrain, timm)
}


def detect(tensors: dict[str, Tensor], given: str | None, path: str, classifier: str | None) -> Source:
    """The source of a checkpoint, or the ``given`` one if it fits."""
    fitting = [name for name, source in SOURCES.items() if source.known(tensors)]
    if classifier and "timm" not in fitting:
        fitting.append("timm")
    if not fitting or (given and given not in fitting):
        raise InputError(
            f"expected a checkpoint of {given or ', '.join(SOURCES)} in {path!r}, but its tensors' names "
            f"({some(tensors, 3)}) are of {some(fitting) or 'none'}; correct --from, or name an image classifier's "
            "last linear layer by --classifier"
        )
    return SOURCES[given or fitting[0]]
