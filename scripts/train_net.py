#!/usr/bin/env python
"""The same as python -m disalign_d2.train_net, where Detectron2's users look for it."""

import sys

from disalign_d2.train_net import main

if __name__ == "__main__":
    sys.exit(main())
