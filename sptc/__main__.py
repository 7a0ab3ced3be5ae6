"""`python -m sptc` is the `sptc` command, where that is not on the path."""

from __future__ import annotations

import sys

from sptc.cli import main

if __name__ == "__main__":
    sys.exit(main())
