"""Both stages on a GPU, in fp32 and mixed precision, each in a process of its own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("detectron2")

import torch

from . import runs
from .runs import CALIBRATION, load, log

pytestmark = pytest.mark.gpu

NO_TEST = ["DATASETS.TEST", "()"]


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "AMP"])
def both(request, gpu_environment, tmp_path_factory):
    """The folders of a short stage one and stage two, and what started them."""
    folder = tmp_path_factory.mktemp("gpu")
    configs = [
        runs.write_config(folder, runs.write_data(folder / name), name, calibrate=name == "two")
        for name in ("one", "two")
    ]

    def train(config, output, *options, flags=()):
        program = (
            "import sys; from d2 import runs; config, output, flags, *options = sys.argv[1:];"
            "sys.exit(runs.main(config, output, *options, flags=flags.split()))"
        )
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        given = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", request.param, *options]
        command = [sys.executable, "-c", program, config, output, " ".join(flags), *given]
        done = subprocess.run(
            list(map(str, command)), env=gpu_environment | paths, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr

    train(configs[0], folder / "one", "SOLVER.MAX_ITER", 20)
    weights = folder / "one" / "model_final.pth"
    train(configs[1], folder / "two", "MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", 8, "SOLVER.BASE_LR", 1.0)
    return folder, configs[1], train


def test_stage_two_trains_its_calibration_and_nothing_else(both):
    folder, _, _ = both
    one, two = (load(folder / name / "model_final.pth")["model"] for name in ("one", "two"))
    assert "frozen tensors are bit-identical to what this run started from" in log(folder / "two")
    assert "Running on the CPU" not in log(folder / "two")
    learnt = {name for name in two if name.rpartition(".calibration.")[2] in CALIBRATION}
    assert len(learnt) == len(CALIBRATION)
    assert two.keys() - learnt <= one.keys()
    assert all(torch.equal(two[name], one[name]) for name in two.keys() - learnt)
    start = {"magnitude": 1, "margin": 0, "confidence.weight": 0, "confidence.bias": 0}
    assert all((two[name] != start[name.rpartition(".calibration.")[2]]).any() for name in learnt)
    assert all(tensor.isfinite().all() for tensor in two.values())


def test_stage_one_is_evaluated_beside_stage_two(both):
    folder, _, _ = both
    (found,) = runs.figures(folder / "two").values()
    assert found["stage_one"].keys() == found["disalign"].keys()


def test_a_run_in_two_halves_ends_near_the_whole_one(both):
    folder, config, train = both
    weights = folder / "one" / "model_final.pth"
    options = ["MODEL.WEIGHTS", weights, "SOLVER.BASE_LR", 1.0, "SOLVER.CHECKPOINT_PERIOD", 4, *NO_TEST]
    train(config, folder / "halves", *options, "SOLVER.MAX_ITER", 4)
    train(config, folder / "halves", *options, "SOLVER.MAX_ITER", 8, flags=["--resume"])
    assert "Starting training from iteration 4" in log(folder / "halves")
    halves, start = load(folder / "halves" / "model_final.pth"), load(weights)["model"]
    assert halves["iteration"] == 7
    assert "frozen tensors are bit-identical" in log(folder / "halves")
    assert all(torch.equal(halves["model"][name], tensor) for name, tensor in start.items() if name in halves["model"])
