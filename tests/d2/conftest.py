import pytest


@pytest.fixture
def storage():
    """Where losses put their figures."""
    from detectron2.utils.events import EventStorage

    with EventStorage() as storage:
        yield storage
