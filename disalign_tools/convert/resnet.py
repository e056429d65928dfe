"""A ResNet's tensors have two names: Detectron2's (cvpods' too) and torchvision's (timm's and mmpretrain's too)."""

from collections.abc import Iterable

#: Module of the stem, stage, module of a block: Detectron2's name -> torchvision's.
STEM = {"stem.conv1": "conv1", "stem.conv1.norm": "bn1"}
STAGES = {f"res{number + 1}": f"layer{number}" for number in (1, 2, 3, 4)}
BLOCK = {f"conv{number}": f"conv{number}" for number in (1, 2, 3)}
BLOCK |= {f"conv{number}.norm": f"bn{number}" for number in (1, 2, 3)}
BLOCK |= {"shortcut": "downsample.0", "shortcut.norm": "downsample.1"}


def to_torchvision(name: str) -> str | None:
    """``"res2.0.conv1.norm.weight"`` -> ``"layer1.0.bn1.weight"``; None if it is not a ResNet's."""
    return _renamed(name, STEM, STAGES, BLOCK)


def to_detectron2(name: str) -> str | None:
    """``"layer1.0.bn1.weight"`` -> ``"res2.0.conv1.norm.weight"``; None if it is not a ResNet's."""
    return _renamed(name, *({theirs: ours for ours, theirs in table.items()} for table in (STEM, STAGES, BLOCK)))


def _renamed(name, stem, stages, block):
    module, _, field = name.rpartition(".")
    if module in stem:
        return f"{stem[module]}.{field}"
    stage, _, rest = module.partition(".")
    index, _, part = rest.partition(".")
    if stage not in stages or not index.isdigit() or part not in block:
        return None
    return f"{stages[stage]}.{index}.{block[part]}.{field}"


def foreign(names: Iterable[str]) -> list[str]:
    """The names that are not a plain ResNet's or ResNeXt's under torchvision's names."""
    return [name for name in names if to_detectron2(name) is None]


def is_whole(names: Iterable[str]) -> bool:
    """Whether they are those of a plain ResNet or ResNeXt, from the stem to the last stage, and no others."""
    modules = {name.partition(".")[0] for name in names}
    return not foreign(names) and modules == {*STEM.values(), *STAGES.values()}
