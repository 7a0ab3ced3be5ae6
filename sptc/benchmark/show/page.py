"""A benchmark as one HTML page that needs no other file and no script."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from sptc.benchmark.outcome import Bench
from sptc.benchmark.show.table import COSTS, TIMES, costs, times

KINDS = {"attention": "#4e79a7", "products": "#f28e2b", "choosing": "#e15759", "rest": "#bab0ac"}
"""Kinds of operators and their colours, here and in plots."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dense: #8a8f98; --sparse: #2f855a; --exact: #4e79a7; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
.headline { font-size: 1.1rem; font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .8rem; align-items: center; }
.track { background: var(--line); height: 1.2rem; border-radius: 3px; overflow: hidden; display: flex; }
.track i { display: block; height: 100%; }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } .failed { color: #c53030; }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
.small { font-size: .85rem; opacity: .8; } code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def page(bench: Bench) -> str:
    return "\n".join(_page(bench, bench.to_dict())) + "\n"


def _page(whole: Bench, bench: Mapping[str, Any]) -> Iterator[str]:
    """`bench`: the same as data."""
    settings = bench["settings"]
    model = _text(settings["model"] or "a module")
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    yield f"<title>sptc bench {model}</title>"
    yield f"<style>{_STYLE}</style></head><body>"
    yield f"<h1>Training steps of {model}</h1>"
    for case in bench["cases"]:
        yield f'<p class="headline">{_text(case["headline"])}</p>'
    adapters = f"LoRA {settings['lora']}" if settings["lora"] else "the model as it is"
    parts = [adapters, settings["dtype"] or "the model's dtypes", f"{settings['counted']:.0%} of the tokens count"]
    yield f"<p>{_text(', '.join([*parts, *['checkpointing'] * settings['checkpointing']]))}; forward, loss, backward and AdamW.</p>"
    for one, case in zip(whole.cases, bench["cases"], strict=True):
        yield from _case(case)
        yield "<h3>All figures</h3>"
        for rows, headers in ((times(one), TIMES), (costs(one), COSTS)):
            yield f'<div class="scroll">{tabulate(rows, headers, tablefmt="html", disable_numparse=True)}</div>'
        yield from (f'<p class="failed">{_text(v["name"])} failed: {_text(v["failed"])}</p>' for v in case["variants"] if v["failed"])
        yield from (f'<p class="small">{_text(note)}</p>' for note in case["notes"])
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    yield "<h2>Where and how</h2>"
    yield f"<p>{_text(bench['device'])}, {bench['threads']} threads of {bench['processors']} processors, {_text(bench['system'])}<br>"
    yield f"Python {_text(bench['python'])}, {_text(versions)}, commit {_text(bench['commit'] or 'unknown')}<br>{_text(bench['time'])}</p>"
    yield f"<p><code>{_text(bench['command'])}</code></p>"
    yield "</body></html>"


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    length = f"{case['batch']} x {case['length']} tokens" if case["length"] is not None else "Its batch"
    yield f"<h2>{length}</h2>"
    timed = [v for v in case["variants"] if v.get("wall_seconds") and v["failed"] is None]
    if timed:
        yield "<h3>Milliseconds a step: median, and quartiles</h3>"
        yield from _bars(timed, lambda v: v["wall_seconds"]["median"] * 1e3, _milliseconds)
        yield _key({"dense": "var(--dense)", "spt, nothing left out": "var(--exact)", "spt, sparse": "var(--sparse)"})
    weighed = [v for v in timed if v["memory_mib"]["step"] is not None]
    if weighed:
        yield "<h3>MiB that a step takes, beyond what rests</h3>"
        yield from _bars(weighed, lambda v: v["memory_mib"]["step"], lambda v: f"{v['memory_mib']['step']:.0f}")
    profiled = [v for v in timed if v["kinds"]]
    if profiled:
        yield "<h3>Which operators take the step</h3>"
        yield from _shares(profiled)


def _bars(variants: list[Mapping[str, Any]], size: Any, figure: Any) -> Iterator[str]:
    most = max(max(size(v) for v in variants), 1e-9)
    yield '<div class="bars">'
    for v in variants:
        color = "dense" if v["backend"] != "spt" else "exact" if v["exact"] else "sparse"
        width = 100 * max(size(v), 0.0) / most
        yield f"<div>{_text(v['name'])}</div>"
        yield f'<div class="track"><i style="width:{width:.1f}%;background:var(--{color})"></i></div>'
        yield f'<div class="figure">{_text(figure(v))}</div>'
    yield "</div>"


def _milliseconds(variant: Mapping[str, Any]) -> str:
    wall = variant["wall_seconds"]
    return f"{wall['median'] * 1e3:.1f} ({wall['low'] * 1e3:.1f} to {wall['high'] * 1e3:.1f})"


def _shares(variants: list[Mapping[str, Any]]) -> Iterator[str]:
    """A bar for each variant, as long as its step, cut by kinds of operators."""
    most = max(v["wall_seconds"]["median"] for v in variants)
    yield '<div class="bars">'
    for v in variants:
        seconds = v["wall_seconds"]["median"]
        parts = "".join(
            f'<i style="width:{100 * share * seconds / most:.1f}%;background:{KINDS[kind]}" title="{kind} {share:.0%}"></i>'
            for kind, share in v["kinds"].items()
        )
        figures = ", ".join(f"{kind} {share:.0%}" for kind, share in v["kinds"].items() if share >= 0.005)
        yield f'<div>{_text(v["name"])}</div><div class="track">{parts}</div><div class="figure small">{figures}</div>'
    yield "</div>"
    yield _key(KINDS)


def _key(colors: Mapping[str, str]) -> str:
    marks = "".join(f'<span><i style="background:{color}"></i>{name}</span>' for name, color in colors.items())
    return f'<p class="key small">{marks}</p>'


def _text(text: Any) -> str:
    return html.escape(str(text))
