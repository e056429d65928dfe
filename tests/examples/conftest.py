"""The examples as modules, as ``python examples/NAME.py`` finds them: their folder stands in front."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def example():
    """From a name to the module. They stay imported: a registry takes each class once."""
    folders = [str(EXAMPLES), str(EXAMPLES / "mmseg_custom_head")]
    sys.path[:0] = folders
    yield importlib.import_module
    for folder in folders:
        sys.path.remove(folder)
