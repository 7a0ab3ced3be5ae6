"""`python -m tests.stack table RESULTS > docs/stack.md`: what works with what, from what `make test-stack` wrote."""

from __future__ import annotations

import sys

from tests.stack.table import page


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] != "table":
        raise SystemExit("usage: python -m tests.stack table RESULTS")
    print(page(sys.argv[2]), end="")


if __name__ == "__main__":
    main()
