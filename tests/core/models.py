"""A small stage-one model with everything that may drift: BatchNorm, a dropout module and functional dropout."""

import torch.nn.functional as F
from torch import nn

from disalign import CosineClassifier

NUM_CLASSES = 5
FEATURES = 6
COUNTS = [80, 40, 20, 10, 5]


class SmallCNN(nn.Module):
    def __init__(self, classifier="linear", num_classes=NUM_CLASSES):
        super().__init__()
        self.conv = nn.Conv2d(1, FEATURES, 3)
        self.bn = nn.BatchNorm2d(FEATURES)
        self.neck = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.5))
        kind = {"linear": nn.Linear, "cosine": CosineClassifier}[classifier]
        self.fc = kind(FEATURES, num_classes)

    def features(self, images):
        x = F.relu(self.bn(self.conv(images))).mean(dim=(2, 3))
        x = F.dropout(x, 0.5, training=self.training)
        return self.neck(x)

    def forward(self, images):
        return self.fc(self.features(images))
