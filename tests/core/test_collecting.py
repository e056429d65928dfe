"""One pass over a data set: what it keeps, and how it survives."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import disalign
from disalign import InputError
from disalign.collecting import run_pass
from disalign.io.arrays import BLOCK

ROWS = 2 * BLOCK + 300


class Images(Dataset):
    """Row i is a function of i; counts how often it is asked."""

    def __init__(self, rows=ROWS, factor=1.0, shift=0, first=0):
        self.rows, self.factor, self.shift, self.first, self.read = rows, factor, shift, first, []

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        self.read.append(row)
        generator = torch.Generator().manual_seed(row + self.first)
        return self.factor * torch.randn(5, generator=generator), (row + self.shift) % 3

    def __repr__(self):
        return f"Images({self.rows})"


class Network(nn.Module):
    """BatchNorm and dropout tell eval mode from train mode."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.trunk(x))


def spread(rows=ROWS):
    """The rows that a pass into a folder compares with what is there."""
    return {place * (rows - 1) // 15 for place in range(16)}


def expected(network, data):
    network = network.eval()
    with torch.no_grad():
        return network.trunk(torch.stack([data[row][0] for row in range(len(data))]))


def loader(data, **options):
    return DataLoader(data, **{"batch_size": 64, **options})


def collected(network, images, classifier="head", **options):
    return disalign.collect(network, loader(images), classifier, **options)


@pytest.mark.parametrize("kept", ["in memory", "in a folder"])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"drop_last": True}, {"num_workers": 2}])
def test_every_row_once_in_the_order_of_the_data_set(kept, options, tmp_path):
    network, data = Network().train(), Images()
    out = None if kept == "in memory" else tmp_path / "features"
    features = disalign.collect(network, loader(data, **options), network.head, out=out)
    torch.testing.assert_close(features.x, expected(network, Images()), rtol=1e-5, atol=1e-6)
    assert features.y.tolist() == [row % 3 for row in range(ROWS)]
    assert features.class_counts.tolist() == [783, 783, 782]


def test_the_network_stays_as_it_was():
    network = Network().train()
    network.trunk[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    collected(network, Images(100))
    assert [module.training for module in network.modules()] == [True, True, True, False, True, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not network.head._forward_pre_hooks


def test_without_a_classifier_the_output_is_the_feature():
    network = Network()
    features = collected(network.trunk, Images(100), None)
    assert torch.equal(features.x, collected(network, Images(100)).x)


def test_a_layer_that_writes_to_its_input_and_is_called_by_name():
    class InPlace(Network):
        def forward(self, x):
            features = self.trunk(x)
            scores = self.head(input=features)
            features.zero_()
            return scores

    model = InPlace()
    torch.testing.assert_close(collected(model, Images(50)).x, expected(model, Images(50)), rtol=1e-5, atol=1e-6)


def test_pooled_features_of_a_convolution():
    network = nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 3, 1))
    assert collected(network, Images(10), "2").x.shape == (10, 8)


def test_batches_of_hugging_face():
    class Model(Network):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    def collate(rows):
        x, y = torch.utils.data.default_collate(rows)
        return {"pixel_values": x, "labels": y}

    model = Model()
    found = disalign.collect(model, loader(Images(100), collate_fn=collate), "head")
    torch.testing.assert_close(found.x, expected(model, Images(100)), rtol=1e-5, atol=1e-6)


def test_the_autocast_it_is_called_in():
    network = Network()
    with torch.autocast("cpu", torch.bfloat16):
        half = collected(network, Images(100))
    full = collected(network, Images(100))
    assert half.x.dtype == torch.float32
    assert not torch.equal(half.x, full.x)
    torch.testing.assert_close(half.x, full.x, rtol=0.05, atol=0.05)


def test_kept_in_half_precision(tmp_path):
    network = Network()
    half = collected(network, Images(100), out=tmp_path, dtype=torch.float16)
    assert half.x.dtype == torch.float16
    assert torch.equal(half.x, collected(network, Images(100)).x.half())


