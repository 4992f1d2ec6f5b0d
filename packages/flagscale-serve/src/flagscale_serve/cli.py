"""The command line: arguments, printing and exit codes; every verb is one function of the package."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from flagscale_serve.__about__ import __version__

if TYPE_CHECKING:
    from flagscale_hw import Plan, Run
    from flagscale_serve.bench import Workload
    from flagscale_serve.metrics import Load
    from flagscale_serve.runs import Options, ServiceStatus

__all__ = ["main"]

_INTERRUPTED = 130
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
_EXAMPLES = """\
examples:
  flagscale-serve run MODEL_DIR                    serve a model here, until Ctrl-C
  flagscale-serve run FILE.yaml --detach           serve a FlagScale file in the background, return when ready
  flagscale-serve chat MODEL_DIR -m 'Hello'        ask it
  flagscale-serve generate IN.jsonl OUT.jsonl      answer a file of requests by the service that runs
  flagscale-serve bench MODEL_DIR --slo ttft=200ms measure it under load
  flagscale-serve stop MODEL_DIR                   stop it

exit codes: 0 done, 1 bug, 2 wrong input, 3 not found or not ready, 4 the run failed, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from flagscale_config import command

    return command.run(_run_command, list(sys.argv[1:] if argv is None else argv))


def _run_command(argv: list[str]) -> int:
    from flagscale_config import command

    arguments = command.parse(_parser(), argv)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    return verb(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagscale-serve",
        description="Serve language models behind an OpenAI-compatible address.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flagscale-serve {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_plan(verbs)
    _add_run(verbs)
    _add_looking(verbs)
    _add_chat(verbs)
    _add_generate(verbs)
    _add_bench(verbs)
    _add_tune(verbs)
    return parser


def _add(
    verbs: Any, name: str, verb: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(verb=verb)
    return parser


def _add_starting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="FILE_OR_MODEL_DIR", help="FlagScale serve file, recipe, or model directory"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of the file")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="vllm, sglang, llama_cpp, transformers, or one that another package brings (default: the "
        "file's, else vllm on an accelerator and transformers on a CPU)",
    )
    parser.add_argument(
        "--python",
        help="interpreter that has the engine (default: $FLAGSCALE_SERVE_PYTHON, else the one running this)",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the file's, else a free one)")
    parser.add_argument("--run-dir", type=Path, help="directory for logs and state of this run")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="until the first token (default: 1800)"
    )


def _add_plan(verbs: Any) -> None:
    parser = _add(verbs, "plan", _plan, "show what `run` would start, without starting it")
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
    parser.add_argument("--image", help="container image of the pods, for --as lws")
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="volume claim of the pods and where it is mounted; may be repeated",
    )


def _add_run(verbs: Any) -> None:
    parser = _add(verbs, "run", _run, "start a service; without --detach it ends with this command")
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


def _add_looking(verbs: Any) -> None:
    for name, verb, text in (
        ("status", _status, "say how a service stands"),
        ("logs", _logs, "print what the engine has written"),
        ("stop", _stop, "end a service and everything it started"),
    ):
        parser = _add(verbs, name, verb, text)
        parser.add_argument(
            "target",
            nargs="?",
            metavar="RUN",
            help="run directory or id, file, or model directory (default: the only one)",
        )
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of the file")
        if name == "logs":
            parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
        if name == "stop":
            parser.add_argument(
                "--grace",
                type=float,
                metavar="SECONDS",
                help="for requests under way to end, before it is killed (default: the engine's)",
            )
        if name != "logs":
            parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser = _add(verbs, "list", _list, "list the services of this machine")
    parser.add_argument("--json", action="store_true", help="print facts as JSON")


def _add_chat(verbs: Any) -> None:
    parser = _add(verbs, "chat", _chat, "ask a served model one thing; the answer goes to standard output")
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN_OR_URL",
        help="run, file, model directory, or address (default: the only one)",
    )
    parser.add_argument("-m", "--message", help="what to say (default: read standard input)")
    parser.add_argument("--system", help="instructions in front of the message")
    parser.add_argument("--complete", action="store_true", help="continue plain text instead of answering")
    parser.add_argument("--model", help="which model, when several are served")
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="length at most (default: 512)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--api-key", help="the server's key (default: $OPENAI_API_KEY)")


def _add_generate(verbs: Any) -> None:
    parser = _add(verbs, "generate", _generate, "answer a file of requests, one JSON object per line")
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help='lines {"prompt": ...} or {"messages": ...}'
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="answers; an earlier file is completed")
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="run, address, or a file, recipe or model, which is served meanwhile (default: the only run)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of the file")
    parser.add_argument("--model", help="which model, when several are served")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="at a time (default: 64)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random choices")
    parser.add_argument("--system", help="instructions in front of each conversation")
    parser.add_argument("--api-key", help="the server's key (default: $OPENAI_API_KEY)")
    parser.add_argument("--engine", metavar="NAME", help="of a service that is started for this")
    parser.add_argument("--python", help="interpreter that has the engine")


