"""A plan as shell scripts that a person can read, and that schedulers run: one for each host.

Placeholders become shell variables: `{port:http}` is `$FLAGSCALE_PORT_HTTP`, `{run_dir}` is
`$FLAGSCALE_RUN_DIR`, `{node_rank}` is `$FLAGSCALE_NODE_RANK` and the address of node 3
`${FLAGSCALE_ADDRESSES[3]}`. Everything else is quoted by one function, so that nothing in it is ever
interpreted. Nodes whose commands are the same share one function.

What does not live here: what a scheduler puts around them (`slurm.py`, `kubernetes.py`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flagscale_hw.placeholders import pieces
from flagscale_hw.plan import Plan, Process
from flagscale_hw.target import LOCAL

__all__ = ["node_script", "quote", "render_scripts", "variable"]


def variable(port: str) -> str:
    """Return the shell variable of a port."""
    return "FLAGSCALE_PORT_" + re.sub(r"[^A-Z0-9]", "_", port.upper())


def quote(text: str, ranks: Mapping[str, int]) -> str:
    """Quote a text of a plan as one shell word, with variables for its placeholders.

    Args:
        text: any text without NUL.
        ranks: target -> node rank.
    """
    parts = [
        shlex.quote(piece) if isinstance(piece, str) else f'"{_reference(*piece, ranks)}"'
        for piece in pieces(text)
    ]
    return "".join(parts) or "''"


def _reference(kind: str, name: str, ranks: Mapping[str, int]) -> str:
    if kind == "port":
        return f"${{{variable(name)}}}"
    if kind == "address":
        return f"${{FLAGSCALE_ADDRESSES[{ranks[name]}]}}"
    if kind == "own_address":
        return "${FLAGSCALE_ADDRESSES[FLAGSCALE_NODE_RANK]}"
    return "${FLAGSCALE_RUN_DIR}" if kind == "run_dir" else "${FLAGSCALE_NODE_RANK}"


def render_scripts(plan: Plan) -> dict[str, str]:
    """Return one script for each host: file name -> text. Secrets are not in them but asked for.

    Each is complete: `FLAGSCALE_RUN_DIR=/somewhere bash node-0.sh` runs that host's part, given the numbers
    of the ports where the plan does not fix them.
    """
    names = [target.name for target in plan.targets] or [LOCAL]
    addresses = " ".join(shlex.quote(target.reached_as) for target in plan.targets) or "127.0.0.1"
    head = [
        ': "${FLAGSCALE_RUN_DIR:?set it to a folder for logs and files}"',
        f"FLAGSCALE_ADDRESSES=({addresses})",
    ]
    for port, number in plan.ports.items():
        given = f":={number}" if number else f":?set it to a free port of {plan.owner_of(port)}"
        head.append(f': "${{{variable(port)}{given}}}"')
    node = list(node_script(plan))
    return {f"node-{rank}.sh": _one_host(plan, rank, name, head, node) for rank, name in enumerate(names)}


def _one_host(plan: Plan, rank: int, name: str, head: list[str], node: list[str]) -> str:
    about = f"# {_comment(plan.name)}: node {rank} ({_comment(name)}), by FlagScale from the plan of the run."
    top = ["#!/usr/bin/env bash", about, "set -euo pipefail", f"FLAGSCALE_NODE_RANK={rank}"]
    return "\n".join([*top, *head, *node])


def node_script(plan: Plan, *, to_files: bool = True) -> Iterator[str]:
    """Yield the lines that run a node's part, for `$FLAGSCALE_NODE_RANK`.

    They write the plan's files, start the processes, end all when one fails, pass SIGTERM on as the plan's
    own signal, and exit with the code of the first process that failed. What became of each process is
    written to `$FLAGSCALE_RUN_DIR/ends`: `<process>.begun` holds host and start, `<process>` exit code and
    end, times in unix seconds. A service that ends before it was asked to has failed, with exit code 0 too.

    Args:
        plan: what to run.
        to_files: give each process a log of its own in `$FLAGSCALE_RUN_DIR/logs`; else all write to standard
            output.
    """
    ranks = {target.name: rank for rank, target in enumerate(plan.targets)} or {LOCAL: 0}
    secrets = {name for process in plan.processes for name in process.env} & set(plan.secrets)
    yield from (f': "${{{name}:?secret: set it in the environment}}"' for name in sorted(secrets))
    yield 'mkdir -p "$FLAGSCALE_RUN_DIR"/{logs,ends}'
    for file in plan.files:
        yield from _file(file.path, file.text, ranks)
    yield from _RUNNER.format(signal=plan.stop.signal.removeprefix("SIG")).splitlines()
    yield 'case "$FLAGSCALE_NODE_RANK" in'
    for processes, members in _alike(plan.processes):
        yield f"{'|'.join(str(ranks[host]) for host in members)})"
        for name, process in processes:
            yield from _start(process, plan.secrets, ranks)
            log = f'>> "$FLAGSCALE_RUN_DIR"/logs/{quote(name, ranks)}.log 2>&1 ' if to_files else ""
            yield f") {log}< /dev/null &"
            yield f"begun $! {quote(name, ranks)}{' service' if process.is_service else ''}"
        yield ";;"
    yield "esac"
    yield "wait_for_all"
    yield ""


def _alike(processes: Iterable[Process]) -> Iterator[tuple[list[tuple[str, Process]], list[str]]]:
    """Group the hosts whose processes have the same text; most plans have one such group."""
    by_host: dict[str, list[Process]] = {}
    for process in processes:
        by_host.setdefault(process.host, []).append(process)
    groups: dict[tuple[Any, ...], tuple[list[tuple[str, Process]], list[str]]] = {}
    for host, own in by_host.items():
        named = [(_name(process), process) for process in own]
        key = tuple((name, p.argv, p.cwd, p.is_service, tuple(p.env.items())) for name, p in named)
        groups.setdefault(key, (named, []))[1].append(host)
    yield from groups.values()


def _name(process: Process) -> str:
    """Return a name with its rank at the end as a placeholder, so that equal nodes have equal text."""
    end = f"-{process.rank}"
    return process.name.removesuffix(end) + "-{node_rank}" if process.name.endswith(end) else process.name


_RUNNER = """\
pids=() names=() kinds=() is_asked=
end_all() {{ is_asked=1; kill -{signal} "${{pids[@]}}" 2>/dev/null || true; }}
trap end_all TERM INT
note() {{   # no command substitution from here on: bash 5.2 loses a signal that falls into one
  {{ "${{@:2}}"; date +%s.%N; }} > "$FLAGSCALE_RUN_DIR/ends/.$1"
  mv "$FLAGSCALE_RUN_DIR/ends/.$1" "$FLAGSCALE_RUN_DIR/ends/$1"
}}
begun() {{
  pids+=("$1") names+=("$2") kinds+=("${{3-}}")
  note "$2.begun" uname -n
  [ -z "$is_asked" ] || end_all   # asked before this one was there
}}
wait_for_all() {{
  local first=0 code i
  while ((${{#pids[@]}})); do
    wait -n 2>/dev/null || true   # something ended, or a signal came
    for i in "${{!pids[@]}}"; do
      kill -0 "${{pids[i]}}" 2>/dev/null && continue
      code=0; wait "${{pids[i]}}" || code=$?   # -1 where a signal fell into the wait: unknown
      note "${{names[i]}}" echo "$code"
      if [ "$code${{kinds[i]}}$is_asked" = 0service ]; then
        echo "${{names[i]}}: exited with code 0, although nobody had stopped it" >&2; code=1
      fi
      unset "pids[i]" "names[i]" "kinds[i]"
      if ((code && !first)); then first=$code; ((${{#pids[@]}})) && end_all; fi
    done
  done
  exit "$first"
}}"""


def _start(process: Process, secrets: Iterable[str], ranks: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines that start one process in the background; a subshell keeps its environment apart."""
    yield "("
    for variable_name in sorted(process.env.keys() - set(secrets)):
        yield f"  export {variable_name}={quote(process.env[variable_name], ranks)}"
    yield f"  cd {quote(process.cwd, ranks)}"
    yield "  exec " + " \\\n    ".join(quote(word, ranks) for word in process.argv)


def _file(path: str, text: str, ranks: Mapping[str, int]) -> Iterator[str]:
    place = f'"$FLAGSCALE_RUN_DIR"/{shlex.quote(path)}'
    if "/" in path:
        yield f'mkdir -p "$(dirname {place})"'
    yield f"printf '%s' {quote(text, ranks)} > {place}"


def _comment(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text)