def test_a_whole_pass_is_opened_and_not_run_again(tmp_path):
    network = Network()
    first = collected(network, Images(), out=tmp_path)
    data = Images()
    again = collected(network, data, out=tmp_path)
    assert set(data.read) == spread()  # looks whether they come out again
    assert torch.equal(first.x, again.x)
    assert again.provenance == first.provenance
    assert torch.equal(disalign.Features.open(tmp_path).x, first.x)


@pytest.mark.parametrize("kept", ["in memory", "in a folder"])
def test_weights_and_groups_are_kept(kept, tmp_path):
    given = {"weights": [1.0, 2.0] * 50, "groups": list(range(50)) * 2, "class_counts": [100, 200, 300]}
    features = collected(Network(), Images(100), out=None if kept == "in memory" else tmp_path, **given)
    assert features.weights.tolist() == given["weights"]
    assert features.groups.tolist() == given["groups"]
    assert features.class_counts.tolist() == given["class_counts"]


def test_what_is_opened_again_keeps_its_date(tmp_path):
    collected(Network(), Images(100), out=tmp_path)
    record = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text(re.sub(r'"date": "[0-9-]+"', '"date": "2001-01-01"', record))
    assert collected(Network(), Images(100), out=tmp_path).provenance["date"] == "2001-01-01"


def test_only_the_trunk_is_compared_wherever_it_is_wrapped(tmp_path):
    network = Network()
    collected(network, Images(100), out=tmp_path)
    with torch.no_grad():
        network.head.weight += 1
    data = Images(100)
    collected(nn.DataParallel(network), data, network.head, out=tmp_path / "wrapped")
    again = collected(network, data, out=tmp_path)
    assert again.provenance["trunk"] == disalign.Features.open(tmp_path / "wrapped").provenance["trunk"]


class Drawn(Images):
    """No two passes agree."""

    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return x + torch.randn(5), y

    __repr__ = object.__repr__


def test_random_rows_are_not_compared_if_this_is_said(tmp_path):
    first = collected(Network(), Drawn(), out=tmp_path, random=True)
    assert torch.equal(collected(Network(), Drawn(), out=tmp_path, random=True).x, first.x)
    with pytest.raises(InputError, match="to come out again, but some differ"):
        collected(Network(), Drawn(), out=tmp_path)


