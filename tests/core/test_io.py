"""Files that can't run code, and files that are whole or not there."""

import collections
import errno
import json
import os
import pickle
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import disalign
from disalign import InputError, load_file
from disalign.io import (
    atomic_file,
    locked_folder,
    locks,
    missing_files,
    read_json,
    require_folder,
    require_place,
    write_json,
)
from disalign.io.files import TEMPORARY

from .malicious import Malicious

ARRAYS = {
    "model": collections.OrderedDict(
        weight=np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        transposed=np.arange(6.0).reshape(2, 3).T,
        steps=np.array(7),
        half=np.ones((1, 3), np.float16),
        mask=np.array([True, False]),
    ),
    "lr": np.float32(0.5),
    "epoch": np.int64(3),
    "matching_heuristics": True,
    "__author__": "somebody",
}


def save(path, value, kind):
    if kind == "torch zip":
        torch.save(value, path)
    elif kind == "torch legacy":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(value, protocol=int(kind[-1])))


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy"])
def test_torch_files_are_read(tmp_path, kind):
    save(tmp_path / "a.pth", {"state_dict": {"w": torch.arange(3.0)}, "epoch": 3}, kind)
    found = load_file(tmp_path / "a.pth")
    assert found["epoch"] == 3
    assert torch.equal(found["state_dict"]["w"], torch.arange(3.0))


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy"])
def test_a_torch_file_called_pkl_is_read_as_what_it_is(tmp_path, kind):
    save(tmp_path / "a.pkl", {"w": torch.arange(3.0)}, kind)
    assert torch.equal(load_file(tmp_path / "a.pkl")["w"], torch.arange(3.0))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_arrays_are_read_as_tensors(tmp_path, protocol):
    save(tmp_path / "a.pkl", ARRAYS, f"protocol {protocol}")
    found = load_file(str(tmp_path / "a.pkl"))
    assert set(found["model"]) == set(ARRAYS["model"])
    for name, array in ARRAYS["model"].items():
        tensor = found["model"][name]
        assert isinstance(tensor, torch.Tensor)
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert (found["lr"], found["epoch"], found["__author__"]) == (0.5, 3, "somebody")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_empty_array_is_read(tmp_path, protocol):
    save(tmp_path / "a.pkl", {"w": np.zeros((0, 3))}, f"protocol {protocol}")
    assert load_file(tmp_path / "a.pkl")["w"].shape == (0, 3)


def test_arrays_pickled_by_an_older_numpy_are_read(tmp_path):
    # numpy 2 renamed numpy.core; the files of Detectron2's zoo were written before.
    old = pickle.dumps(ARRAYS, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in old
    (tmp_path / "a.pkl").write_bytes(old)
    np.testing.assert_array_equal(load_file(tmp_path / "a.pkl")["model"]["weight"].numpy(), ARRAYS["model"]["weight"])


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=rf"expected a checkpoint at '.*{name}', but there is no such file"):
        load_file(tmp_path / name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a checkpoint at"):
        load_file(tmp_path)


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy", "protocol 2", "protocol 5"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, kind):
    path = tmp_path / ("a.pkl" if kind.startswith("protocol") else "a.pth")
    save(path, ARRAYS if path.suffix == ".pkl" else {"w": torch.arange(3.0)}, kind)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="expected"):
            load_file(path)


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
@pytest.mark.parametrize("content", [b"not a checkpoint", b"<html>404</html>", b"PK\x03\x04 broken", b"\x80\x04"])
def test_what_is_no_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="expected"):
        load_file(tmp_path / name)


class Attack:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


