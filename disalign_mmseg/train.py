"""Train from a config without mim: python -m disalign_mmseg.train CONFIG --cfg-options stage_one=FILE

Stage two starts from stage one's checkpoint, trains 2K + d + 1 numbers, and prints both stages' figures side by
side.
"""

import sys

from disalign_mmengine.cli import command_to_train


def _adapt(config, args) -> None:
    config.setdefault("runner_type", "DisAlignSegRunner")  # stage one's own checkpoints are safe and whole too


main = command_to_train(__doc__, _adapt)

if __name__ == "__main__":
    sys.exit(main())
