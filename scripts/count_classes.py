#!/usr/bin/env python
"""The same as python -m disalign_tools.count_classes."""

import sys

from disalign_tools.count_classes import main

if __name__ == "__main__":
    sys.exit(main())
