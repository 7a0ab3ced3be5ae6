"""How fast steps were, release by release: `python -m bench.history add FILE...`, then `python -m bench.history`.

`add` takes what `sptc bench --json` or `python -m bench.step --json` wrote and appends a line for each sparse variant to
bench/history.jsonl. Without it the newest line of each case stands beside the one before; the exit status is 1 if one is slower by more
than the spread of both. Ratios to the best dense variant are compared, so that another load or clock of the same machine is no change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

FILE = Path(__file__).parent / "history.jsonl"
_CASE = ("device", "threads", "model", "dtype", "counted", "tokens", "variant")
_SLACK = 0.03  # a change as small as this is none, whatever the spread


def lines(measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line for each sparse variant that was timed, of one benchmark or of several by name."""
    if "cases" not in measured:
        for one in measured.values():
            yield from lines(one)
        return
    settings = measured["settings"]
    for case in measured["cases"]:
        for v in case["variants"]:
            if v["failed"] is None and not v["exact"] and "faster" in v:
                yield {
                    "time": measured["time"],
                    "commit": measured["commit"],
                    "torch": measured["versions"]["torch"],
                    "device": measured["device"],
                    "threads": measured["threads"],
                    "model": settings["model"],
                    "dtype": settings["dtype"],
                    "counted": settings["counted"],
                    "tokens": f"{case['batch']} x {case['length']}",
                    "variant": v["name"],
                    "best_dense": case["baseline"],
                    **{key: round(v["faster"]["wall"][key], 4) for key in ("median", "low", "high")},
                }


def compare(history: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, ...]], bool]:
    """(a row for each case, whether one became slower): the newest line of a case beside the one before it."""
    by_case: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in history:
        by_case.setdefault(tuple(line[key] for key in _CASE), []).append(line)
    rows, slower = [], False
    for case, found in by_case.items():
        *earlier, last = found
        words = [*map(str, case[2:]), f"{last['median']:.2f}x", str(last["commit"])]
        if earlier:
            before = earlier[-1]
            worse = last["high"] < before["low"] and last["median"] < (1 - _SLACK) * before["median"]
            slower = slower or worse
            words += [f"{before['median']:.2f}x", str(before["commit"]), "SLOWER" if worse else ""]
        else:
            words += ["", "", ""]
        rows.append(tuple(words))
    return rows, slower


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.history", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("add", help="append what files hold").add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "add":
        added = [line for path in arguments.files for line in lines(json.loads(path.read_text()))]
        with FILE.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in added)
        print(f"{len(added)} lines added to {FILE}")
        return 0
    history = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    rows, slower = compare(history)
    print(tabulate(rows, (*_CASE[2:], "now", "commit", "before", "commit", ""), disable_numparse=True))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
