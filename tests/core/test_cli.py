"""What every command does with bad input, with Ctrl-C and with a fault of somebody's own."""

import pytest

from disalign import InputError
from disalign.cli import command


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


def test_the_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("DISALIGN_TRACEBACK", "1")
    with pytest.raises(InputError, match="expected a file, got none"):
        main(InputError("expected a file, got none"))


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())
