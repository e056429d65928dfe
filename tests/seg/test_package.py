"""The import: what it registers, what it leaves alone, and what it says where the framework is missing."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("mmseg", reason="mmsegmentation is not installed")

FRESH = """
import json, sys
import disalign_mmseg
from mmseg.registry import HOOKS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, RUNNERS
names = {
    "models": ["DisAlignEncoderDecoder", "DisAlignCascadeEncoderDecoder", "DisAlignFCNHead", "DisAlignUPerHead",
               "GRWCrossEntropyLoss"],
    "hooks": ["ClassCountsHook", "ComparisonHook", "PlainCheckpointHook", "StageTwoHook"],
    "metrics": ["LongTailIoUMetric"],
    "constructors": ["CalibrationOptimWrapperConstructor"],
    "runners": ["DisAlignRunner", "DisAlignSegRunner"],
}
registries = dict(models=MODELS, hooks=HOOKS, metrics=METRICS, constructors=OPTIM_WRAPPER_CONSTRUCTORS, runners=RUNNERS)
found = {kind: {name: registries[kind].get(name).__module__ for name in of_kind} for kind, of_kind in names.items()}
others = {name.split(".")[0] for name in sys.modules} & {"detectron2", "disalign_d2", "disalign_cls"}
print(json.dumps({"found": found, "others": sorted(others)}))
"""
MISSING = """
import sys; sys.modules[{name!r}] = None
import disalign
print(disalign.AdaptiveCalibration.__name__)
try:
    import disalign_mmseg
except ImportError as error:
    print(error)
"""


def python(program):
    """Last lines that a fresh interpreter prints."""
    command = [sys.executable, "-W", "error:::disalign_mmseg", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_it_registers_everything_and_no_other_framework():
    report = json.loads(python(FRESH)[-1])
    assert report["others"] == []
    modules = {module.split(".")[0] for of_kind in report["found"].values() for module in of_kind.values()}
    assert modules == {"disalign_mmseg", "disalign_mmengine"}
    # The same name in the classification package is another hook.
    assert report["found"]["hooks"]["ClassCountsHook"] == "disalign_mmseg.hooks"


@pytest.mark.parametrize("name", ["mmseg", "mmengine"])
def test_without_the_framework_the_import_says_how_to_install_it(name):
    core, sentence = python(MISSING.format(name=name))[-2:]
    assert core == "AdaptiveCalibration"
    assert sentence.startswith(f"disalign_mmseg needs mmsegmentation and its dependencies, but there is no {name}")
    assert "pip install 'disalign[mmseg]'" in sentence
