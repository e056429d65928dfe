"""What the packages on MMEngine's Runner share; importing it registers the hooks and the optimizer constructor."""

from . import hooks, optim  # noqa: F401