def _add_bench(verbs: Any) -> None:
    parser = _add(verbs, "bench", _bench, "load a server at several concurrencies and show what it gives")
    parser.add_argument(
        "target", nargs="?", metavar="RUN_OR_URL", help="run, file, model, or address (default: the only run)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of the file")
    _add_load(parser)
    parser.add_argument(
        "--concurrency",
        type=_numbers,
        default=(1, 8, 32),
        metavar="N,N,...",
        help="requests at a time, one level after the other (default: 1,8,32)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for bench.json and bench.html (default: in the run's directory, or here)",
    )
    parser.add_argument("--json", action="store_true", help="print bench.json")


def _add_tune(verbs: Any) -> None:
    parser = _add(verbs, "tune", _tune, "search the engine's options for the highest goodput")
    parser.add_argument("target", metavar="FILE_OR_MODEL_DIR", help="serve file, recipe, or model directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of the file")
    parser.add_argument(
        "--try",
        dest="space",
        action="append",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="engine_args to try, such as max_num_seqs=64,128; may be repeated, all combinations are tried",
    )
    _add_load(parser)
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="at a time (default: 32)")
    parser.add_argument("--engine", metavar="NAME", help="see `run`")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tune"),
        metavar="DIR",
        help="for the journal and best.yaml (default: tune)",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    """Add what a load is made of."""
    parser.add_argument(
        "--input-len", type=int, default=512, metavar="N", help="tokens of each prompt (default: 512)"
    )
    parser.add_argument(
        "--output-len", type=int, default=128, metavar="N", help="tokens of each answer (default: 128)"
    )
    parser.add_argument(
        "--requests", type=int, default=128, metavar="N", help="counted requests of each level (default: 128)"
    )
    parser.add_argument(
        "--warmups", type=int, default=8, metavar="N", help="requests before them (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts")
    parser.add_argument(
        "--slo",
        default="",
        metavar="NAME=TIME,...",
        help="bounds of each request, for the goodput: ttft, tpot, itl, e2e; such as ttft=200ms,tpot=20ms",
    )
    parser.add_argument(
        "--generator",
        choices=("vllm", "own"),
        help="`vllm bench serve`, or our own (default: vllm where it is installed and the engine takes it)",
    )
    parser.add_argument("--python", help="interpreter that has vLLM (default: the one that runs the engine)")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer of the model behind an address")
    parser.add_argument("--model", help="which model, when several are served")
    parser.add_argument("--api-key", help="the server's key (default: $OPENAI_API_KEY)")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _options(arguments: argparse.Namespace) -> Options:
    from flagscale_serve.plan import MAX_RESTARTS, READY_TIMEOUT_S
    from flagscale_serve.runs import Options

    return Options(
        engine=arguments.engine,
        python=arguments.python,
        host=arguments.host,
        port=arguments.port,
        run_dir=arguments.run_dir.absolute() if arguments.run_dir else None,
        ready_timeout_s=READY_TIMEOUT_S if arguments.timeout is None else arguments.timeout,
        max_restarts=getattr(arguments, "max_restarts", MAX_RESTARTS),
    )


def _plan(arguments: argparse.Namespace) -> int:
    from flagscale_serve.runs import check, prepare

    prepared = prepare(arguments.target, arguments.overrides, _options(arguments))
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
    from flagscale_serve.runs import check, prepare, start

    prepared = prepare(arguments.target, arguments.overrides, _options(arguments))
    for warning in prepared.plan.facts["warnings"]:
        _say(f"warning: {warning}")
    check(prepared)
    _say(f"starting {prepared.plan.name} on {prepared.plan.facts['chip']}; run directory {prepared.run_dir}")
    _interrupt_on_signals()
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
        return _INTERRUPTED
    _say("stopping")
    try:
        now = run.stop()
    except KeyboardInterrupt:
        now = run.stop(0.0)
    _say(f"{now.state}: nothing of it is left")
    return _INTERRUPTED


def _follow(run: Run, began: float, arguments: argparse.Namespace) -> int:
    from flagscale_serve.foreground import StartLog, ready_text
    from flagscale_serve.runs import failure, status_of

    log = StartLog(run, status_of(run).instances, _say, verbose=arguments.verbose)
    now = log.until_ready()
    if now.state == "ready":
        print(ready_text(status_of(run), time.monotonic() - began), flush=True)
        if arguments.detach:
            _say(f"stop it with: flagscale-serve stop {shlex.quote(str(run.dir))}")
            return 0
        _say("Ctrl-C stops it; the engine's log follows")
        now = log.until_over()
    if now.exit_code:
        raise failure(run, now)
    _say(f"{now.state}{f': {now.reason}' if now.reason else ''}")
    return 0


