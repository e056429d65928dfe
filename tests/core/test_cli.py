"""What every command does with bad input, with Ctrl-C and with a fault of somebody's own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import disalign
from disalign import InputError
from disalign.cli import as_typed, command, compare_place, features_of, find_config, shipped_configs, usable_cpus


@command
def main(outcome):
    if outcome is not None:
        raise outcome


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (InputError("expected a file, got none"), 2, "error: expected a file, got none\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_exit_status(outcome, status, said, capsys):
    assert main(outcome) == status
    assert capsys.readouterr() == ("", said)


class Refusing(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("expected an image, got none")


def test_a_sentence_from_a_data_loaders_worker_comes_without_the_workers_traceback(capsys):
    @command
    def read(_):
        list(torch.utils.data.DataLoader(Refusing(), num_workers=1))

    assert read(None) == 2
    assert capsys.readouterr().err == "error: expected an image, got none\n"


def test_a_command_keeps_its_name_and_its_default():
    @command
    def train(argv=None):
        """Trains."""
        assert argv is None

    assert (train.__name__, train.__doc__) == ("train", "Trains.")
    assert train() == 0


def test_a_config_is_a_file_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = next(path for path in sorted(shipped_configs().rglob("*.py")))
    name = str(shipped.relative_to(shipped_configs()))
    assert find_config(name) == str(shipped)
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config(name) == name  # one's own comes first
    for wrong in ("", "no/such.py", str(tmp_path)):
        with pytest.raises(InputError, match=f"expected a config file, or the name of a shipped one in .*{wrong!r}$"):
            find_config(wrong)


def test_a_comparison_never_replaces_a_stage_one(tmp_path):
    one = tmp_path / "one.pth"
    one.touch()
    assert compare_place(tmp_path, [1.0], [str(one)], force=False) == tmp_path / "comparison.json"
    (tmp_path / "link.pth").symlink_to(one)
    with pytest.raises(InputError, match="expected every stage one once"):
        compare_place(tmp_path, [1.0], [str(one), str(tmp_path / "link.pth")], force=False)
    (tmp_path / "comparison.json").touch()
    with pytest.raises(InputError, match="which is read; name another"):
        compare_place(tmp_path, [1.0], [str(tmp_path / "comparison.json")], force=True)


def test_the_command_as_typed_is_a_line_for_a_shell(tmp_path):
    run = f"""
import sys
sys.path.insert(0, {str(Path(disalign.__file__).parent.parent)!r})
from disalign.cli import as_typed

def run(): ...

if __name__ == "__main__":
    print(as_typed(run, None))
    print(as_typed(run, ["other words"]))
"""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "compare.py").write_text(run)
    typed = ["-m", "package.compare", "a b.py", "--opts", "A", "('x',)"]
    done = subprocess.run([sys.executable, *typed], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert shlex.split(first) == ["python", *typed]
    assert second == "python -m package.compare 'other words'"
    assert as_typed(compare_place, []) == "python -m disalign.cli"


def test_several_stage_ones_keep_their_features_apart():
    assert features_of("kept", 0, many=False) == Path("kept")
    assert [features_of("kept", number, many=True) for number in (0, 1)] == [
        Path("kept", "stage_one_0"),
        Path("kept", "stage_one_1"),
    ]
    assert features_of(None, 1, many=True) is None


def test_the_usable_cpus_are_those_of_this_process():
    assert usable_cpus() == len(os.sched_getaffinity(0)) <= os.cpu_count()


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())
