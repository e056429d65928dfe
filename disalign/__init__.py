"""DisAlign (CVPR 2021): a short second stage that mends the decision boundary of a long-tailed recogniser."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported at first use: `python -m disalign.doctor` must start where torch does not.
    if not name.startswith("__") or name == "__all__":
        api = import_module(".api", __name__)
        globals().update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__getattr__("__all__")})
