"""Missing data of a config, for any framework: disalign check CONFIG

`disalign check CONFIG --help` has the options of the config's framework, which are those of python -m
disalign_cls.check, disalign_d2.check and disalign_mmseg.check.
"""

import sys
from collections.abc import Sequence

from .fit import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    return dispatch("check", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
