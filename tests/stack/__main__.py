"""What works with what, from what cells wrote (`pytest --stack-results RESULTS`, `make test-stack`).

`python -m tests.stack table RESULTS > PAGE` makes the page of a whole run. With `docs/stack.md` after RESULTS, rows of cells that RESULTS
does not have are kept as that page has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.stack.table import page


def main() -> None:
    if len(sys.argv) not in (3, 4) or sys.argv[1] != "table":
        raise SystemExit("usage: python -m tests.stack table RESULTS [PAGE]")
    print(page(sys.argv[2], "".join(Path(path).read_text() for path in sys.argv[3:])), end="")


if __name__ == "__main__":
    main()
