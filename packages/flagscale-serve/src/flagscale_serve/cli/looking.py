"""The verbs that come back to a service: `status`, `logs`, `stop`, `list`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_serve.cli.output import OVERRIDES, add, count, say, seconds, word

if TYPE_CHECKING:
    from flagscale_serve.metrics import Load
    from flagscale_serve.state import ServiceStatus

__all__ = ["add_looking"]


def add_looking(verbs: Any) -> None:
    """Add all of them."""
    for name, verb, text in (
        ("status", _status, "say how a service stands"),
        ("logs", _logs, "print what the engine has written"),
        ("stop", _stop, "end a service and everything it started"),
    ):
        parser = add(verbs, name, verb, text)
        parser.add_argument(
            "target",
            nargs="?",
            type=word,
            metavar="RUN",
            help="run directory or id, file, recipe, or model (default: the only one)",
        )
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
        if name == "logs":
            parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
            parser.add_argument(
                "-n",
                "--lines",
                type=count,
                metavar="N",
                help="begin with the last N lines of each instance (default: with the first)",
            )
        if name == "stop":
            parser.add_argument(
                "--grace",
                type=seconds,
                metavar="SECONDS",
                help="for requests under way to end, before it is killed (default: the engine's)",
            )
        if name != "logs":
            parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser = add(verbs, "list", _list, "list the services of this machine")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")


def _status(arguments: argparse.Namespace) -> int:
    from flagscale_serve.runs import status

    now = status(arguments.target, arguments.overrides)
    _print_status(now, as_json=arguments.json)
    return 4 if now.state in ("failed", "lost") else 0 if now.is_ready else 3


def _print_status(now: ServiceStatus, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(now.to_dict(), indent=2, ensure_ascii=False))
        return
    print(f"{now.name}: {now.state}{f': {now.reason}' if now.reason else ''}")
    for one in now.instances:
        again = f", started again {one.restarts} times" if one.restarts else ""
        away = "" if one.is_ready or now.state != "starting" else ", not ready"
        where = f", on {', '.join(one.hosts)}" if one.hosts else ""
        print(
            f"  {one.name}: {one.engine}, model {one.model}, {one.url or 'no port yet'}{where}, "
            f"pid {one.pid or '-'}{away}{again}{_load_text(one.load)}"
        )
    print(f"  {now.run_dir}")


def _load_text(load: Load | None) -> str:
    """Tell how busy an instance is, as far as it says."""
    if load is None:
        return ""
    parts = []
    if load.running is not None:
        parts.append(f"{load.running} running")
    if load.waiting is not None:
        parts.append(f"{load.waiting} waiting")
    if load.tokens_per_s is not None:
        parts.append(f"{load.tokens_per_s:.1f} tokens/s")
    if load.kv_usage is not None:
        parts.append(f"{load.kv_usage:.0%} of the key-value cache")
    return ", " + ", ".join(parts)


def _logs(arguments: argparse.Namespace) -> int:
    from flagscale_serve.state import read_plan
    from flagscale_serve.targets import find_run

    run = find_run(arguments.target, arguments.overrides)
    is_single = len(read_plan(run).get("processes", ())) == 1
    for line in run.logs(follow=arguments.follow, last=arguments.lines):
        print(line.text if is_single else f"{line.process}: {line.text}", flush=arguments.follow)
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from flagscale_serve.runs import stop

    _print_status(
        stop(arguments.target, arguments.overrides, grace_s=arguments.grace), as_json=arguments.json
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from flagscale_serve.state import list_runs

    found = list_runs()
    if arguments.json:
        print(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
        return 0
    for one in found:
        where = ", ".join(f"{i.model} {i.url or '-'}" for i in one.instances)
        print(f"{Path(one.run_dir).name}  {one.state:<9}  {where}  {one.run_dir}")
    if not found:
        say("no services are known on this machine")
    return 0
