import pytest
import torch
from torch import nn

from disalign import InputError
from disalign_cls.backbones import build_backbone

#: Name -> layers, groups and base width of He et al. (2016) and Xie et al. (2017), and the trunk's parameters: those
#: printed for the whole network less the 2,049,000 of its 1,000-way classifier (timm has no ResNeXt-152 to compare).
IMAGENET = {
    "resnet50": ((3, 4, 6, 3), 1, 64, 25_557_032 - 2_049_000),
    "resnet101": ((3, 4, 23, 3), 1, 64, 44_549_160 - 2_049_000),
    "resnet152": ((3, 8, 36, 3), 1, 64, 60_192_808 - 2_049_000),
    "resnext50_32x4d": ((3, 4, 6, 3), 32, 4, 25_028_904 - 2_049_000),
    "resnext101_32x4d": ((3, 4, 23, 3), 32, 4, 44_177_704 - 2_049_000),
    "resnext152_32x4d": ((3, 8, 36, 3), 32, 4, None),
}


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def convolution(before, after, kernel, groups=1):
    """Weights of a convolution without bias, and the two numbers per channel of the BatchNorm behind it."""
    return before // groups * after * kernel**2 + 2 * after


def bottleneck_resnet(layers, groups, base_width):
    total, before = convolution(3, 64, 7), 64
    for stage, repeats in enumerate(layers):
        width, after = groups * base_width * 2**stage, 256 * 2**stage
        total += convolution(before, after, 1)  # the shortcut
        for _ in range(repeats):
            total += convolution(before, width, 1) + convolution(width, width, 3, groups) + convolution(width, after, 1)
            before = after
    return total


def cifar_resnet(depth):
    total, before = convolution(3, 16, 3), 16
    for width in (16, 32, 64):
        total += convolution(before, width, 1) if width != before else 0
        for _ in range((depth - 2) // 6):
            total += convolution(before, width, 3) + convolution(width, width, 3)
            before = width
    return total


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_backbones_have_the_papers_number_of_parameters(name):
    layers, groups, base_width, printed = IMAGENET[name]
    with torch.device("meta"):
        trunk = build_backbone(name)
    assert parameters(trunk) == bottleneck_resnet(layers, groups, base_width)
    assert printed in (None, parameters(trunk))
    assert trunk.num_features == 2048


@pytest.mark.parametrize(("name", "depth"), [("cifar_resnet20", 20), ("cifar_resnet32", 32)])
def test_cifar_backbones_have_6n_plus_2_layers(name, depth):
    trunk = build_backbone(name)
    assert parameters(trunk) == cifar_resnet(depth)
    # The two shortcuts by 1x1 convolution do not count as layers, the classifier does.
    assert sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) == depth - 1 + 2


@pytest.mark.parametrize(
    ("name", "channels", "size", "options"),
    [
        ("cifar_resnet20", 3, 32, {}),
        ("cifar_resnet32", 1, 32, {"in_chans": 1}),
        ("small_cnn", 1, 8, {"in_chans": 1}),
        ("small_cnn", 3, 8, {"in_chans": 3}),
        ("resnet18", 3, 64, {}),
        ("mobilenetv3_small_050", 3, 32, {}),  # a layer before its classifier: 288 features become 1,024
        ("resnext152_32x4d", 3, 32, {}),
    ],
)
def test_a_backbone_gives_one_feature_of_num_features_per_image(name, channels, size, options):
    trunk = build_backbone(name, **options).eval()
    with torch.no_grad():
        features = trunk(torch.randn(2, channels, size, size))
    assert features.shape == (2, trunk.num_features)
    assert features.isfinite().all()


@pytest.mark.parametrize(("name", "close"), [("resnet5", "resnet50"), ("cifar_resnet33", "cifar_resnet32")])
def test_an_unknown_name_is_refused_with_the_closest_ones(name, close):
    with pytest.raises(InputError, match=rf"expected the name of a timm model .* got '{name}'; close: .*\b{close}\b"):
        build_backbone(name)


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="expected pretrained=False for 'small_cnn', which has no public weights"):
        build_backbone("small_cnn", pretrained=True)
