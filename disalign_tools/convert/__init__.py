"""Converts checkpoints of other code: ``python -m disalign_tools.convert``; docs/converting.md has the table."""

from .command import main

__all__ = ["main"]
