"""One page of a sweep that needs nothing beside it: plots as inline SVG, readable on a phone.

What does not live here: the numbers (`measured.py`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from flagscale_serve.bench.measured import BOUNDS, Measured, percentile

if TYPE_CHECKING:
    from flagscale_serve.bench import Benched

__all__ = ["render_page"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 240, 56, 12, 14, 36
_MOST_REASONS = 5
_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
_RANKS = ("p50", "p90", "p99")
_TITLES = {
    "ttft": "Time to the first token",
    "tpot": "Time of a further token",
    "itl": "Gap between pieces",
    "e2e": "Whole request",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #667085; --line: #d0d5dd; --back: #ffffff;
  --a: #1f6feb; --b: #c2410c; --c: #15803d; --d: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b2; --line: #394150;
  --back: #12161d; --a: #6cb0ff; --b: #ff9d66; --c: #6fd38a; --d: #c99bff; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  max-width: 60rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
p, figcaption { color: var(--soft); margin: .25rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
pre { white-space: pre-wrap; font-size: .85rem; } dt { color: var(--soft); } dd { margin: 0 0 .5rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
"""


def render_page(done: Benched) -> str:
    """Render a sweep as one HTML document."""
    levels = sorted(done.levels, key=lambda one: one.workload.concurrency)
    at = [float(one.workload.concurrency) for one in levels]
    plots = [
        _figure("Output tokens per second", at, {"": [one.output_tokens_per_s for one in levels]}),
        _figure(
            "Requests per second",
            at,
            {
                "answered": [len(one.answered) / one.wall_s for one in levels],
                **({"within the SLO": [one.goodput(done.slo) for one in levels]} if done.slo else {}),
            },
        ),
    ]
    if all(one.times_s("e2e") for one in levels):
        plots.append(_trade(levels))
    for name in BOUNDS:
        if all(one.times_s(name) for one in levels):
            series = {
                f"p{rank}": [1e3 * percentile(one.times_s(name), rank) for one in levels]
                for rank in (50, 90, 99)
            }
            bound = 1e3 * done.slo[name] if name in done.slo else None
            plots.append(_figure(f"{_TITLES[name]} ({name.upper()}), ms", at, series, bound=bound))
    load, slo = levels[0].workload, ", ".join(f"{n} {1e3 * bound:g} ms" for n, bound in done.slo.items())
    best = done.best
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(done.model)} under load</title><style>{_STYLE}</style></head><body>
<h1>{escape(done.model)} under load</h1>
<p>{escape(done.url)}; random prompts of {load.prefix_len + load.input_len} tokens, answers of
{load.output_len}; load by {escape(levels[0].generator)}.
{escape(f"SLO: {slo}." if slo else "No SLO was given.")}</p>
<p>Best: {best.goodput(done.slo):.2f} requests/s{" within the SLO" if slo else ""} at
{best.workload.concurrency} at a time, {best.output_tokens_per_s:.0f} output tokens/s.</p>
<div class="plots">{"".join(plots)}</div>
<h2>Numbers</h2><div class="table">{_table(done)}</div>
{_failures(done)}{_subject(done)}
</body></html>
"""


def _table(done: Benched) -> str:
    heads = ["at a time", "answered", "failed", "tokens/s", "requests/s", "goodput/s"]
    heads += [f"{name.upper()} {rank} ms" for name in BOUNDS for rank in _RANKS]
    rows = []
    for level in done.levels:
        told = level.to_dict(done.slo)
        cells = [
            str(told["concurrency"]),
            str(told["answered"]),
            str(told["failed"]),
            f"{told['output_tokens_per_s']:.1f}",
            f"{told['requests_per_s']:.2f}",
            f"{told['goodput_requests_per_s']:.2f}",
        ]
        for name in BOUNDS:
            summary = told[f"{name}_ms"] or {}
            cells += [f"{summary[rank]:.2f}" if rank in summary else "-" for rank in _RANKS]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _failures(done: Benched) -> str:
    """List why requests failed; nothing where none did."""
    lines = []
    for level in done.levels:
        counted = Counter(one.error for one in level.requests if one.error)
        lines += [
            f"<li>{level.workload.concurrency} at a time: {count} x {escape(why[:300])}</li>"
            for why, count in counted.most_common(_MOST_REASONS)
        ]
    return f"<h2>Failed requests</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _subject(done: Benched) -> str:
    """Show what was loaded, and with what, so that it can be done again."""
    load, subject = done.levels[0].workload, done.subject
    versions = {"flagscale-serve": subject.get("flagscale_serve", ""), **subject.get("versions", {})}
    rows = {
        "When": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(done.at)),
        "Machine": str(subject.get("machine", "not known: only the address is")),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Load of each level": f"{load.num_requests} requests after {load.num_warmups} that are not counted, "
        f"seed {load.seed} and up",
    }
    told = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows.items())
    commands = "\n\n".join(
        f"{escape(name)}: {escape(words)}" for name, words in subject.get("commands", {}).items()
    )
    return f"<h2>What was measured</h2><dl>{told}</dl>{f'<pre>{commands}</pre>' if commands else ''}"


def _trade(levels: Sequence[Measured]) -> str:
    """Draw what more throughput costs in latency: one point for each level, marked with its concurrency."""
    rates = [one.output_tokens_per_s for one in levels]
    times = [1e3 * percentile(one.times_s("e2e"), 50) for one in levels]
    grid, x, y = _grid(max(rates), max(times))
    points = [(x(rate), y(value)) for rate, value in zip(rates, times, strict=True)]
    line = " ".join(f"{left:.1f},{up:.1f}" for left, up in points)
    parts = [*grid, f'<polyline points="{line}" fill="none" stroke="{_COLOURS[0]}" stroke-width="2"/>']
    for (left, up), level in zip(points, levels, strict=True):
        parts.append(f'<circle cx="{left:.1f}" cy="{up:.1f}" r="4" fill="{_COLOURS[0]}"/>')
        number = level.workload.concurrency
        parts.append(f'<text x="{left:.1f}" y="{up - 8:.1f}" text-anchor="middle">{number}</text>')
    parts.append(_across("output tokens per second"))
    return _svg("Latency over throughput: E2E p50, ms", parts, ["each point: requests at a time"])


def _grid(
    right: float, highest: float
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """Return the lines and numbers of both axes from zero, and where a value is on each."""
    across, up = _step(right or 1.0), _step(highest or 1.0)
    last, top = across * math.ceil((right or 1.0) / across), up * math.ceil((highest or 1.0) / up)

    def x(value: float) -> float:
        return _LEFT + value / last * (_WIDTH - _LEFT - _RIGHT)

    parts, y = _levels(top, up)
    steps = round(last / across)
    parts += [
        f'<text x="{x(number * across):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
        f'text-anchor="{"end" if number == steps else "middle"}">{number * across:g}</text>'
        for number in range(steps + 1)
    ]
    return parts, x, y


def _levels(top: float, step: float) -> tuple[list[str], Callable[[float], float]]:
    """Return the lines and numbers of the upright axis, and where a value is on it."""

    def y(value: float) -> float:
        return _TOP + (1 - value / top) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for number in range(round(top / step) + 1):
        here = y(number * step)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{here:.1f}" y2="{here:.1f}" '
            'stroke="var(--line)"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{here + 4:.1f}" text-anchor="end">{number * step:g}</text>')
    return parts, y


def _across(text: str) -> str:
    return f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{text}</text>'


def _svg(title: str, parts: Sequence[str], names: Sequence[str]) -> str:
    return (
        f'<figure><h2>{escape(title)}</h2><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"<figcaption>{' &nbsp; '.join(names)}</figcaption></figure>"
    )


def _figure(
    title: str, at: Sequence[float], series: Mapping[str, Sequence[float]], *, bound: float | None = None
) -> str:
    """Draw lines over the concurrency, which grows by doublings; zero is always in view."""
    highest = max([*(value for values in series.values() for value in values), bound or 0.0]) or 1.0
    step = _step(highest)
    parts, y = _levels(step * math.ceil(highest / step), step)
    first, last = math.log2(min(at)), math.log2(max(at))

    def x(value: float) -> float:
        share = (math.log2(value) - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts += [
        f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        for value in at
    ]
    parts.append(_across("requests at a time"))
    if bound is not None:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(bound):.1f}" y2="{y(bound):.1f}" '
            'stroke="var(--ink)" stroke-dasharray="5 4"/>'
        )
    for colour, values in zip(_COLOURS, series.values(), strict=False):
        points = [(x(one), y(value), value) for one, value in zip(at, values, strict=True)]
        line = " ".join(f"{left:.1f},{up:.1f}" for left, up, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{left:.1f}" cy="{up:.1f}" r="4" fill="{colour}"><title>{value:.4g}</title></circle>'
            for left, up, value in points
        ]
    names = [
        f'<span style="color:{colour}">&#9679; {escape(name)}</span>'
        for colour, name in zip(_COLOURS, series, strict=False)
        if name
    ]
    names += [] if bound is None else ["- - the bound of the SLO"]
    return _svg(title, parts, names)


def _step(highest: float) -> float:
    """Choose a round distance of the grid's lines, so that there are three to six of them."""
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor)
