"""The one exception a user's input can cause."""

import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

_STDLIB = sysconfig.get_path("stdlib")
_OURS = str(Path(__file__).parent)  # and disalign_cls, disalign_d2 and so on beside it


class InputError(ValueError):
    """Bad input: one sentence that says what was expected, what came, and what to do.

    Commands turn it into exit status 2; everything else is a fault of ours and keeps its traceback.

    Examples:
        >>> disalign.load_class_counts([10, 2.5])
        Traceback (most recent call last):
            ...
        disalign.errors.InputError: expected counts that are whole numbers >= 0, got 2.5 at class 1
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if the message is empty."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


def in_user_code(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, passed through a module that is neither installed nor ours."""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            file = Path(frame.f_code.co_filename)
            installed = {"site-packages", "dist-packages"} & {*file.parts} or file.is_relative_to(_STDLIB)
            # A config that a framework executes is input, not a module, and has no name.
            if "__name__" in frame.f_globals and file.is_file() and not installed and not str(file).startswith(_OURS):
                return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def input_errors(expected: str, advice: str, errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn errors that input may cause into one sentence; errors of a user's own code keep their traceback.

    Raises:
        InputError: ``expected``, what the error says, and the ``advice``.
    """
    try:
        yield
    except InputError:
        raise
    except errors as error:
        if in_user_code(error):
            raise
        reason = " ".join(first_line(error).split())
        raise InputError(f"{expected}, but: {reason}; {advice}") from error


def some(items: Iterable[object], limit: int = 5) -> str:
    """The first few of many, for a sentence: ``"a, b, c and 12 more"``."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:limit])
    return shown if len(texts) <= limit else f"{shown} and {len(texts) - limit} more"
