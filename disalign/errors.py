"""The one exception a user's input can cause."""


class InputError(ValueError):
    """Bad input: one sentence that says what was expected, what came, and what to do.

    Commands turn it into exit status 2; everything else is a fault of ours and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """What an error says, for a sentence: its first line, or its name if it says nothing."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


def some(items, limit=5):
    """The first few of many, for a sentence: ``"a, b, c and 12 more"``."""
    items = [str(item) for item in items]
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