def test_a_pass_killed_while_its_parts_become_one_goes_on(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("numpy.lib.format.write_array_header_2_0", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collected(Network(), Images(100), out=tmp_path)
    data = Images(100)
    assert torch.equal(collected(Network(), data, out=tmp_path).x, collected(Network(), Images(100)).x)
    assert set(data.read) == spread(100)


def test_a_pass_killed_after_its_parts_became_one_leaves_none(tmp_path):
    collected(Network(), Images(100), out=tmp_path)
    for name in ("begun.json", "part-000000.npz"):
        (tmp_path / name).write_text("left")
    collected(Network(), Images(100), out=tmp_path)
    assert not (tmp_path / "begun.json").exists()
    assert not (tmp_path / "part-000000.npz").exists()


def test_a_pass_without_a_part_is_begun_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
        with pytest.raises(InputError, match="or keep fp16"):
            collected(Network(), Images(), out=tmp_path)
    half = collected(Network(), Images(), out=tmp_path, dtype=torch.float16)
    assert half.x.dtype == torch.float16


def test_parts_of_other_items_are_not_gone_on_with(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        collected(Network(), Interrupted(), out=tmp_path)
    monkeypatch.setattr("disalign.collecting.BLOCK", 1000)
    with pytest.raises(InputError, match="some of another trunk, layout"):
        run_pass(ROWS, None, {"trunk": "a"}, tmp_path, size=1, block=1000)
    begun = json.loads((tmp_path / "begun.json").read_text())
    assert begun["layout"] == [ROWS, BLOCK]


def test_the_loaders_batches_and_workers(tmp_path):
    def double(_):
        torch.utils.data.get_worker_info().dataset.factor = 2.0

    seen, network, data = [], Network(), Images(100)

    def step(model, batch):
        seen.append(len(batch[1]))
        return batch[1], model(batch[0])

    sampler = torch.utils.data.BatchSampler(range(100), 40, drop_last=False)
    batches = DataLoader(data, batch_sampler=sampler, num_workers=1, worker_init_fn=double)
    found = disalign.collect(network, batches, "head", step=step)
    assert seen == [1, 40, 40, 20]
    torch.testing.assert_close(found.x, expected(network, Images(100, factor=2.0)), rtol=1e-5, atol=1e-6)


OTHERS = {
    "trunk": lambda out: collected(Network(1), Images(), out=out),
    "rows": lambda out: collected(Network(), Images(ROWS - 1), out=out),
    "data": lambda out: collected(Network(), Images(), out=out, data="another list"),
    "arrays": lambda out: collected(Network(), Images(), out=out, dtype=torch.float16),
    "weights or groups": lambda out: collected(Network(), Images(), out=out, weights=[2.0] * ROWS),
    "class_counts": lambda out: collected(Network(), Images(), out=out, class_counts=[900, 900, 900]),
    "classifier": lambda out: collected(Network(), Images(), "trunk.3", out=out),
    "transforms": lambda out: collected(Network(), Images(factor=2.0), out=out),
    "labels": lambda out: collected(Network(), Images(shift=1), out=out),
    "another list of a folder without a name": lambda out: collected(Network(), Images(first=1), out=out),
}


@pytest.mark.parametrize("what", OTHERS)
def test_features_of_others_are_refused_and_kept(what, tmp_path):
    collected(Network(), Images(), out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    named = what in ("trunk", "rows", "data", "arrays", "weights or groups", "class_counts", "classifier")
    sentence = f"some of another .*{what}" if named else "to come out again, but some differ"
    with pytest.raises(InputError, match=sentence):
        OTHERS[what](tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before}


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "x.npy").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        collected(Network(), Images(), out=tmp_path)
    assert (tmp_path / "x.npy").read_text() == "mine"


def test_changed_rows_are_collected_again(tmp_path, caplog):
    first = collected(Network(), Images(), out=tmp_path).x.clone()
    rows = np.load(tmp_path / "x.npy", mmap_mode="r+")
    rows[BLOCK + 5] += 1
    rows.flush()
    assert torch.equal(collected(Network(), Images(), out=tmp_path).x, first)
    assert "1 of 3 blocks of rows changed since" in caplog.text
    assert "they are collected again" in caplog.text


class Interrupted(Images):
    """Ends a pass in the third block."""

    def __getitem__(self, row):
        if row > 2 * BLOCK and row not in spread():
            raise KeyboardInterrupt
        return super().__getitem__(row)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, 500),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b"\x01", b"\x02")),
    "missing": lambda path: path.unlink(),
    "foreign": lambda path: path.write_text("mine"),
    "without an array": lambda path: keep(path, "x", "y", "crc"),
    "without a checksum": lambda path: keep(path, "x", "y", "weights"),
}


def keep(path, *names):
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in names}
    np.savez(path, **found)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts_of_a_pass_that_ended_early_are_collected_again(damage, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        collected(Network(), Interrupted(), out=tmp_path)
    DAMAGE[damage](tmp_path / "part-000001.npz")
    data = Images()
    features = collected(Network(), data, out=tmp_path)
    assert set(data.read) == spread() | {*range(BLOCK, ROWS)}
    assert torch.equal(features.x, collected(Network(), Images()).x)


def test_a_pass_that_ended_early_of_others_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        collected(Network(), Interrupted(), out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="some of another trunk"):
        collected(Network(1), Images(), out=tmp_path)
    with pytest.raises(InputError, match="to come out again, but some differ"):
        collected(Network(), Images(factor=2.0), out=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["weights", "groups"])
def test_changed_weights_and_groups_are_written_again(name, tmp_path):
    given = {"weights": np.linspace(1, 2, ROWS), "groups": np.arange(ROWS) // 2}
    collected(Network(), Images(), out=tmp_path, **given)
    rows = np.load(tmp_path / f"{name}.npy", mmap_mode="r+")
    rows[:] = 99
    rows.flush()
    again = collected(Network(), Images(), out=tmp_path, **given)
    assert getattr(again, name).tolist() == given[name].tolist()


@pytest.mark.parametrize("name", ["x.npy", "y.npy"])
def test_truncated_arrays_are_collected_again(name, tmp_path):
    first = collected(Network(), Images(), out=tmp_path).x.clone()
    os.truncate(tmp_path / name, 200)
    assert torch.equal(collected(Network(), Images(), out=tmp_path).x, first)


def test_killed_it_goes_on(tmp_path):
    program = f"""
        import sys, time
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        import disalign
        from test_collecting import Images, Network, collected

        class Slow(Images):
            def __getitem__(self, row):
                if len(self.read) > {BLOCK + 100}:
                    time.sleep(60)
                return super().__getitem__(row)

        collected(Network(), Slow(), out={str(tmp_path / "out")!r})
    """
    first = tmp_path / "out" / "part-000000.npz"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)]) as process:
        until = time.monotonic() + 120
        while not first.exists() and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(InputError, match="record of features"):
        disalign.Features.open(tmp_path / "out")
    data = Images()
    features = collected(Network(), data, out=tmp_path / "out")
    assert set(data.read) == spread() | {*range(BLOCK, ROWS)}
    assert torch.equal(features.x, collected(Network(), Images()).x)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "record.json",
        "weights.npy",
        "x.npy",
        "y.npy",
    ]


