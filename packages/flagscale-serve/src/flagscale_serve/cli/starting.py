"""The verbs that decide and start: `plan` and `run`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_serve.cli.output import (
    INTERRUPTED,
    OVERRIDES,
    add,
    add_engine,
    engine_options,
    interrupt_on_signals,
    say,
    word,
)

if TYPE_CHECKING:
    from flagscale_hw import Plan, Run
    from flagscale_serve.runs import Options

__all__ = ["add_plan", "add_run"]


def add_plan(verbs: Any) -> None:
    """Add `plan`."""
    parser = add(verbs, "plan", _plan, "show what `run` would start, without starting it")
    _add_starting(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="OPTION",
        help="show for each option, or for one, what it becomes and where it comes from",
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("text", "scripts", "lws"),
        default="text",
        help="for people, as bash scripts for each host, or as a LeaderWorkerSet of Kubernetes",
    )
    parser.add_argument("--image", metavar="NAME", help="container image of the pods, for --as lws")
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="volume claim of the pods and where it is mounted; may be repeated",
    )


def add_run(verbs: Any) -> None:
    """Add `run`."""
    parser = add(verbs, "run", _run, "start a service; without --detach it ends with this command")
    _add_starting(parser)
    parser.add_argument("--detach", action="store_true", help="return when it is ready and leave it running")
    parser.add_argument("--no-wait", action="store_true", help="with --detach: return at once")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="of each instance by itself within ten minutes, once it has been ready (default: 3)",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the engine's log from its first line"
    )


def _add_starting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        type=word,
        metavar="FILE_OR_MODEL",
        help="FlagScale serve file, recipe, model directory, or GGUF file",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    add_engine(parser)
    parser.add_argument(
        "--host", type=word, metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to listen on (default: the file's, else a free one)"
    )
    parser.add_argument(
        "--policy",
        type=word,
        metavar="NAME",
        help="how the router chooses among copies: power_of_two (the less loaded of two; default), "
        "round_robin, random, cache_aware (asks for each prompt's tokens first), consistent_hash",
    )
    parser.add_argument(
        "--run-dir", type=word, metavar="DIR", help="directory for logs and state of this run"
    )


def _options(arguments: argparse.Namespace) -> Options:
    from flagscale_serve.plan import MAX_RESTARTS

    return engine_options(
        arguments,
        host=arguments.host,
        port=arguments.port,
        policy=arguments.policy,
        run_dir=Path(arguments.run_dir).absolute() if arguments.run_dir else None,
        max_restarts=getattr(arguments, "max_restarts", MAX_RESTARTS),
    )


def _plan(arguments: argparse.Namespace) -> int:
    from flagscale_serve.runs import check, prepare

    prepared = prepare(arguments.target, arguments.overrides, _options(arguments))
    with suppress(BrokenPipeError):  # whether somebody reads it or not, the exit code tells
        if arguments.json:
            sys.stdout.write(prepared.plan.to_json())
        elif arguments.explain is not None:
            _print_options(prepared.plan, arguments.explain.replace("-", "_"))
        elif arguments.form != "text":
            sys.stdout.write(_rendered(prepared.plan, arguments))
            return 0  # for machines that are not here
        else:
            _print_plan(prepared.plan, prepared.run_dir)
        sys.stdout.flush()
    # The plan is worth seeing even where the model or the engine is not: so it comes first.
    check(prepared)
    return 0


def _print_plan(plan: Plan, run_dir: Path) -> None:
    hosts = f" of {', '.join(target.name for target in plan.targets)}" if plan.targets else ""
    print(f"{plan.kind} {plan.name} on {plan.facts['chip']}{hosts}, run directory {run_dir}")
    for warning in plan.facts["warnings"]:
        print(f"warning: {warning}")
    probes = {name: probe for probe in plan.probes for name in _ports_in(probe.url)}
    for process in plan.processes:
        where = f" on {process.host}" if plan.targets else ""
        print(f"\n{process.name}:{where} in {process.cwd}")
        for key, value in sorted(process.env.items()):
            print(f"  {key}={'***' if key in plan.secrets else shlex.quote(value)}")
        print(f"  {shlex.join(process.argv)}")
        if (probe := probes.get(process.name)) is not None:
            gives = probe.expect or "an answer"
            print(f"  ready when {probe.method} {probe.url} gives {gives} within {probe.timeout_s:g} s")
    for name, depends in plan.facts.get("graph", {}).items():
        print(f"\n{name} <- {', '.join(depends) or 'the request'}", end="")
    for one in plan.facts["instances"]:
        if "fit" in one:
            print(f"\n{_fit_text(one['fit'])}")
    ports = ", ".join(f"{name} {number or 'any free one'}" for name, number in plan.ports.items())
    print(f"\nports: {ports}\nstop: {plan.stop.signal}, then SIGKILL after {plan.stop.grace_s:g} s")


def _ports_in(url: str) -> list[str]:
    from flagscale_hw.placeholders import placeholders

    return [name for kind, name in placeholders(url) if kind == "port"]


def _fit_text(found: dict[str, Any]) -> str:
    """Tell what one device has to hold."""
    from flagscale_serve.fit import devices_words

    gib = 1 << 30

    def size(name: str) -> str:
        value = found[name]
        return "not known" if value is None else f"{max(0, value) / gib:.2f} GiB"

    tokens, length = found["kv_tokens"], found["max_model_len"]
    held = "" if tokens is None else f": {tokens} tokens"
    if tokens is not None and length:
        held += f", {tokens / length:.1f} sequences of {length}"
    return (
        f"{found['instance']}: on {devices_words(found['devices'])}: {size('memory')}, of which the engine "
        f"may take {size('budget')}\n  weights {size('weights')}, working memory about {size('working')}, "
        f"left for keys and values {size('room')}{held}\n  {found['verdict']}"
    )


def _print_options(plan: Plan, wanted: str) -> None:
    """Show where each option comes from."""
    from flagscale_serve.errors import InvalidService

    shown = 0
    for one in plan.facts["instances"]:
        rows = [row for row in one["options"] if wanted in ("", row["option"], row["asked"])]
        shown += len(rows)
        if rows:
            print(f"{one['name']}: {one['engine']}")
        for row in sorted(rows, key=lambda row: (row["option"], row["fate"])):
            place = f" ({row['place']})" if row["place"] else ""
            becomes = row["fate"] or shlex.join(row["words"]) or "says nothing"
            asked = "" if row["asked"] == row["option"] else f".{row['asked']}"
            print(f"  {row['option']} = {row['value']}: {becomes}\n    from {row['source']}{asked}{place}")
    if not shown and wanted:
        raise InvalidService(f"explain: {wanted!r}: no option of this plan: `plan --explain` lists them all")


def _rendered(plan: Plan, arguments: argparse.Namespace) -> str:
    """Render the plan for machines that something else starts."""
    from flagscale_hw import Pods, render_kubernetes, render_scripts, runtime
    from flagscale_serve.errors import InvalidService

    if arguments.form == "scripts":
        return "".join(f"# {name}\n{text}\n" for name, text in render_scripts(plan).items())
    if not arguments.image:
        raise InvalidService("image: not given: a LeaderWorkerSet needs the image of its pods: set --image")
    resource = runtime(plan.facts["chip"]).kubernetes_resource
    pods = Pods(
        image=arguments.image,
        claims=dict(word.partition("=")[::2] for word in arguments.claim),
        resources={resource: plan.facts["devices_per_host"]} if resource else {},
    )
    return render_kubernetes(plan, "lws", pods)


def _run(arguments: argparse.Namespace) -> int:
    from flagscale_serve.errors import InvalidService
    from flagscale_serve.runs import check, prepare, start

    if arguments.no_wait and not arguments.detach:
        raise InvalidService("no-wait: the command stays with its service: add --detach, or leave it out")
    prepared = prepare(arguments.target, arguments.overrides, _options(arguments))
    for warning in prepared.plan.facts["warnings"]:
        say(f"warning: {warning}")
    check(prepared)
    say(f"starting {prepared.plan.name} on {prepared.plan.facts['chip']}; run directory {prepared.run_dir}")
    interrupt_on_signals()
    try:
        began = time.monotonic()
        run = start(prepared, detach=arguments.detach)
        if arguments.detach and arguments.no_wait:
            print(run.dir)
            return 0
        return _follow(run, began, arguments)
    except KeyboardInterrupt:
        return _stop_interrupted(prepared.run_dir)


def _stop_interrupted(run_dir: Path) -> int:
    """End what was started before Ctrl-C, at whatever moment it came; a second Ctrl-C spares the grace."""
    from flagscale_hw import RunNotFound, open_run

    try:
        run = open_run(run_dir)
    except RunNotFound:
        return INTERRUPTED
    say("stopping")
    try:
        now = run.stop()
    except KeyboardInterrupt:
        now = run.stop(0.0)
    say(f"{now.state}: nothing of it is left")
    return INTERRUPTED


def _follow(run: Run, began: float, arguments: argparse.Namespace) -> int:
    from flagscale_serve.foreground import StartLog, ready_text
    from flagscale_serve.runs import failure
    from flagscale_serve.state import status_of

    log = StartLog(run, status_of(run).instances, say, verbose=arguments.verbose)
    now = log.until_ready()
    if now.state == "ready":
        print(ready_text(status_of(run), time.monotonic() - began), flush=True)
        if arguments.detach:
            say(f"stop it with: flagscale-serve stop {shlex.quote(str(run.dir))}")
            return 0
        say("Ctrl-C stops it; the engine's log follows")
        now = log.until_over()
    if now.exit_code:
        raise failure(run, now)
    say(f"{now.state}{f': {now.reason}' if now.reason else ''}")
    return 0
