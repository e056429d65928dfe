"""Evaluate a checkpoint: python -m disalign_cls.test CONFIG CHECKPOINT

A stage-two checkpoint prints stage one's figures beside its own. Everything, per class, goes to results_SPLIT.json in
the work folder.
"""

import sys

from disalign_mmengine.cli import command_to_test

from .cli import without_pretrained

main = command_to_test(__doc__, without_pretrained)

if __name__ == "__main__":
    sys.exit(main())
