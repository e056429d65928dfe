"""The public surface, and that torch and numpy are all it takes."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import disalign

IMPORTS = """
import json, sys
import numpy, torch
before = set(sys.modules)
from disalign import *
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def imported():
    """Modules in a fresh interpreter after torch and numpy, and those that disalign adds."""
    environment = os.environ | {"PYTHONPATH": str(Path(disalign.__file__).parents[1])}
    output = subprocess.check_output([sys.executable, "-c", IMPORTS], env=environment)
    before, added = json.loads(output)
    return set(before), set(added)


@pytest.mark.parametrize("framework", ["mmengine", "mmcv", "mmseg", "timm", "torchvision", "detectron2"])
def test_importing_disalign_imports_no_framework(imported, framework):
    before, added = imported
    assert framework not in before | added


def test_importing_disalign_adds_only_torch_numpy_and_the_standard_library(imported):
    allowed = {"disalign", "torch", "numpy"} | set(sys.stdlib_module_names)
    # The build's variables, which sysconfig reads, are a module of the standard library with the platform in its name.
    added = {name.split(".")[0] for name in imported[1] if not name.startswith("_sysconfigdata")}
    assert added <= allowed


def test_the_public_names_are_all_that_is_imported():
    # Beside them only the modules that they come from.
    imported = {name for name, value in vars(disalign).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert imported == {*disalign.__all__}


@pytest.mark.parametrize("name", disalign.__all__)
def test_every_public_name_has_a_docstring(name):
    public = getattr(disalign, name)
    assert inspect.getdoc(public)
    # A dataclass without one gets its signature.
    assert not public.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("name", [name for name in disalign.__all__ if inspect.isclass(getattr(disalign, name))])
def test_every_public_method_has_a_docstring(name):
    members = vars(getattr(disalign, name)).items()
    bare = [key for key, value in members if inspect.isfunction(value) and key[0] != "_" and not value.__doc__]
    assert set(bare) <= {"forward", "extra_repr"}  # torch documents these


def test_input_error_is_a_value_error():
    assert issubclass(disalign.InputError, ValueError)
