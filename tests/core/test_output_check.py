"""A classifier that is not the model's is found at the first forward, and by nothing that copies or compiles it."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from disalign import InputError, fold_model, wrap_classifier
from disalign.output_check import Unchecked

from .models import COUNTS, FEATURES, NUM_CLASSES, SmallCNN

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """A squeeze-excitation layer has as many outputs as there are classes; the head is a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, NUM_CLASSES, 3)
        self.gate = nn.Linear(NUM_CLASSES, NUM_CLASSES)
        self.head = nn.Conv2d(NUM_CLASSES, NUM_CLASSES, 1)

    def forward(self, images):
        features = self.conv(images)
        gate = self.gate(features.mean((2, 3))).sigmoid()
        pooled = (features * gate[..., None, None]).mean((2, 3), keepdim=True)
        return self.head(pooled).flatten(1)


class Distilled(SmallCNN):
    """DeiT's two heads, whose mean counts."""

    def __init__(self):
        super().__init__()
        self.fc_dist = nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, images):
        features = self.features(images)
        return (self.fc(features) + self.fc_dist(features)) / 2


class Returning(SmallCNN):
    """Returns something made of the scores."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(super().forward(images))


def wrapped(model, **options):
    return wrap_classifier(model, COUNTS, **options)[0].eval()


def is_checked(model):
    return not isinstance(model, Unchecked)


def test_the_comparison_removes_itself():
    model = wrapped(SmallCNN())
    assert isinstance(model, Unchecked)
    assert type(model).__name__ == "SmallCNN"
    model(IMAGES)
    assert type(model) is SmallCNN
    assert "unchecked_classifier" not in vars(model)
    assert not model.fc._forward_hooks


@pytest.mark.parametrize(
    ("model", "classifier"), [(Gated, None), (Gated, "gate"), (Distilled, "fc"), (Distilled, "fc_dist")]
)
def test_another_layer_is_refused_by_name(model, classifier):
    model = wrapped(model(), classifier=classifier)
    name = classifier or "gate"
    for _ in range(2):  # again until it is mended
        with pytest.raises(InputError, match=rf"scores of the classifier '{name}' as the output of (Gated|Distilled)"):
            model(IMAGES)


def test_the_layer_that_scores_the_classes_is_named_instead():
    called = wrapped(Gated(), classifier="head", confidence="one")
    before = called(IMAGES)
    assert is_checked(called)
    with torch.no_grad():
        called.head.calibration.margin.add_(torch.arange(5.0))
    torch.testing.assert_close(called(IMAGES), before + torch.arange(5.0))
    torch.testing.assert_close(fold_model(called)(IMAGES), before + torch.arange(5.0))
    assert type(called.head) is nn.Conv2d


def test_it_can_be_left_out():
    model = wrapped(Distilled(), classifier="fc", check=False)
    assert is_checked(model)
    model(IMAGES)


@pytest.mark.parametrize(
    "make",
    [
        lambda z: z,
        lambda z: (z, None),
        lambda z: [z],
        lambda z: SimpleNamespace(logits=z, loss=None),
        lambda z: {"logits": z},
        lambda z: z.log_softmax(1),
        lambda z: z.half(),
        lambda z: z[..., None, None],
    ],
    ids=["tensor", "tuple", "list", ".logits", "dict", "log-softmax", "half", "shaped"],
)
def test_the_same_scores_in_another_form_pass(make):
    model = wrapped(Returning(make))
    model(IMAGES)
    assert is_checked(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda z: z.softmax(1),
        lambda z: z[:, :3],
        lambda z: 1.1 * z + torch.arange(5.0),
        lambda z: z + 0.02 * torch.arange(5.0),
        lambda z: {"out": z},
        lambda z: None,
        lambda z: (),
    ],
    ids=["softmax", "fewer", "scaled", "a little", "dict", "None", "empty"],
)
def test_other_outputs_are_refused(make):
    with pytest.raises(InputError, match="expected the scores of the classifier 'fc' as the output of Returning"):
        wrapped(Returning(make))(IMAGES)


def test_of_several_calls_of_the_classifier_the_last_counts():
    class Twice(SmallCNN):
        def forward(self, images):
            self.fc(self.features(images.flip(0)))
            return super().forward(images)

    model = wrapped(Twice())
    model(IMAGES)
    assert is_checked(model)


def test_an_empty_batch_passes():
    assert wrapped(SmallCNN())(IMAGES[:0]).shape == (0, NUM_CLASSES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_survives_copies(copied):
    model = copied(wrapped(Distilled(), classifier="fc"))
    assert not is_checked(model)
    with pytest.raises(InputError, match="classifier 'fc'"):
        model(IMAGES)
    good = wrapped(SmallCNN())
    other = copied(good)
    assert torch.equal(other(IMAGES), good(IMAGES))
    assert type(other) is SmallCNN
    assert type(copied(good)) is SmallCNN


def test_scripting_tracing_and_compiling_skip_it():
    expected = wrapped(SmallCNN())(IMAGES).detach()
    for compiled in (
        torch.jit.script,
        lambda model: torch.jit.trace(model, IMAGES, check_trace=False),  # which calls the model too
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.export.export(model, (IMAGES,)).module(),
    ):
        model = wrapped(SmallCNN())
        with torch.no_grad():
            scores = compiled(model)(IMAGES)
        assert scores.shape == expected.shape
        assert not is_checked(model)
        model(IMAGES)
        assert is_checked(model)


def test_a_call_that_stops_at_the_features_leaves_it():
    class Both(SmallCNN):
        def forward(self, images, features=False):
            return self.features(images) if features else super().forward(images)

    model = wrapped(Both())
    model(IMAGES, features=True)
    assert not is_checked(model)
    model(IMAGES)
    assert is_checked(model)


class LoRA(nn.Module):
    """As peft puts it around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2)

    def forward(self, features):
        return self.base_layer(features)


@pytest.mark.parametrize("classifier", [None, "fc.base_layer"])
def test_lora_must_be_merged_first(classifier):
    model = SmallCNN()
    model.fc = LoRA(model.fc)
    with pytest.raises(InputError, match=r"got 'fc\.base_layer' with LoRA; call model\.merge_and_unload\(\) first"):
        wrap_classifier(model, COUNTS, classifier=classifier)


@pytest.mark.parametrize(
    "convolution", [dict(kernel_size=3), dict(kernel_size=1, stride=2), dict(kernel_size=1, padding=1)]
)
def test_another_convolution_is_no_classifier(convolution):
    model = nn.Sequential(nn.Conv2d(1, 5, **convolution), nn.Flatten())
    with pytest.raises(InputError, match="expected a 1x1 convolution as classifier, got Conv2d"):
        wrap_classifier(model, COUNTS)