KINDS = ["torch zip", "torch legacy", "protocol 2", "protocol 4"]


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_file_is_refused_and_not_run(tmp_path, name, kind):
    mark = tmp_path / "mark"
    save(tmp_path / name, {"w": torch.ones(1) if kind.startswith("torch") else 1, "x": Attack(str(mark))}, kind)
    with pytest.raises(InputError, match="re-save it with"):
        load_file(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_names_what_it_found_and_never_advises_to_load_unsafely(tmp_path, kind):
    name = "a.pth" if kind.startswith("torch") else "a.pkl"
    save(tmp_path / name, {"x": Attack(str(tmp_path / "mark"))}, kind)
    with pytest.raises(InputError, match=r"holds.* (posix|nt)\.mkdir") as refusal:
        load_file(tmp_path / name)
    assert "weights_only" not in str(refusal.value)


def test_torchs_word_on_a_pickles_protocol_is_not_passed_on_and_no_other_warning_is_lost(tmp_path, monkeypatch):
    save(tmp_path / "a.pth", {"w": np.ones(1)}, "protocol 4")
    torch.save({"w": torch.ones(1)}, tmp_path / "b.pth", pickle_protocol=3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match="re-save it with"):
            load_file(tmp_path / "a.pth")
        assert torch.equal(load_file(tmp_path / "b.pth")["w"], torch.ones(1))
        assert told == []
        monkeypatch.setattr(torch, "load", lambda *_, **__: warnings.warn("another", UserWarning, stacklevel=1))
        load_file(tmp_path / "b.pth")
    assert [str(one.message) for one in told] == ["another"]


def test_the_attack_works_on_an_unsafe_loader(tmp_path):
    # Otherwise the test above could not fail.
    pickle.loads(pickle.dumps(Attack(str(tmp_path / "mark"))))
    assert (tmp_path / "mark").exists()


def test_code_within_an_array_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    save(tmp_path / "a.pkl", {"w": np.array([Attack(str(mark))], dtype=object)}, "protocol 2")
    with pytest.raises(InputError, match="re-save it with"):
        load_file(tmp_path / "a.pkl")
    assert not mark.exists()


@pytest.mark.parametrize("array", [np.array([{}], dtype=object), np.array(["text"])], ids=["objects", "words"])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    save(tmp_path / "a.pkl", {"w": array}, "protocol 2")
    with pytest.raises(InputError, match="expected"):
        load_file(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "function", ["builtins eval", "numpy load", "numpy fromfile", "numpy.core.multiarray frombuffer"]
)
def test_no_other_function_of_numpy_can_be_reached(tmp_path, function):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02c%b\n%b\n(S'1'\ntR." % tuple(function.encode().split()))
    with pytest.raises(InputError, match="it holds a"):
        load_file(tmp_path / "a.pkl")


FORGED = """
import pickle, sys
import numpy as np
from disalign import InputError, load_file

class Forged:
    def __reduce__(self):
        return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 63)

class Array:
    def __reduce__(self):
        function, arguments, (version, shape, _, order, data) = np.ones(3, np.float32).__reduce__()
        return function, arguments, (version, shape, Forged(), order, data)

with open(sys.argv[1], "wb") as file:
    pickle.dump({"w": Array()}, file, protocol=2)
try:
    load_file(sys.argv[1])
except InputError:
    pass
"""


def test_a_forged_dtype_cannot_crash_the_interpreter(tmp_path):
    # Flags that call the numbers objects make numpy follow them as pointers.
    environment = os.environ | {"PYTHONPATH": str(Path(disalign.__file__).parents[1])}
    command = [sys.executable, "-c", FORGED, str(tmp_path / "a.pkl")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Internal error" not in result.stderr


# ------------------------------------------------------------------------------------------------- whole or not


def test_values_that_many_share_take_no_time(tmp_path):
    # 20 times "a pair of the last": 42 bytes that stand for 2 ** 20 values, and a few more for beyond all memory
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04N" + 20 * b"2\x86" + b".")
    value = load_file(tmp_path / "a.pkl")
    for _ in range(20):
        assert value[0] is value[1]
        value = value[0]
    assert value is None


def test_a_pickle_cannot_alter_what_reads_it(tmp_path):
    # BUILD with a slot state would set an attribute of the function for all files after this one.
    attack = b"\x80\x02cnumpy.core.multiarray\nscalar\nN}U\x0c__defaults__K\x07\x85s\x86b."
    (tmp_path / "a.pkl").write_bytes(attack)
    with pytest.raises(InputError, match="but it alters what it is read with"):
        load_file(tmp_path / "a.pkl")


def test_write_json_writes_what_json_reads(tmp_path):
    write_json(tmp_path / "new" / "result.json", {"few": None, "many": 0.5})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"few": None, "many": 0.5}
    assert os.listdir(tmp_path / "new") == ["result.json"]


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_json_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, value, error):
    (tmp_path / "result.json").write_text("old")
    with pytest.raises(error):
        write_json(tmp_path / "result.json", {"a": value})
    assert os.listdir(tmp_path) == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")

    def write():
        with atomic_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert os.listdir(tmp_path) == ["result.bin"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "write", [lambda file: file.write(bytes(10**6)), lambda file: torch.save(torch.rand(10**6), file)]
)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")

    def fill():
        with atomic_file(path) as file:
            write(file)

    # A limit on the size of files is as near to a full disk as a test gets.
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"^expected a place to write '.*result\.bin', but: File too large; "):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["result.bin"]
    assert path.read_bytes() == b"old"


