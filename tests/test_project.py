"""What the README and the docs say must be so."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import disalign
import disalign.cli

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_first_two_blocks_are_the_two_commands():
    first, second = code_blocks("bash")[:2]
    assert first == 'python -m pip install -c constraints.txt -e ".[cls]" && python -m disalign_cls.demo\n'
    install = 'python -m pip install -c constraints.txt -e ".[test]"'
    # MMSegmentation's opencv-python needs libGL, which a fresh machine may lack.
    headless = "python -m pip install --force-reinstall --no-deps -c constraints.txt opencv-python-headless"
    assert second == f"{install} \\\n    && {headless} \\\n    && python -m pytest -n 2 --dist loadfile\n"


def test_ci_runs_the_second_command_and_nothing_else():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', *code_blocks("bash")[1].splitlines()]


def test_the_three_lines_of_the_readme_run():
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU())
    names = {"torch": torch, "model": torch.nn.Sequential(backbone, torch.nn.Linear(8, 4))}
    snippet = code_blocks("python")[0]
    exec(snippet, names)
    loss = names["loss"](names["model"](torch.rand(6, 3, 2, 2)), torch.arange(6) % 4)
    loss.backward()
    names["optimizer"].step()
    trained = [name for name, parameter in names["model"].named_parameters() if parameter.grad is not None]
    assert trained == ["1.calibration.magnitude", "1.calibration.margin"] + [
        f"1.calibration.confidence.{name}" for name in ("weight", "bias")
    ]


def test_the_features_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for suffix, counts in (("", [60, 20, 6]), ("_test", [20, 20, 20])):
        y = np.repeat(range(3), counts)
        centres = 2 * np.random.default_rng(9).normal(size=(3, 8))
        np.save(tmp_path / f"x{suffix}.npy", centres[y] + 2 * generator.normal(size=(len(y), 8)))
        np.save(tmp_path / f"y{suffix}.npy", y)
    monkeypatch.chdir(tmp_path)
    exec(code_blocks("python")[1], {})
    assert re.fullmatch(r"balanced accuracy: 0\.\d+\n", capsys.readouterr().out)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def anchors(page):
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_deviation_names_tests_that_exist():
    text = (ROOT / "docs" / "deviations.md").read_text()
    sections = text.split("\n## ")[1:]
    for section in sections:
        named = re.findall(r"`(tests/[\w/.]+)`", section)
        assert named, section.splitlines()[0]
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_one_version_everywhere():
    assert importlib.metadata.version("disalign") == disalign.__version__
    assert f"version: {disalign.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {disalign.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_shipped_command_names_a_config_that_exists():
    configs = [
        config
        for page in PAGES
        for config in re.findall(r"(?<![\w/])((?:cls|d2|mmseg)/[a-z]\w+/[\w.-]+\.(?:py|yaml))", page.read_text())
    ]
    assert len(configs) > 40
    assert [one for one in configs if "NAME" not in one and not (ROOT / "configs" / one).is_file()] == []


def test_a_checkout_reads_its_own_configs(tmp_path, monkeypatch):
    # An uninstalled copy can leave its empty folders behind, which Python then takes for the package.
    (tmp_path / "disalign_configs" / "cls").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert disalign.cli.shipped_configs() == ROOT / "configs"


HOSTS = ("detectron2", "fvcore", "mmcv", "mmengine", "mmpretrain", "mmseg", "timm", "torchvision")
PACKAGES = {path.name for path in ROOT.glob("disalign*") if (path / "__init__.py").is_file()}
#: Package -> those of ours that it may import; disalign_tools imports a host's package only where one is asked for.
MAY_IMPORT = {
    "disalign": set(),
    "disalign_mmengine": {"disalign"},
    "disalign_cls": {"disalign", "disalign_mmengine"},
    "disalign_mmseg": {"disalign", "disalign_mmengine"},
    "disalign_d2": {"disalign"},
    "disalign_tools": {"disalign"},
}


def imported(tree):
    """The first words of what is imported when a module is, and of what only its functions import."""
    found = {True: set(), False: set()}
    inner = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        found[id(node) not in inner].update(name.partition(".")[0] for name in names)
    return found[True], found[False]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_the_core_and_one_framework(package):
    assert set(MAY_IMPORT) == PACKAGES
    others = PACKAGES - MAY_IMPORT[package] - {package}
    for path in (ROOT / package).rglob("*.py"):
        at_once, later = imported(ast.parse(path.read_text()))
        assert not at_once & others, path
        if package != "disalign_tools":
            assert not later & others, path


def test_the_core_knows_torch_numpy_and_no_framework():
    for path in (ROOT / "disalign").rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_once, later = imported(tree)
        typing = {"PIL"} if "TYPE_CHECKING" in path.read_text() else set()
        estimator = {"sklearn"} if path == ROOT / "disalign" / "sklearn.py" else set()
        assert at_once - set(sys.stdlib_module_names) <= {"torch", "numpy"} | typing | estimator, path
        assert later - set(sys.stdlib_module_names) <= {"torch", "numpy", "PIL"}, path
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
        }
        words = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented
        ]
        assert not [word for word in words if any(host in word.lower() for host in HOSTS)], path
