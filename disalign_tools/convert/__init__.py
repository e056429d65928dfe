"""Converts checkpoints of other code: ``python -m disalign_tools.convert``; docs/converting.md has the table.

Whatever can't be converted is refused by :class:`disalign.InputError`, before anything is written.
"""

from .command import main

__all__ = ["main"]
