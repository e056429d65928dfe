"""What the packages on MMEngine's Runner share; importing it registers the Runner, hooks and optimizer constructor."""

from . import hooks, optim, runner  # noqa: F401
