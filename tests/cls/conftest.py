"""Stages one and two of the digits, trained once for all tests."""

import pytest

from .runs import BASELINE, DISALIGN, train


@pytest.fixture(scope="session")
def stage_ones(tmp_path_factory):
    """Classifier -> the checkpoint of a short stage one."""
    paths = {}
    for classifier, config in BASELINE.items():
        folder = tmp_path_factory.mktemp("stage_one") / classifier
        assert train(config, folder, epochs=4) == 0
        paths[classifier] = folder / "epoch_4.pth"
    return paths


@pytest.fixture(scope="session")
def stage_one(stage_ones):
    """The linear classifier's."""
    return stage_ones["linear"]


@pytest.fixture(scope="session")
def stage_twos(stage_ones, tmp_path_factory):
    """Classifier -> the checkpoint of a short stage two, from ``stage_ones``, validated after each epoch."""
    paths = {}
    for classifier, config in DISALIGN.items():
        folder = tmp_path_factory.mktemp("stage_two") / classifier
        options = [f"stage_one={stage_ones[classifier]}", "train_cfg.val_interval=1"]
        assert train(config, folder, *options, epochs=3) == 0
        paths[classifier] = folder / "epoch_3.pth"
    return paths


@pytest.fixture(scope="session")
def stage_two(stage_twos):
    """The linear classifier's."""
    return stage_twos["linear"]
