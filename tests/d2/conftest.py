import logging

import pytest


@pytest.fixture(autouse=True)
def heard():
    """Detectron2's loggers keep to themselves once a run has set them up; ``caplog`` must hear them all the same."""
    for name in ("detectron2", "fvcore", "disalign_d2"):
        logger = logging.getLogger(name)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def storage():
    """Where losses put their figures."""
    from detectron2.utils.events import EventStorage

    with EventStorage() as storage:
        yield storage
