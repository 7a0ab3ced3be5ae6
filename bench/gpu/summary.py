"""The end of a run, for people: what is wrong first, then shares of the floor, then ratios, within what a terminal's tail keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from bench.gpu.journal import Figures, short

LONGEST = 11500  # characters
_TOLD = 30  # lines of what is wrong: more of them say the same


def summary(rows: Sequence[Figures]) -> str:
    """Sections, most important first; lines that do not fit are left out, and said to be."""
    of = {stage: [row for row in rows if row["stage"] == stage] for stage in dict.fromkeys(row["stage"] for row in rows)}
    sections = [
        _wrong(rows),
        _start(of.get("start", []) + of.get("warm", [])),
        _table("Kernels: the floor, and torch.mm's time for as many operations, as shares of the time", _kernels(of.get("kernels", []))),
        _table("Whole steps, times faster than Inductor at that length", _ratios(of.get("training", []), "step_ms", "Inductor")),
        _table("Layers, forward and backward, times faster than the first form", _ratios(of.get("layers", []), "both_ms", None)),
        _table("Products of list entries", _pick(of.get("layers", []), "tflops", ("forward_ms", "tflops"))),
        _table("Tiles", _pick(of.get("tuning", []), "tuned", ("tuned", "best", "ms", "default_ms"))),
        _table("FlexAttention on the same lists", _pick(of.get("flex", []), "forward_ms", ("forward_ms", "both_ms"))),
    ]
    text, left = "", 0
    for line in ("=" * 20 + " summary", *(line for section in sections for line in section.splitlines())):
        if len(text) + len(line) < LONGEST:
            text += line + "\n"
        else:
            left += 1
    return text + (f"{left} lines left out; the file has all\n" if left else "")


def _wrong(rows: Sequence[Figures]) -> str:
    """Wrong tensors and cases that did not end well, a line each; first of all how many were looked at."""
    ends = [row for row in rows if "status" in row]
    compared = sum(row.get("tensors", 0) for row in rows)
    bad = [_line("WRONG", row, "; ".join(row["wrong"])) for row in rows if row.get("wrong")]
    ill = [_line(row["status"].upper(), row, str(row.get("error"))) for row in ends if row["status"] != "ok"]
    ill.sort(key=lambda line: line.startswith("  NOT RUN"))
    told = [*bad, *ill]
    if len(told) > _TOLD:
        told[_TOLD:] = [f"  and {len(told) - _TOLD} lines more"]
    head = f"{compared} tensors compared, {len(bad)} rows with wrong ones; {len(ends)} cases ended, {len(ill)} of them not well"
    return "\n".join([head, *told])


def _line(what: str, row: Figures, why: str) -> str:
    return f"  {what} {row['stage']}: {row['case']}: {' '.join(why.split())[:200]}"


def _start(rows: Iterable[Figures]) -> str:
    hidden = {"run", "stage", "case", "at", "status", "seconds", "error", "trace", "target", "wrong"}
    shown = [f"{key} {short(value)}" for row in rows for key, value in row.items() if key not in hidden and value is not None]
    return "\n" + ", ".join(shown)


def _kernels(rows: Iterable[Figures]) -> list[Figures]:
    found = []
    for row in rows:
        if "kernel" in row:
            rest = f"{row['kernels_ms']:.3g} in {row['launches']} kernels" if "kernels_ms" in row else None
            keys = ("case", "kernel", "ms", "floor_share", "mm_share")
            found.append({**{key: row.get(key) for key in keys}, "host ms, or programs": row.get("programs", rest)})
    return found


def _ratios(rows: Sequence[Figures], figure: str, base: str | None) -> list[Figures]:
    """Rows that have the figure, with its ratio to that of the base form, of the group that the case's name begins with."""
    found: list[Figures] = []
    bases: dict[str, float] = {}
    more = {row["case"]: row for row in rows if "rewritten" in row or "first_step_seconds" in row}
    for row in rows:
        if figure not in row:
            continue
        group, _, form = row["case"].partition(": ")
        if base in (None, form):
            bases.setdefault(group, row[figure])
        ratio = bases[group] / row[figure] if group in bases else None
        extra = {key: more.get(row["case"], {}).get(key) for key in ("rewritten", "first_step_seconds") if more}
        found.append({"case": row["case"], "ms": row[figure], "faster": ratio, "host ms": row["host_ms"], "MiB": row["peak_mib"], **extra})
    return found


def _pick(rows: Iterable[Figures], having: str, keys: Sequence[str]) -> list[Figures]:
    return [{"case": row["case"], **{key: row.get(key) for key in keys}} for row in rows if having in row]


def _table(title: str, rows: Sequence[Figures]) -> str:
    if not rows:
        return ""
    cells = [{key: short(value) if value is not None else "" for key, value in row.items()} for row in rows]
    return f"\n{title}\n" + tabulate(cells, headers="keys", tablefmt="plain")
