"""The examples in the core's docstrings: they print what they say, and every public module has one."""

import ast
import doctest
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import disalign

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def found():
    """All docstrings with examples, from the source: doctest's own finder passes over decorated functions."""
    for path in sorted(Path(disalign.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                text, line = ast.get_docstring(node, clean=False), node.body[0].lineno - 1
                name = f"{path.stem}.{getattr(node, 'name', '')}"
                test = doctest.DocTestParser().get_doctest(text, {}, name, str(path), line)
                if test.examples:
                    yield test


FOUND = list(found())
each_example = pytest.mark.parametrize("test", FOUND, ids=lambda test: test.name)


@pytest.mark.parametrize("seed", [0, 1])
@each_example
def test_an_example_prints_what_it_says_whatever_the_seed(test, seed):
    test.globs = {"disalign": disalign, "nn": nn, "torch": torch}
    torch.manual_seed(seed)
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=told.append)
    assert not result.failed, "".join(told)


@each_example
def test_an_example_ends_in_output_that_is_checked(test):
    assert test.examples[-1].want.strip(" .\n")
    assert not any(doctest.SKIP in example.options for example in test.examples)


def test_each_module_with_public_names_has_an_example():
    exported = {getattr(getattr(disalign, name), "__module__", "") for name in disalign.__all__}
    public = {name for name in exported if name.count(".") == 1} | {"disalign.methods", "disalign.sklearn"}
    assert len(public) > 10
    assert public <= {f"disalign.{Path(test.filename).stem}" for test in FOUND}