def test_a_place_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(InputError, match=r"^expected a place to write '.*result\.json', but: File exists; "):
        write_json(tmp_path / "file" / "result.json", {})
    with pytest.raises(InputError, match=r"^expected a place to write '.*', but: Is a directory; "):
        write_json(tmp_path, {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_is_as_private_as_any_new_one(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "result.json", {})
        assert (tmp_path / "result.json").stat().st_mode & 0o777 == mode
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_file_appears_only_once_it_is_whole(tmp_path):
    path = tmp_path / "result.bin"
    with atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(tmp_path) == ["result.bin"]


def test_a_file_is_synced_before_it_takes_its_place(tmp_path, monkeypatch):
    def noted(name, function):
        return lambda *arguments: (done.append(name), function(*arguments))

    done = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    write_json(tmp_path / "result.json", {})
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize(
    "array", [np.array([1, "a"], dtype=object), np.array(["text"]), np.zeros(2, dtype="datetime64[s]")]
)
def test_an_array_of_anything_but_numbers_is_refused(array, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"x": array}}, protocol=4))
    with pytest.raises(
        InputError, match=r"expected only tensors and plain values in '.*a\.pkl', but it holds an array of"
    ):
        load_file(tmp_path / "a.pkl")


@pytest.mark.parametrize("order", ["<", ">"])
def test_pickled_arrays_of_either_byte_order_are_read(tmp_path, order):
    array = np.linspace(0, 1, 5, dtype=np.float32)
    save(tmp_path / "a.pkl", {"w": array.astype(array.dtype.newbyteorder(order))}, "protocol 2")
    np.testing.assert_array_equal(load_file(tmp_path / "a.pkl")["w"].numpy(), array)


def test_text_is_encoded_as_numpy_does_and_no_other_way(tmp_path):
    call = b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00abcX\x05\x00\x00\x00%b\x86R."
    assert pickle.loads(call % b"UTF-8") == b"abc"
    (tmp_path / "a.pkl").write_bytes(call % b"rot13")
    with pytest.raises(InputError, match="text to encode as 'rot13'"):
        load_file(tmp_path / "a.pkl")


# --------------------------------------------------------------------------------- what training loops leave beside


class History:
    """A framework's record, known there only."""

    def __init__(self, values):
        self.values = values


def test_records_are_left_out_by_their_names_and_only_those(tmp_path):
    record = f"{History.__module__}.{History.__qualname__}"
    torch.save({"w": torch.arange(3.0), "log": History([1]), "best": np.float64(0.5)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"it also holds .*{re.escape(record)}"):
        load_file(tmp_path / "a.pth")
    with pytest.raises(InputError, match="it also holds"):
        load_file(tmp_path / "a.pth", left_out=["another.Record"])
    found = load_file(tmp_path / "a.pth", left_out=[record])
    assert torch.equal(found["w"], torch.arange(3.0))
    assert not isinstance(found["log"], History)
    with pytest.raises(InputError, match="it also holds"):  # the names are for one file, not for all after it
        load_file(tmp_path / "a.pth")


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])  # numpy 1 and 2
def test_records_of_each_numpy_are_left_out(tmp_path, core):
    save(tmp_path / "a.pth", {"w": torch.arange(3.0), "best": np.float64(0.5)}, "torch legacy")
    content, found = re.subn(rb"numpy\._?core", core, (tmp_path / "a.pth").read_bytes())
    assert found
    (tmp_path / "a.pth").write_bytes(content)
    assert torch.equal(load_file(tmp_path / "a.pth", left_out=["another.Record"])["w"], torch.arange(3.0))


