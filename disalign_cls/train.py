"""Train stage one or stage two: python -m disalign_cls.train CONFIG

Stage two starts from the config's stage_one (--cfg-options stage_one=FILE), trains 2K + d + 1 numbers, and prints
stage one's figures beside its own.
"""

import sys

from disalign_mmengine.cli import command_to_train

from .cli import without_pretrained

main = command_to_train(__doc__, without_pretrained)

if __name__ == "__main__":
    sys.exit(main())
