"""A ResNet's tensors have two names: Detectron2's (cvpods' too) and torchvision's (timm's and mmpretrain's too)."""

#: Module of the stem or of a block: Detectron2's name, torchvision's.
STEM = (("stem.conv1", "conv1"), ("stem.conv1.norm", "bn1"))
BLOCK = (
    ("conv1", "conv1"),
    ("conv1.norm", "bn1"),
    ("conv2", "conv2"),
    ("conv2.norm", "bn2"),
    ("conv3", "conv3"),
    ("conv3.norm", "bn3"),
    ("shortcut", "downsample.0"),
    ("shortcut.norm", "downsample.1"),
)
STAGES = (("res2", "layer1"), ("res3", "layer2"), ("res4", "layer3"), ("res5", "layer4"))


def to_torchvision(name: str) -> str | None:
    """``"res2.0.conv1.norm.weight"`` -> ``"layer1.0.bn1.weight"``; None for what is no ResNet's."""
    return _renamed(name, dict(STEM), dict(STAGES), dict(BLOCK))


def to_detectron2(name: str) -> str | None:
    """``"layer1.0.bn1.weight"`` -> ``"res2.0.conv1.norm.weight"``; None for what is no ResNet's."""
    return _renamed(name, *({theirs: ours for ours, theirs in table} for table in (STEM, STAGES, BLOCK)))


def _renamed(name, stem, stages, block):
    module, _, field = name.rpartition(".")
    if module in stem:
        return f"{stem[module]}.{field}"
    stage, _, rest = module.partition(".")
    index, _, part = rest.partition(".")
    if stage not in stages or not index.isdigit() or part not in block:
        return None
    return f"{stages[stage]}.{index}.{block[part]}.{field}"
