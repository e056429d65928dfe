#!/usr/bin/env python
"""The same as python -m disalign_tools.convert."""

import sys

from disalign_tools.convert import main

if __name__ == "__main__":
    sys.exit(main())