def rank_of_two(rank, folder, kept):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    data = Images()
    found = collected(Network(), data, out=f"{folder}/out" if kept else None)
    torch.save((found.x, found.y, sorted(set(data.read))), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
def test_two_processes_share_the_rows_and_get_all(kept, tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path), kept), nprocs=2)
    alone = collected(Network(), Images())
    (x, y, first), (x_2, y_2, second) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    for found in ((x, y), (x_2, y_2)):
        assert torch.equal(found[0], alone.x)
        assert torch.equal(found[1], alone.y)
    assert set(first) == {*range(BLOCK), *range(2 * BLOCK, ROWS)}
    assert set(second) == {0} | {*range(BLOCK, 2 * BLOCK)}


class WithNaN(Images):
    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return (x * float("nan"), y) if row in (70, 71) else (x, y)


class Tokens(nn.Module):
    def forward(self, x):
        return x[:, None].expand(-1, 3, -1)


class Twice(Network):
    def forward(self, x):
        return super().forward(x) + super().forward(-x)


class Never(Network):
    def forward(self, x):
        return self.trunk(x) @ self.head.weight.T


def dropping(rows):
    return torch.utils.data.default_collate(rows[1:] or rows)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(5), 0)])


REFUSED = {
    "a classifier that runs twice": (
        lambda: collected(Twice(), Images(9)),
        "but it ran 2 times",
    ),
    "a classifier that never runs": (
        lambda: collected(Never(), Images(9)),
        "but it ran 0 times",
    ),
    "a collate function that drops rows": (
        lambda: disalign.collect(Network(), loader(Images(9), collate_fn=dropping), "head"),
        "expected 9 examples in a batch, got 8",
    ),
    "a stream": (lambda: collected(Network(), Stream()), "expected a data set with a length, got Stream"),
    "weights of another length": (lambda: collected(Network(), Images(9), weights=[1.0]), "expected 9 weights"),
    "negative weights": (lambda: collected(Network(), Images(2), weights=[1.0, -1.0]), "not negative"),
    "fractions as labels": (lambda: collected(Network(), Images(9, shift=0.5)), "expected one whole label per sample"),
    "NaN": (lambda: collected(Network(), WithNaN(100)), "NaN or infinity in 2 rows: 70, 71"),
    "NaN among the rows that are compared": (
        lambda: collected(Network(), WithNaN(71), out=tempfile.mkdtemp()),
        "NaN or infinity in 1 rows: 70",
    ),
    "no data": (lambda: collected(Network(), Images(0)), "expected a data set with examples, got an empty one"),
    "no such layer": (lambda: collected(Network(), Images(9), "fc"), "expected a module of the model as classifier"),
    "another's layer": (lambda: collected(Network(), Images(9), nn.Linear(8, 3)), "expected a module of the model"),
    "tokens": (
        lambda: collected(Tokens(), Images(9), None),
        "features of shape (n, d) and n labels, got (1, 3, 5)",
    ),
    "a dtype": (lambda: collected(Network(), Images(9), dtype=torch.bfloat16), "got torch.bfloat16"),
    "batches": (
        lambda: disalign.collect(Network(), loader(Images(9), collate_fn=lambda rows: rows[0][0]), "head"),
        "expected batches of (inputs, labels), or mappings with 'labels', got Tensor",
    ),
    "a mapping without labels": (
        lambda: disalign.collect(Network(), loader(Images(9), collate_fn=lambda rows: {"x": rows[0][0]}), "head"),
        "expected batches of (inputs, labels), or mappings with 'labels', got dict",
    ),
    "labels": (lambda: collected(Network(), Images(9), class_counts=[4, 5]), "expected labels in [0, 2), got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    attempt, sentence = REFUSED[name]
    with pytest.raises(InputError, match=re.escape(sentence)):
        attempt()


def test_the_need_of_disk_is_said_before_the_pass(tmp_path, caplog):
    data = Images()
    with caplog.at_level("INFO", "disalign"):
        collected(Network(), data, out=tmp_path / "said in time")
    size = ROWS * (8 * 4 + 8 + 8)
    assert f"features of {ROWS} examples take up to {size / 2**20:.1f} MiB in" in caplog.text


def test_too_little_room_is_said_before_the_pass(tmp_path, monkeypatch):
    room = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    data = Images()
    with pytest.raises(InputError, match="MiB free for the features in"):
        collected(Network(), data, out=tmp_path)
    assert set(data.read) == {0}


def test_two_passes_at_once_into_one_folder_are_refused(tmp_path):
    from disalign.io import locked_folder

    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    program += f"from test_collecting import *; collected(Network(), Images(), out={str(tmp_path)!r})"
    with locked_folder(tmp_path, "out"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "another run writes to" in done.stderr


ON_A_GPU = """
network = Network()
alone = collected(network, Images(300))
features = collected(network.cuda(), Images(300))
assert features.x.device.type == "cpu"
torch.testing.assert_close(features.x, alone.x, rtol=1e-3, atol=1e-3)
assert features.provenance["trunk"] == alone.provenance["trunk"]
"""


@pytest.mark.gpu
def test_a_network_on_a_gpu(gpu_environment):
    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    program += f"from test_collecting import *\n{ON_A_GPU}"
    done = subprocess.run([sys.executable, "-c", program], env=gpu_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def of_any_number_of_rows(items=11, block=4, out=None, most=3, read=None):
    """A pass in which item i has i % (most + 1) rows."""

    def run(chosen):
        for item in chosen:
            if read is not None:
                read.append(item)
            rows = item % (most + 1)
            labels = torch.full((rows,), item % 2)
            yield 1, {"x": torch.full((rows, 2), float(item)), "y": labels, "weights": torch.ones(rows).double()}

    return run_pass(items, run, {"trunk": "a"}, out, size=1000, block=block, class_counts=torch.tensor([5, 6]))


@pytest.mark.parametrize("block", [1, 4, 100])
def test_items_of_any_number_of_rows(block, tmp_path):
    expected = [item for item in range(11) for _ in range(item % 4)]
    for out in (None, tmp_path / "rows"):
        features = of_any_number_of_rows(block=block, out=out)
        assert features.x[:, 0].tolist() == expected
        assert features.y.tolist() == [item % 2 for item in expected]
        assert features.class_counts.tolist() == [5, 6]
    read = []
    of_any_number_of_rows(block=block, out=tmp_path / "rows", read=read)
    assert not read


@pytest.mark.parametrize("kept", [False, True])
def test_a_pass_without_rows_is_refused(kept, tmp_path):
    with pytest.raises(InputError, match="expected rows to learn from, got none"):
        of_any_number_of_rows(out=tmp_path if kept else None, most=0)


def test_provenance_names_the_versions():
    provenance = of_any_number_of_rows().provenance
    assert provenance["versions"]["torch"] == torch.__version__
    assert set(provenance["versions"]) == {"python", "torch", "numpy"}
    assert provenance["trunk"] == "a"