def leave(mark):
    os.mkdir(mark)


class Leaves:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return leave, (self.mark,)


def test_nothing_runs_under_the_name_of_a_record(tmp_path):
    torch.save({"w": torch.ones(1), "x": Leaves(str(tmp_path / "mark"))}, tmp_path / "a.pth")
    found = load_file(tmp_path / "a.pth", left_out=[f"{leave.__module__}.{leave.__name__}"])
    assert torch.equal(found["w"], torch.ones(1))
    assert os.listdir(tmp_path) == ["a.pth"]
    torch.load(tmp_path / "a.pth", weights_only=False)  # or this test could not fail
    assert (tmp_path / "mark").exists()


# ------------------------------------------------------------------------------------------------ before the work


def test_missing_files_are_those_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for name in ("a.png", "there/b.png"):
        (tmp_path / name).touch()
    paths = ["a.png", "b.png", "there/b.png", "there/c.png", "gone/a.png", str(tmp_path / "a.png")]
    assert missing_files(paths) == ["b.png", "there/c.png", "gone/a.png"]


def test_json_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a.json", "annotations") == {"a": [1, None]}
    (tmp_path / "broken.json").write_text('{"a": ')
    for name, sentence in {
        "none.json": r"expected annotations at '.*none\.json', but there is no such file",
        "broken.json": r"expected annotations as JSON in '.*broken\.json', but: Expecting value",
        "": "expected annotations as JSON in .*, but: .*Is a directory",
    }.items():
        with pytest.raises(InputError, match=sentence):
            read_json(tmp_path / name, "annotations")


def test_a_folder_to_come_is_tried_and_nothing_is_left(tmp_path):
    require_folder(tmp_path / "new" / "run")
    require_place(tmp_path / "new" / "out.json", reads=[tmp_path / "other.json"])
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"expected a place to write '.*run', but: '.*file' is not a folder; free it"):
        require_folder(tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]


def test_a_result_replaces_neither_a_folder_nor_what_it_is_made_from(tmp_path):
    (tmp_path / "a.pth").touch()
    (tmp_path / "link.pth").symlink_to(tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"expected the name of a file as --to, got the folder '.*'; add a name"):
        require_place(tmp_path, option="--to")
    with pytest.raises(InputError, match=r"expected a file of its own as --out, got '.*link\.pth', which is read"):
        require_place(tmp_path / "link.pth", reads=[tmp_path / "a.pth"])


# ------------------------------------------------------------------------------------ what is no regular file


def write(path, content=b"new"):
    require_place(path)
    with atomic_file(path) as file:
        file.write(content)


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_link_to_nowhere_makes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)  # or a failure never ends
    reader.start()
    write(pipe)
    reader.join(10)
    assert got == [b"new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_to_and_stays(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.stat(os.devnull).st_rdev)
        device.write_bytes(b"")
    except PermissionError:
        pytest.skip("only root may make a device")
    write(device)
    assert stat.S_ISCHR(device.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "there"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=r"expected a new file as --out, but '.*there' exists; add --force"):
        require_place(path)
    require_place(path, force=True)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("end", ["done", "killed"])
def test_half_written_files_of_dead_processes_are_removed(end, tmp_path):
    """A living process's file stays, also while another writes beside it."""
    code = (
        "import sys\nfrom disalign.io import atomic_file\nwith atomic_file(sys.argv[1]) as file:\n"
        "    print(flush=True)\n    sys.stdin.read()\n    file.write(b'other')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        write(tmp_path / "a")
        (half,) = tmp_path.glob(f".*{TEMPORARY}")
        assert half.exists()
        if end == "killed":
            process.kill()
    assert half.exists() == (end == "killed")
    assert (tmp_path / "other").exists() == (end == "done")
    write(tmp_path / "b")
    assert not half.exists()


# ------------------------------------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_where_there_are_no_locks_every_folder_is_free(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    if number is None:  # Windows
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    with locked_folder(tmp_path, "out"):
        pass


def test_a_lock_on_a_file_that_its_last_holder_took_away_locks_nothing(tmp_path, monkeypatch):
    def late(file, inherited):
        os.unlink(file.name)
        return True

    monkeypatch.setattr(locks, "try_lock", late)
    with pytest.raises(InputError, match="but another run writes to"), locked_folder(tmp_path, "out"):
        pass


def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path):
    code = (
        "import os, sys\nfrom disalign.io import locked_folder\nwith locked_folder(sys.argv[1], 'out'):\n"
        "    os.fork() or sys.stdin.read()\n    os._exit(0)"  # the worker waits for the end of the input
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        process.wait()
        with locked_folder(tmp_path, "out"):
            pass


# -------------------------------------------------------------------------------------------- broken and huge files


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_flipped_bytes_are_found(size, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.rand(size), "bias": torch.rand(10)}, path)
    content = bytearray(path.read_bytes())
    place = content.index(torch.load(path)["weight"].numpy().tobytes()) + 500
    for offset in range(64):
        content[place + offset] ^= 1 << offset % 8
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"it can't be read \(Bad CRC-32 for file 'a/data/0'\)"):
        load_file(path)