def _interrupt_on_signals() -> None:
    """Let a polite kill and a closed terminal end the run as Ctrl-C does."""

    def interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


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
        print(
            f"  {one.name}: {one.engine}, model {one.model}, {one.url or 'no port yet'}, pid {one.pid or '-'}"
            f"{away}{again}{_load_text(one.load)}"
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
    from flagscale_serve.runs import find_run, logs, read_plan

    target = str(find_run(arguments.target, arguments.overrides).dir)
    is_single = len(read_plan(find_run(target)).get("processes", ())) == 1
    for line in logs(target, follow=arguments.follow):
        print(line.text if is_single else f"{line.process}: {line.text}", flush=arguments.follow)
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from flagscale_serve.runs import stop

    _print_status(
        stop(arguments.target, arguments.overrides, grace_s=arguments.grace), as_json=arguments.json
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from flagscale_serve.runs import list_runs

    found = list_runs()
    if arguments.json:
        print(json.dumps([one.to_dict() for one in found], indent=2, ensure_ascii=False))
        return 0
    for one in found:
        where = ", ".join(f"{i.model} {i.url or '-'}" for i in one.instances)
        print(f"{Path(one.run_dir).name}  {one.state:<9}  {where}  {one.run_dir}")
    if not found:
        _say("no services are known on this machine")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from flagscale_serve.chat import chat
    from flagscale_serve.errors import InvalidService

    message = arguments.message
    if message is None:
        if sys.stdin.isatty():
            raise InvalidService("message: nothing to say: give it with -m 'TEXT', or pipe it in")
        message = sys.stdin.read()
    for piece in chat(
        arguments.target,
        message,
        system=arguments.system,
        complete=arguments.complete,
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        api_key=arguments.api_key,
    ):
        print(_shown(piece), end="", flush=True)
    print()
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from flagscale_serve.foreground import batch_progress
    from flagscale_serve.generate import Sampling, generate
    from flagscale_serve.runs import Options

    _interrupt_on_signals()
    with batch_progress() as tell:
        ended = generate(
            arguments.target,
            arguments.input,
            arguments.output,
            overrides=tuple(arguments.overrides),
            options=Options(engine=arguments.engine, python=arguments.python),
            model=arguments.model,
            sampling=Sampling(
                max_tokens=arguments.max_tokens,
                temperature=arguments.temperature,
                seed=arguments.seed,
                system=arguments.system,
            ),
            concurrency=arguments.concurrency,
            api_key=arguments.api_key,
            tell=tell,
        )
    kept = f", {ended.kept} of them before" if ended.kept else ""
    rate = f"{ended.tokens} tokens, {ended.tokens_per_s:.1f} tokens/s"
    _say(f"{ended.done} of {ended.total} answered{kept}; {rate}")
    if ended.failed:
        _say(f"{ended.failed} failed: their lines in {arguments.output} say why; run it again to retry them")
        return 4
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from flagscale_serve.bench import bench, parse_slo
    from flagscale_serve.foreground import level_text

    slo = parse_slo(arguments.slo)
    _interrupt_on_signals()
    done = bench(
        arguments.target,
        arguments.overrides,
        workload=_workload(arguments),
        concurrencies=arguments.concurrency,
        slo=slo,
        generator=arguments.generator,
        python=arguments.python,
        tokenizer=arguments.tokenizer,
        model=arguments.model,
        api_key=arguments.api_key,
        tell=lambda level: _say(level_text(level, slo)),
    )
    folder = arguments.out or _bench_folder(arguments.target, arguments.overrides)
    done.write(folder)
    if arguments.json:
        print(json.dumps(done.to_dict(), indent=2, ensure_ascii=False))
    else:
        best = done.best
        goodput = f"{best.goodput(slo):.2f} requests/s{' within the SLO' if slo else ''}"
        print(f"best: {goodput} at {best.workload.concurrency} at a time\n{folder / 'bench.html'}")
    return 4 if any(not level.answered for level in done.levels) else 0


def _tune(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from flagscale_serve.bench import parse_slo
    from flagscale_serve.foreground import trial_text
    from flagscale_serve.runs import Options
    from flagscale_serve.tune import parse_space, tune

    _interrupt_on_signals()
    done = tune(
        arguments.target,
        arguments.overrides,
        space=parse_space(arguments.space),
        folder=arguments.out,
        workload=replace(_workload(arguments), concurrency=arguments.concurrency),
        slo=parse_slo(arguments.slo),
        options=Options(engine=arguments.engine, python=arguments.python),
        generator=arguments.generator,
        tell=lambda trial: _say(trial_text(trial)),
    )
    kept = f", {done.kept} of them before" if done.kept else ""
    _say(f"{len(done.trials)} trials{kept}")
    if done.best is not None:
        print(f"best: {trial_text(done.best)}\n{done.file}")
    return 0


def _workload(arguments: argparse.Namespace) -> Workload:
    from flagscale_serve.bench import Workload

    return Workload(
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        num_requests=arguments.requests,
        num_warmups=arguments.warmups,
        seed=arguments.seed,
    )


def _bench_folder(target: str | None, overrides: Sequence[str]) -> Path:
    from flagscale_serve.runs import find_run

    name = time.strftime("bench-%Y%m%d-%H%M%S")
    is_address = target is not None and target.startswith(("http://", "https://"))
    return Path(name) if is_address else find_run(target, overrides).dir / name


def _shown(piece: str) -> str:
    """Keep what a model says from steering the terminal; elsewhere every character passes."""
    if not sys.stdout.isatty():
        return piece
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _UNPRINTABLE for letter in piece)


def _say(text: str) -> None:
    """Tell a person something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
