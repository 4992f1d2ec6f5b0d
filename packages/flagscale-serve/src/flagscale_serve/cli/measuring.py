"""The verbs that load a server: `bench` and `tune`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_serve.cli.output import (
    OVERRIDES,
    add,
    add_engine,
    engine_options,
    interrupt_on_signals,
    say,
    word,
)

if TYPE_CHECKING:
    from flagscale_serve.bench import Workload

__all__ = ["add_bench", "add_tune"]


def add_bench(verbs: Any) -> None:
    """Add `bench`."""
    parser = add(verbs, "bench", _bench, "load a server at several concurrencies and show what it gives")
    parser.add_argument(
        "target",
        nargs="?",
        type=word,
        metavar="RUN_OR_URL",
        help="run, file, recipe, model, or address (default: the only run)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    _add_load(parser)
    parser.add_argument(
        "--python",
        type=word,
        metavar="PATH",
        help="interpreter that has vLLM (default: the one that runs the engine)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer of the model behind an address")
    parser.add_argument("--model", metavar="NAME", help="which model, when several are served")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: $OPENAI_API_KEY)")
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


def add_tune(verbs: Any) -> None:
    """Add `tune`."""
    parser = add(verbs, "tune", _tune, "search the engine's options for the highest goodput")
    parser.add_argument(
        "target", type=word, metavar="FILE_OR_MODEL", help="FlagScale serve file, recipe, or model"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument(
        "--try",
        dest="space",
        action="append",
        required=True,
        metavar="OPTION=VALUE,VALUE",
        help="engine_args to try, such as max_num_seqs=64,128; may be repeated, all combinations are tried",
    )
    _add_load(parser)
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="at a time (default: 32)")
    add_engine(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tune"),
        metavar="DIR",
        help="for the journal and best.yaml (default: tune)",
    )
    parser.add_argument("--json", action="store_true", help="print every trial as JSON")


def _add_load(parser: argparse.ArgumentParser) -> None:
    """Add what a load is made of."""
    of_file = "default: the profile of the serve file, else"
    for name, text in (
        ("--input-len", f"tokens of each prompt ({of_file} 512)"),
        ("--output-len", f"tokens of each answer ({of_file} 128)"),
        ("--prefix-len", f"tokens more, shared by all prompts ({of_file} 0)"),
        ("--requests", f"counted requests of each level ({of_file} 128)"),
    ):
        parser.add_argument(name, type=int, metavar="N", help=text)
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


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, such as 1,8,32") from None


def _bench(arguments: argparse.Namespace) -> int:
    from flagscale_serve.bench import bench, make_folder, parse_slo
    from flagscale_serve.foreground import level_text

    slo = parse_slo(arguments.slo)
    if arguments.out is not None:
        make_folder(arguments.out)  # to hear of it after the load would be late
    interrupt_on_signals()
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
        tell=lambda level: say(level_text(level, slo)),
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
    from flagscale_serve.tune import parse_space, tune

    interrupt_on_signals()
    done = tune(
        arguments.target,
        arguments.overrides,
        space=parse_space(arguments.space),
        folder=arguments.out,
        workload=replace(_workload(arguments), concurrency=arguments.concurrency),
        slo=parse_slo(arguments.slo),
        options=engine_options(arguments),
        generator=arguments.generator,
        tell=lambda trial: say(trial_text(trial)),
    )
    kept = f", {done.kept} of them before" if done.kept else ""
    say(f"{len(done.trials)} trials{kept}")
    if arguments.json:
        print(json.dumps(done.to_dict(), indent=2, ensure_ascii=False))
    elif done.best is not None:
        print(f"best: {trial_text(done.best)}\n{done.file}")
    return 0


def _workload(arguments: argparse.Namespace) -> Workload:
    """Return the file's load, changed by what the command line says."""
    from dataclasses import replace

    from flagscale_serve.bench import profile_of

    said = {
        "prefix_len": arguments.prefix_len,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "num_requests": arguments.requests,
    }
    return replace(
        profile_of(arguments.target, arguments.overrides),
        **{name: value for name, value in said.items() if value is not None},
        num_warmups=arguments.warmups,
        seed=arguments.seed,
    )


def _bench_folder(target: str | None, overrides: Sequence[str]) -> Path:
    from flagscale_serve.targets import find_run

    name = time.strftime("bench-%Y%m%d-%H%M%S")
    is_address = target is not None and target.startswith(("http://", "https://"))
    return Path(name) if is_address else find_run(target, overrides).dir / name
