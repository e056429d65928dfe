"""Missing data of a config: python -m disalign_d2.check CONFIG [KEY VALUE ...]

The same as python -m disalign_d2.train_net --config-file CONFIG --data-check [KEY VALUE ...].
"""

import argparse
import sys
from collections.abc import Sequence

from . import train_net


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config", help="a config file, or the name of a shipped one below configs/")
    arguments.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="settings, over the config's")
    args = arguments.parse_args(argv)
    return train_net.main(["--config-file", args.config, "--data-check", *args.opts])


if __name__ == "__main__":
    sys.exit(main())
