"""A wrong config is one sentence; an error of a user's own code keeps its traceback, with file and line."""

import json
import sys
import traceback

import pytest
from torch import nn

import disalign
from disalign import InputError
from disalign.cli import config_errors
from disalign.errors import first_line, in_user_code, some

#: A registry as the frameworks have one: it calls what a config names, and may put its own words around an error.
#: The command is here too, since the tests themselves are neither installed nor ours.
FRAMEWORK = """
from disalign.cli import config_errors

def command(act, *args, errors=None, **options):
    with config_errors("one.py", *([errors] if errors else [])):
        act(*args, **options)

class Stock:
    def __init__(self, depth):
        if depth not in (18, 50):
            raise KeyError(f"invalid depth {depth}")

def build(kind, *args, wrapped=None, **options):
    try:
        return kind(*args, **options)
    except Exception as error:
        if wrapped == "explicitly":
            raise TypeError(f"{kind.__name__}: {error}") from error
        if wrapped == "implicitly":
            raise TypeError(f"{kind.__name__}: {error}")
        raise
"""

USERS = """
class Mine:
    def __init__(self, depth):
        self.layers = [depth]
        self.layers.appendd(depth)

class Over:
    def __init__(self, framework, **options):
        framework.Stock(**options)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A framework among the installed packages and a module of the user's, both imported from files."""
    for folder, name, source in (("lib/site-packages", "framework", FRAMEWORK), ("project", "users", USERS)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    import framework
    import users

    yield framework, users
    for name in ("framework", "users"):
        del sys.modules[name]


def sentence(command, *args, **options):
    """What the InputError says that an error within the command becomes."""
    with pytest.raises(InputError) as caught:
        command(*args, **options)
    assert isinstance(caught.value.__cause__, Exception)
    return str(caught.value)


def kept(kind, command, *args, **options):
    """The traceback of the error that comes out of the command as it was raised."""
    with pytest.raises(kind) as caught:
        command(*args, **options)
    assert not isinstance(caught.value, InputError)
    return "".join(traceback.format_exception(caught.value))


# ----------------------------------------------------------------------------------------------------- config_errors


@pytest.mark.parametrize("wrapped", [None, "explicitly", "implicitly"])
def test_a_wrong_value_in_a_config_is_one_sentence(modules, wrapped):
    framework, _ = modules
    said = sentence(framework.command, framework.build, framework.Stock, depth=20, wrapped=wrapped)
    reason = "Stock: 'invalid depth 20'" if wrapped else "invalid depth 20"
    assert said == f"expected a config that can be built in 'one.py', but: {reason}; correct it"


def test_a_key_that_a_framework_does_not_know_is_one_sentence(modules):
    framework, _ = modules
    said = sentence(framework.command, framework.build, framework.Stock, depht=18)
    assert "unexpected keyword argument 'depht'" in said
    assert "\n" not in said


def test_a_wrong_value_for_an_installed_package_is_one_sentence(modules):
    command = modules[0].command
    assert "in_channels must be divisible by groups" in sentence(command, nn.Conv2d, 3, 4, 1, groups=2)
    assert "Expecting value" in sentence(command, json.loads, "[1,")  # the standard library's


def test_a_wrong_value_for_our_own_modules_is_one_sentence(modules):
    wrong = {"class_counts": [2, 1], "learnt_margin": False}
    assert "learnt_margin" in sentence(modules[0].command, disalign.wrap_classifier, nn.Linear(2, 2), **wrong)


def test_an_error_in_a_users_file_keeps_its_traceback(modules):
    framework, users = modules
    text = kept(AttributeError, framework.command, framework.build, users.Mine, depth=18)
    assert f'File "{users.__file__}", line 5, in __init__\n    self.layers.appendd(depth)' in text


@pytest.mark.parametrize("wrapped", ["explicitly", "implicitly"])
def test_a_users_error_in_a_frameworks_words_keeps_its_traceback(modules, wrapped):
    framework, users = modules
    text = kept(TypeError, framework.command, framework.build, users.Mine, depth=18, wrapped=wrapped)
    assert f'File "{users.__file__}", line 5, in __init__\n    self.layers.appendd(depth)' in text
    assert "TypeError: Mine: 'list' object has no attribute 'appendd'" in text


def test_an_error_below_a_users_class_keeps_its_traceback(modules):
    framework, users = modules
    text = kept(KeyError, framework.command, framework.build, users.Over, framework, depth=20)
    assert f'File "{users.__file__}", line 9, in __init__\n    framework.Stock(**options)' in text


def test_an_error_while_a_users_module_is_imported_keeps_its_traceback(modules, tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("\nimport a_module_that_is_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = kept(ImportError, modules[0].command, __import__, "needs_another")
    assert f'File "{tmp_path / "needs_another.py"}", line 2, in <module>' in text


def test_a_users_module_that_is_absent_is_one_sentence(modules):
    # Nothing of the user's ran: the config names what is not there.
    assert "No module named 'absent_module'" in sentence(modules[0].command, __import__, "absent_module")


def test_an_error_in_a_config_itself_is_one_sentence(modules, tmp_path):
    # A config in Python is input: the frameworks execute it without a module's name.
    path = tmp_path / "config.py"
    path.write_text("depth = 18\nmodel = dict(depth=deth)\n")
    source = compile(path.read_text(), str(path), "exec")
    said = sentence(modules[0].command, exec, source, {}, errors=(NameError,))
    assert "name 'deth' is not defined" in said
    text = kept(NameError, modules[0].command, exec, source, {"__name__": "users_module"}, errors=(NameError,))
    assert f'File "{path}", line 2, in <module>' in text


def test_our_own_sentence_stays_as_it_is():
    with pytest.raises(InputError, match=r"^expected a file, got none$"), config_errors("one.py"):
        raise InputError("expected a file, got none")


@pytest.mark.parametrize("error", [ZeroDivisionError, OSError, RuntimeError, KeyboardInterrupt])
def test_other_errors_are_no_configs(error):
    with pytest.raises(error), config_errors("one.py"):
        raise error


def test_the_errors_are_an_argument(modules):
    framework, _ = modules
    kept(KeyError, framework.command, framework.build, framework.Stock, depth=20, errors=(ValueError,))


# ----------------------------------------------------------------------------------------------------- the sentences


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n one\ntwo"), "one"),
        (KeyError("name"), "name"),
        (KeyError(), "KeyError"),
        (AssertionError(), "AssertionError"),
        (ValueError("  "), "ValueError"),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
    ],
    ids=repr,
)
def test_the_first_line_of_an_error(error, said):
    assert first_line(error) == said


def test_the_first_few_of_many():
    assert some([]) == ""
    assert some(range(5)) == "0, 1, 2, 3, 4"
    assert some(range(6)) == "0, 1, 2, 3, 4 and 1 more"
    assert some("abc", 2) == "a, b and 1 more"


def test_an_error_that_was_never_raised_passed_through_nothing():
    assert not in_user_code(ValueError())
    assert not in_user_code(None)
