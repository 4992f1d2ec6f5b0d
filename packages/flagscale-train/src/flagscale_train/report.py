"""One page on a training, which `report` writes: for any device, without a network."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_train.chart import Series, draw, short

if TYPE_CHECKING:
    from flagscale_train.runs import TrainStatus

__all__ = ["report"]

_GIB = 1 << 30
_TOLD = ("start", "eval", "checkpoint", "notice", "error", "end")
_MOST_EVENTS = 500

_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--dim:#666;--line:#ddd;--a:#0b6bcb;--b:#d9480f;--bad:#c92a2a}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--dim:#aaa;--line:#444;--a:#4dabf7;--b:#ff922b;--bad:#ff6b6b}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:1.2rem 0 .3rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.5rem;margin:1rem 0}
.cards div{border:1px solid var(--line);border-radius:.5rem;padding:.4rem .7rem}
.cards b{display:block;font-size:1.15rem}.cards span,.none,.dim{color:var(--dim)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 1.5rem}
body{overflow-wrap:anywhere}svg{width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--dim)}
.grid{stroke:var(--line)}.mark{stroke:var(--b);stroke-dasharray:4 3}
.line{fill:none;stroke-width:1.6}.line.s0{stroke:var(--a)}.line.s1{stroke:var(--b)}
.dot.s0{fill:var(--a)}.dot.s1{fill:var(--b)}small.s1{color:var(--b);font-weight:400}
table{border-collapse:collapse;font-size:.85rem}td{padding:.15rem .8rem .15rem 0;vertical-align:top}
td:first-child{white-space:nowrap;color:var(--dim)}
.bad{color:var(--bad)}details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
@media(max-width:40rem){td:first-child{white-space:normal;min-width:5.5rem}svg text{font-size:21px}}
"""


@dataclass(frozen=True)
class _Run:
    """One run with all it wrote."""

    status: TrainStatus
    events: Sequence[Mapping[str, Any]]
    plan: Mapping[str, Any]


def report(
    target: str | os.PathLike[str], overrides: Sequence[str] = (), *, output: Path | None = None
) -> Path:
    """Write a page on a training: curves, events, configuration, versions.

    Args:
        target: experiment file, recipe name or experiment directory, for all of its runs as one curve; or the
            directory of one run, for that one.
        overrides: Hydra overrides, for a file or recipe.
        output: HTML file to write; `report.html` in the directory of the experiment or run by default.

    Returns:
        The file, which needs no other file and no network.

    Raises:
        NotFound: nothing was run there.
        InvalidInput: the file cannot be written.
    """
    from flagscale_train.data.writing import require_writable, saying_why

    runs = _runs(target, overrides)
    newest = runs[-1].status.run_dir
    is_whole = Path(target).absolute() != newest
    home = newest.parent.parent if is_whole and newest.parent.name == "runs" else newest
    path = output or home / "report.html"
    require_writable(path)
    page = _page(runs)
    partial = path.with_name(path.name + ".partial")
    with saying_why(path):
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    return path


def _runs(target: str | os.PathLike[str], overrides: Sequence[str]) -> list[_Run]:
    import flagscale_hw as hw
    from flagscale_train.runs import events_of, find, status

    found = find(target, overrides)
    together = [found]
    if Path(target).absolute() != found.dir and found.dir.parent.name == "runs":
        names = sorted(path for path in found.dir.parent.iterdir() if path.is_dir() and not path.is_symlink())
        together = [hw.open_run(path) for path in names if (path / "plan.json").exists()]
    return [
        _Run(status(one), events_of(one), json.loads((one.dir / "plan.json").read_text(encoding="utf-8")))
        for one in together
    ]


