"""scripts/make_cifar_lt.py, on a fabricated CIFAR folder: no network, torchvision's own reader."""

import importlib.util
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets import cifar

from disalign import InputError
from disalign_cls.datasets import ArrayDataset

PATH = Path(__file__).parents[2] / "scripts" / "make_cifar_lt.py"
SPEC = importlib.util.spec_from_file_location("make_cifar_lt", PATH)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

PER_CLASS = 20


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


@pytest.fixture
def root(name, tmp_path, monkeypatch):
    """A folder in CIFAR's format: 20 training images and 1 test image per class, shuffled, random pixels."""
    # Only the checksums of the real files are left out.
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setattr(cifar, "download_and_extract_archive", refuse_network)
    of_name = getattr(datasets, script.DATASETS[name])
    key, num_classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    folder = tmp_path / "cifar" / of_name.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for files, per_class in ((of_name.train_list, PER_CLASS), (of_name.test_list, 1)):
        labels = generator.permutation(np.repeat(np.arange(num_classes), per_class))
        for (file, _), part in zip(files, np.array_split(labels, len(files)), strict=True):
            pixels = generator.integers(0, 256, (len(part), 3072), dtype=np.uint8)
            (folder / file).write_bytes(pickle.dumps({"data": pixels, key: part.tolist()}))
    names = [f"class {label}" for label in range(num_classes)]
    (folder / of_name.meta["filename"]).write_bytes(pickle.dumps({of_name.meta["key"]: names}))
    return tmp_path / "cifar"


def refuse_network(*args, **kwargs):
    raise URLError("no network in tests")


@pytest.mark.parametrize(("num_classes", "n_max", "total"), [(10, 5000, 12406), (100, 500, 10847)])
def test_counts_are_the_benchmarks(num_classes, n_max, total):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes), n_max))
    kept = script.long_tailed_indices(labels, 100)
    counts = np.bincount(labels[kept])
    assert len(kept) == counts.sum() == total
    assert (counts[0], counts[-1]) == (n_max, n_max // 100)
    assert (np.diff(counts) <= 0).all()


def test_first_images_of_each_class_in_order():
    labels = [1, 0, 1, 0, 1, 0, 1, 0]
    # Class 0 keeps 4 of 4, class 1 one of 4: number 0, its first.
    assert script.long_tailed_indices(labels, 4).tolist() == [0, 1, 3, 5, 7]
    assert script.long_tailed_indices(labels, 1).tolist() == list(range(8))
    assert script.long_tailed_indices([0, 0, 0], 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("imbalance", [0.5, 0, -1, 4.5, float("nan"), float("inf")])
def test_impossible_imbalance_is_refused(imbalance):
    with pytest.raises(InputError, match=r"expected an imbalance from 1 to 4"):
        script.long_tailed_indices([0, 1] * 4, imbalance)


def test_file_is_what_the_configs_read(name, root, tmp_path, capsys):
    out = tmp_path / "new" / "out.npz"
    assert script.main([name, str(out), "--imbalance", "10", "--root", str(root), "--no-download"]) == 0
    assert str(out) in capsys.readouterr().out
    original = getattr(datasets, script.DATASETS[name])(root)
    num_classes = len(original.classes)
    expected = [int(PER_CLASS * 0.1 ** (label / (num_classes - 1))) for label in range(num_classes)]

    train, test = ArrayDataset(str(out), split="train"), ArrayDataset(str(out), split="test")
    assert train.class_counts.tolist() == expected
    assert (expected[0], expected[-1]) == (20, 2)
    assert test.class_counts.tolist() == [1] * num_classes
    assert train.metainfo["classes"] == original.classes
    assert tuple(train[0]["inputs"].shape) == (3, 32, 32)

    # By another route: walk through the original in order and keep while the class has room.
    room = list(expected)
    walked = []
    for index, label in enumerate(original.targets):
        if room[label] > 0:
            room[label] -= 1
            walked.append(index)
    np.testing.assert_array_equal(train.images, original.data[walked])
    assert train.labels.tolist() == [original.targets[index] for index in walked]
    with np.load(out) as arrays:
        assert arrays["train_labels"].dtype == arrays["test_labels"].dtype == np.int64
        assert arrays["train_images"].dtype == arrays["test_images"].dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--imbalance", "0.5"], "expected an imbalance of at least 1, got 0.5"),
        (["--imbalance", "nan"], "expected an imbalance of at least 1, got nan"),
        (["--imbalance", "21"], "expected an imbalance from 1 to 20, the images per class, got 21"),
        (["--root", "nowhere", "--no-download"], "leave out --no-download"),
        (["--root", "nowhere"], "no network in tests"),
    ],
)
def test_refused_input_leaves_no_file(name, root, tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    assert script.main([name, "out.npz", "--root", str(root), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected")
    assert sentence in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.suffix in (".npz", ".tmp")] == []


@pytest.mark.parametrize("name", ["cifar10"], indirect=True)
@pytest.mark.parametrize(("out", "named"), [("out.txt",) * 2, ("folder.npz",) * 2, ("file/out.npz", "file")])
def test_unusable_output_is_refused(name, root, tmp_path, monkeypatch, capsys, out, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("not a folder")
    assert script.main([name, out, "--imbalance", "10", "--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert repr(named) in error
    assert error.count("\n") == 1
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("name", ["cifar10"], indirect=True)
def test_a_failed_write_leaves_the_old_file(name, root, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    out.write_bytes(b"old")

    def break_off(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", break_off)
    assert script.main([name, str(out), "--imbalance", "10", "--root", str(root)]) == 2
    assert out.read_bytes() == b"old"
    assert list(tmp_path.rglob("*.tmp")) == []


def test_unknown_dataset_ends_with_status_two(capsys):
    with pytest.raises(SystemExit) as raised:
        script.main(["mnist", "out.npz"])
    assert raised.value.code == 2
    assert "cifar100" in capsys.readouterr().err
