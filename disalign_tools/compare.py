"""Related methods on the same scores, for any framework: disalign compare CONFIG --stage-one FILE [FILE ...]

CONFIG is the config of a stage two, for classification, Detectron2 or MMSegmentation; `disalign compare CONFIG --help`
has the options of its framework, which are those of python -m disalign_cls.compare, disalign_d2.compare and
disalign_mmseg.compare.
"""

import sys
from collections.abc import Sequence

from .fit import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    return dispatch("compare", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
