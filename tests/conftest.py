"""What every test shares: one thread, one seed, and a process group of one."""

import os
import sys

# Before torch is imported: on shared cores several threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("DISALIGN_TEST_CUDA") != "1":
    # The comparisons are bit for bit, on the CPU. The tests that need a GPU: DISALIGN_TEST_CUDA=1 pytest -m gpu.
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


@pytest.fixture
def process_group(tmp_path):
    """A gloo group of this process alone: all that DDP and the collectives need."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
