"""docs/own_model.md shows the examples' own lines, and names what exists."""

import re
import textwrap

import pytest
import torch
from torch import nn

import disalign

from .conftest import EXAMPLES

ROOT = EXAMPLES.parent
PAGE = (ROOT / "docs" / "own_model.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
OWN_CLASSIFIER = "A classifier of your own"


def code_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("title", [title for title in SECTIONS if code_blocks(SECTIONS[title])])
def test_the_code_of_the_page_is_the_examples(title):
    linked = re.findall(r"\]\(\.\./(examples/[\w/]+\.py)\)", SECTIONS[title])
    if title == OWN_CLASSIFIER:
        assert not linked
        return
    (path,) = linked
    beside = (ROOT / path).parent
    files = [ROOT / path] if beside == EXAMPLES else sorted(beside.glob("*.py"))
    source = "".join("\n" + file.read_text() for file in files)
    for block in code_blocks(SECTIONS[title]):
        # Whole lines, as indented as in the file.
        assert f"\n{block}" in source, textwrap.shorten(block, 80)


def test_every_example_is_on_the_page_and_says_its_command():
    for path in [*EXAMPLES.glob("*.py"), EXAMPLES / "mmseg_custom_head" / "my_head.py"]:
        name = str(path.relative_to(ROOT))
        assert f"(../{name})" in PAGE
        header = path.read_text().split('"""')[1]
        assert re.search(r"^    (export|python) ", header, flags=re.MULTILINE), name


def test_a_classifier_of_ones_own(monkeypatch):
    monkeypatch.setattr("disalign.modules.CALIBRATED", dict(disalign.CALIBRATED))
    monkeypatch.setattr(disalign, "CALIBRATED", disalign.modules.CALIBRATED)
    (block,) = code_blocks(SECTIONS[OWN_CLASSIFIER])
    names = {"disalign": disalign, "nn": nn, "torch": torch}
    exec(block, names)
    model = nn.Sequential(nn.Linear(4, 8), names["Prototypes"](8, 3))
    inputs = torch.randn(5, 4)
    before = model(inputs).detach()
    wrapped, loss = disalign.wrap_classifier(model, class_counts=[9, 3, 1])
    assert type(wrapped[1]) is names["CalibratedPrototypes"]
    assert torch.equal(wrapped(inputs), before)
    loss(wrapped(inputs), torch.tensor([0, 1, 2, 0, 1])).backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained == {
        f"1.calibration.{name}" for name in ("magnitude", "margin", "confidence.weight", "confidence.bias")
    }
