"""What every test shares: one thread, one seed, and a process group of one."""

import os
import subprocess
import sys

# Before torch is imported: on shared cores several threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The comparisons are bit for bit, on the CPU; what needs a GPU runs in processes of its own, with this environment.
WITH_GPUS = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if sys.platform == "linux":
    # Gloo otherwise looks up the host's name, which a machine without network may not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gpu_environment():
    """The environment for a process that uses a GPU; skips where there is none."""
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", probe], env=WITH_GPUS).returncode:
        pytest.skip("needs a GPU that CUDA can use, and there is none")
    return WITH_GPUS


@pytest.fixture
def process_group(tmp_path):
    """A gloo group of this process alone: all that DDP and the collectives need."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
