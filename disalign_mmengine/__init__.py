"""Code for the packages on MMEngine's Runner; importing it registers the Runner, hooks and optimizer constructor."""

from . import hooks, optim, runner  # noqa: F401