def test_a_file_without_checksums_is_read(tmp_path):
    options = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(options)
    assert torch.equal(load_file(tmp_path / "a.pth")["weight"], torch.ones(3))


@pytest.mark.parametrize("name", ["a.pkl", "a.pth"])
def test_a_few_bytes_do_not_take_gigabytes(name, tmp_path):
    # None, put into place 500,000,000 of the records.
    (tmp_path / name).write_bytes(b"\x80\x02Nr" + (500_000_000).to_bytes(4, "little") + b".")
    code = (
        "import sys, resource, disalign\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: print(disalign.load_file(sys.argv[1]))\nexcept disalign.InputError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True)
    assert done.stdout.endswith("True\n"), (done.stdout, done.stderr)


def test_a_compressed_archive_is_refused_unread(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    with pytest.raises(InputError, match=r"it can't be read \(a/data.pkl is compressed; convert "):
        load_file(path)


@pytest.mark.parametrize("harmless", [True, False])
@pytest.mark.parametrize("protocol", [4, 5])
def test_another_protocol_is_one_sentence_and_runs_nothing(harmless, protocol, tmp_path):
    path, harm = tmp_path / "a.pth", tmp_path / "harm"
    torch.save({"a": torch.ones(1), "b": None if harmless else Malicious(str(harm))}, path, pickle_protocol=protocol)
    warnings.simplefilter("error")  # until the end of the test
    with pytest.raises(
        InputError, match=r"but (it also holds posix\.mkdir|torch's safe reader can't read it); re-save"
    ):
        load_file(path)
    assert not harm.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    read = load_file if name != "a.json" else lambda path: read_json(path, "counts")
    with pytest.raises(InputError, match=r"in a file, got '.*', a device or a pipe; save it to a file"):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" + "0" * 5000, "\0", "[1e400"])
def test_json_that_breaks_the_reader_is_one_sentence(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"^expected counts as JSON in '.*a\.json', but: .+$"):
        read_json(tmp_path / "a.json", "counts")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
@pytest.mark.parametrize("read", [load_file, lambda path: read_json(path, "counts")])
def test_a_path_that_can_be_none_is_one_sentence(read, path):
    with pytest.raises(InputError, match=r"^expected .*; |but: .+$"):
        read(path)


def test_a_new_file_that_another_process_takes_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    """Between its creation and its lock it is nobody's."""
    from disalign.io import files

    lock, taken = files.try_lock, []

    def late(file, *given):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        return lock(file, *given)

    monkeypatch.setattr(files, "try_lock", late)
    with files.atomic_file(tmp_path / "here", "w") as file:
        file.write("whole")
    assert taken
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here").read_text() == "whole"


def test_names_of_files_do_not_depend_on_where_they_lie(tmp_path, monkeypatch):
    from disalign.io import names_wherever

    paths = ["a/b/1.png", "a/2.png"]
    expected = [os.path.join("b", "1.png"), "2.png"]
    assert names_wherever([str(tmp_path / path) for path in paths]) == expected
    monkeypatch.chdir(tmp_path)
    assert names_wherever([paths[0], str(tmp_path / paths[1])]) == expected
    assert names_wherever([*paths, "s3://bucket/3.png"]) == [*expected, "s3://bucket/3.png"]
    assert names_wherever([paths[0]]) == ["1.png"]
    assert names_wherever([]) == []