def _page(runs: Sequence[_Run]) -> str:
    newest = runs[-1]
    steps = _steps(runs)
    name = escape(newest.status.name)
    state = newest.status.run.state
    what = newest.status.what_happened
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    wrong = f'<p class="bad">{escape(what)}</p>' if what else ""
    body = [
        f"<h1>{name}</h1>",
        f'<p class="dim">{escape(state)}, {count}, {escape(str(newest.status.run_dir))}</p>{wrong}',
        _cards(newest, steps),
        f'<div class="charts">{_charts(runs, steps)}</div>',
        "<h2>Events</h2>",
        _table(_events(runs)),
        _details("Machine and versions", _machine(newest)),
        _details("Configuration", _configuration(newest)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: training report</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _steps(runs: Sequence[_Run]) -> list[Mapping[str, Any]]:
    """Return one step for each iteration, in order; a step that was trained again counts as it was last."""
    by_iteration = {
        event["iteration"]: event for run in runs for event in run.events if event["event"] == "step"
    }
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def _cards(run: _Run, steps: Sequence[Mapping[str, Any]]) -> str:
    start = run.status.progress.start or {}
    last = steps[-1] if steps else {}
    held_out = run.status.progress.validation or {}
    rates = sorted(rate for step in steps if (rate := step.get("tokens_per_second")))
    total = start.get("train_iters")
    facts = {
        "step": f"{last.get('iteration', 0):,}" + (f" of {total:,}" if total else ""),
        "loss": _of_step(last, "loss", ".4f"),
        "held-out loss": _figure(held_out.get("loss"), ".4f"),
        "grad norm": _of_step(last, "grad_norm", ".3f"),
        "tokens/s, median": _figure(rates[len(rates) // 2] if rates else None, ",.0f"),
        "tokens": short(len(steps) * start.get("tokens_per_step", 0)),
        "TFLOP/s per device": _figure(last.get("tflops_per_device"), ".4g"),
        "MFU": _figure(last.get("mfu"), ".1%"),
        "memory": _figure(last["memory_bytes"] / _GIB if last.get("memory_bytes") else None, ".2f", " GiB"),
        "parameters": short(start["parameters"]) if "parameters" in start else "-",
    }
    cells = "".join(f"<div><span>{key}</span><b>{value}</b></div>" for key, value in facts.items())
    return f'<div class="cards">{cells}</div>'


def _figure(value: Any, shape: str, unit: str = "") -> str:
    return format(value, shape) + unit if isinstance(value, (int, float)) else "-"


def _of_step(step: Mapping[str, Any], name: str, shape: str) -> str:
    return "not a number" if name in step.get("not_finite", ()) else _figure(step.get(name), shape)


def _charts(runs: Sequence[_Run], steps: Sequence[Mapping[str, Any]]) -> str:
    starts = [
        event["iteration"]
        for run in runs[1:]
        for event in run.events
        if event["event"] == "start" and event["iteration"] > 0
    ]
    held_out = {
        event["iteration"]: event["loss"]
        for run in runs
        for event in run.events
        if event["event"] == "eval" and event.get("split") == "validation"
    }
    curves = {
        "Loss": [
            _series("loss", steps, "loss"),
            Series("held-out loss", sorted(held_out.items()), is_dotted=True),
        ],
        "Gradient norm": [_series("gradient norm", steps, "grad_norm")],
        "Tokens per second": [_series("tokens per second", steps, "tokens_per_second")],
        "Memory (GiB)": [_series("memory", steps, "memory_bytes", 1 / _GIB)],
        "Learning rate": [_series("learning rate", steps, "learning_rate")],
    }
    figures = [
        f"<section><h2>{title}{_legend(series[1:])}</h2>{draw(series, starts, short)}</section>"
        for title, series in curves.items()
    ]
    note = '<p class="dim">Dashed lines: resumed there.</p>' if starts else ""
    return "".join(figures) + note


def _legend(others: Sequence[Series]) -> str:
    """Name the lines beside the main one, in their colours."""
    shown = [(number, one.name) for number, one in enumerate(others, 1) if one.points]
    return "".join(f' <small class="s{number}">&#9679; {escape(name)}</small>' for number, name in shown)


def _series(name: str, steps: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> Series:
    return Series(
        name,
        [(step["iteration"], None if step.get(key) is None else float(step[key]) * factor) for step in steps],
    )


def _events(runs: Sequence[_Run]) -> list[tuple[str, str]]:
    """Return time and text of what happened, beside the steps, oldest first."""
    from flagscale_train.watch import event_line

    told = []
    for run in runs:
        told += [
            (_clock(event["time"]), event_line(event) or _bad_step(event))
            for event in run.events
            if event["event"] in _TOLD or event.get("not_finite") or event.get("skipped")
        ]
        if run.status.run.is_over and run.status.run.state not in ("succeeded", "stopped"):
            last = run.events[-1]["time"] if run.events else None
            told.append((_clock(last) if last else "", f"{run.status.run.state}: {run.status.what_happened}"))
    if len(told) > _MOST_EVENTS:
        left_out = len(told) - _MOST_EVENTS
        told = [*told[:50], ("", f"... {left_out} more ..."), *told[50 + left_out :]]
    return told


def _bad_step(step: Mapping[str, Any]) -> str:
    """Say what was wrong with a step whose numbers are none, or whose update was dropped."""
    names = " and ".join(name.replace("_", " ") for name in step.get("not_finite", ()))
    parts = [f"{names} not a number" if names else "", "update left out" if step.get("skipped") else ""]
    return f"step {step['iteration']}: {', '.join(part for part in parts if part)}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _machine(run: _Run) -> list[tuple[str, str]]:
    start, facts = run.status.progress.start or {}, run.plan["facts"]
    layout = facts["layout"]
    devices = sorted(set(facts.get("devices", ())))
    rows = [
        ("chip", str(facts["chip"])),
        ("devices", f"{layout['processes']} x {', '.join(devices) or start.get('device', facts['chip'])}"),
        ("collectives", str(facts.get("collective_backend"))),
        ("layout", ", ".join(f"{name} {size}" for name, size in layout.items() if name != "processes")),
        ("dtype", str(start.get("dtype", "-"))),
        ("layers", str(start.get("layers", "-"))),
    ]
    hosts = sorted({process.host for process in run.status.run.processes})
    return [*rows, ("hosts", ", ".join(hosts)), *sorted(start.get("versions", {}).items())]


_SECRET = re.compile(r"(?i)(^|_)(api_?key|token|secret|passw(or)?d)$")


def _configuration(run: _Run) -> list[tuple[str, str]]:
    options = run.plan["facts"]["megatron_options"]
    return [
        (name, "***" if _SECRET.search(name) else json.dumps(value, ensure_ascii=False))
        for name, value in sorted(options.items())
    ]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows)
    return f"<table>{cells}</table>" if cells else '<p class="none">none</p>'


def _details(title: str, rows: Iterable[tuple[str, str]]) -> str:
    return f"<details><summary>{title}</summary>{_table(rows)}</details>"
