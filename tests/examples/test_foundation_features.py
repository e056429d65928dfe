"""The example of features and heads: a probe, heads of three libraries, text embeddings."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("sklearn")

import disalign

CLASSES = 4
LABELS = torch.arange(24) % CLASSES


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(len(LABELS), 3, 64, 64)


def test_it_prints_what_its_header_says(example, capsys):
    module = example("foundation_features")
    assert module.main(["--seed", "1"]) is None
    probe, calibrated, before, after = map(float, re.findall(r"(\d+\.\d)(?! s)", capsys.readouterr().out))
    assert calibrated > probe + 4
    assert after > before + 4


def torchvision_head():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=CLASSES)
    return model, model.fc


def timm_head():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=64)
    return model, model.get_classifier()


def hugging_face_head():
    class Model(nn.Module):  # as ViTForImageClassification: an output with .logits
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
            self.classifier = nn.Linear(12, CLASSES)

        def forward(self, pixel_values):
            return {"logits": self.classifier(self.trunk(pixel_values))}

    model = Model()
    return model, model.classifier


@pytest.mark.filterwarnings("ignore:stage one gets")
@pytest.mark.parametrize("library", [torchvision_head, timm_head, hugging_face_head])
def test_a_head_of(library, example, images):
    model, head = library()
    found = example("foundation_features").calibrate_head(model, head, DataLoader(TensorDataset(images, LABELS), 8))
    assert isinstance(found, disalign.Calibrated)
    assert torch.equal(found.weight, head.weight)
    assert found.fit_report.solution.end < found.fit_report.solution.start


def test_text_embeddings(example):
    torch.manual_seed(0)
    text = torch.randn(CLASSES, 16)
    x = text[LABELS] + torch.randn(len(LABELS), 16)
    found = example("foundation_features").calibrate_zero_shot(x, LABELS, text)
    assert torch.equal(found.weight, text)
    assert float(found.scale) == 100
    assert found.fit_report.solution.end < found.fit_report.solution.start
