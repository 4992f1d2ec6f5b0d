"""The command line. Everything heavy is imported inside a verb."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_convert.__about__ import __version__

if TYPE_CHECKING:
    from flagscale_convert.inspection import Inspection
    from flagscale_convert.plan import Plan

__all__ = ["main"]

_MISMATCH = 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_EXAMPLES = """examples:
  flagscale-convert inspect checkpoints
  flagscale-convert run checkpoints my-model --to hf --tokenizer tokenizer
  flagscale-convert run my-model for-megatron --to torch_dist
  flagscale-convert verify my-model for-megatron

exit codes: 0 done, 1 bug, 2 wrong input, 3 no whole checkpoint there, 4 writing failed or checkpoints differ,
130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from flagscale_config.command import run

    return run(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    return verb(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flagscale-convert",
        description="Convert model checkpoints between Hugging Face and Megatron, without either of them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print facts as JSON")
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_inspect(verbs, common)
    _add_conversion(verbs, common, "plan", _plan, "show what `run` would write, and write nothing")
    run = _add_conversion(
        verbs, common, "run", _run, "convert; run again to finish an interrupted conversion"
    )
    run.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")
    run.add_argument("--workers", type=_positive, default=2, metavar="N", help="threads (default 2)")
    _add_verify(verbs, common)
    _add_config(verbs, common)
    families = verbs.add_parser("families", parents=[common], help="list what can be converted")
    families.set_defaults(verb=_families)
    return parser


def _add_inspect(verbs: Any, common: argparse.ArgumentParser) -> None:
    inspect = verbs.add_parser(
        "inspect", parents=[common], help="say what a checkpoint is and whether it is whole"
    )
    inspect.add_argument("path", metavar="PATH", type=Path)
    inspect.add_argument("--values", action="store_true", help="read the weights too: NaN, infinity, zeros")
    inspect.set_defaults(verb=_inspect)


def _add_config(verbs: Any, common: argparse.ArgumentParser) -> None:
    text = "write a model's configuration as config.json, Megatron's options or FlagScale YAML"
    config = verbs.add_parser("config", parents=[common], help=text, description=text)
    config.add_argument(
        "src",
        metavar="SRC",
        type=Path,
        help="config.json or a model directory, a Megatron checkpoint, or YAML (experiment, train or model)",
    )
    config.add_argument(
        "--to",
        choices=("yaml", "args", "hf"),
        help="form to write (default: yaml from Hugging Face, hf from Megatron)",
    )
    config.add_argument("--megatron", metavar="VERSION", help="whose options (default: the newest known)")
    config.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="true vocabulary, if SRC does not tell it"
    )
    config.add_argument(
        "--vocab-divisor",
        type=_positive,
        default=128,
        metavar="N",
        help="pad the vocabulary of config.json to a multiple (default 128)",
    )
    config.set_defaults(verb=_config)


def _add_verify(verbs: Any, common: argparse.ArgumentParser) -> None:
    verify = verbs.add_parser(
        "verify", parents=[common], help="compare two checkpoints of any formats, bit by bit"
    )
    verify.add_argument("a", metavar="A", type=Path)
    verify.add_argument("b", metavar="B", type=Path)
    verify.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="true vocabulary, if A or B does not tell it"
    )
    verify.set_defaults(verb=_verify)


def _add_conversion(
    verbs: Any,
    common: argparse.ArgumentParser,
    name: str,
    verb: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, parents=[common], help=text, description=text)
    parser.add_argument(
        "src", metavar="SRC", type=Path, help="model directory, checkpoint directory or one iteration"
    )
    parser.add_argument(
        "dst", metavar="DST", type=Path, help="directory to write; must not hold anything yet"
    )
    parser.add_argument("--to", choices=("hf", "torch_dist"), required=True, help="format to write")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="carry the tokenizer in DIR along")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="cast weights (default: as stored)")
    parser.add_argument(
        "--shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="largest file (default 5GB)"
    )
    parser.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="true vocabulary, if SRC does not tell it"
    )
    parser.add_argument(
        "--vocab-divisor",
        type=_positive,
        default=128,
        metavar="N",
        help="torch_dist pads the vocabulary to a multiple (default 128)",
    )
    parser.add_argument(
        "--layers",
        choices=("auto", "stacked", "per-layer"),
        default="auto",
        help="how torch_dist stores layers; per-layer if the run's moe_layer_freq is a list (default auto)",
    )
    parser.add_argument(
        "--family", metavar="NAME", help="family of a Megatron checkpoint, where several have its arguments"
    )
    parser.set_defaults(verb=verb)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _size(text: str) -> int:
    """Read `5GB`, `500MB` or a number of bytes."""
    number = text.upper().rstrip("KMGTB")
    unit = text.upper()[len(number) :]
    try:
        value = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text}: write a size such as 5GB or 500MB") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least one byte")
    return value


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar in bytes with rate and time left; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _make_plan(arguments: argparse.Namespace) -> Plan:
    from flagscale_convert.plan import make_plan

    return make_plan(
        arguments.src,
        arguments.dst,
        to=arguments.to,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
        vocab_size=arguments.vocab_size,
        vocab_divisor=arguments.vocab_divisor,
        layers=arguments.layers,
        family=arguments.family,
    )


def _plan(arguments: argparse.Namespace) -> int:
    plan = _make_plan(arguments)
    if arguments.json:
        _print_json(plan.to_dict())
    else:
        _print_plan(plan)
    if plan.problems:
        from flagscale_convert.model import require_fit

        require_fit(plan.model, plan.source)
    return 0


def _print_plan(plan: Plan) -> None:
    from flagscale_convert.tensors import format_bytes

    print(f"from   {plan.source}")
    print(f"to     {plan.destination} ({plan.to})")
    print(f"model  {plan.architecture.family}, {plan.num_parameters:,} parameters")
    facts = plan.to_dict()
    print(
        f"write  {format_bytes(plan.total_bytes)} in {len(facts['files'])} files, {facts['num_tensors']}"
        " tensors"
    )
    for path, size in facts["files"].items():
        print(f"       {format_bytes(size):>9}  {path}")
    for note in plan.notes:
        print(f"note   {note}")


def _run(arguments: argparse.Namespace) -> int:
    from flagscale_convert.execution import convert
    from flagscale_convert.tensors import format_bytes

    plan = _make_plan(arguments)
    for note in plan.notes if not arguments.json else ():
        print(f"note: {note}", file=sys.stderr)
    try:
        with _progress("convert") as progress:
            report = convert(
                plan, progress=progress, workers=arguments.workers, overwrite=arguments.overwrite
            )
    except KeyboardInterrupt:
        print("stopped: what is whole was kept, run the same command again to finish", file=sys.stderr)
        raise
    if arguments.json:
        _print_json(report.to_dict())
        return 0
    rate = format_bytes(report.written_bytes / max(report.seconds, 1e-9))
    resumed = f" ({format_bytes(report.resumed_bytes)} were there already)" if report.resumed_bytes else ""
    print(
        f"{report.destination}: {report.num_parameters:,} parameters, {format_bytes(report.written_bytes)} in"
        f" {report.seconds:.1f} s ({rate}/s){resumed}"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from flagscale_convert.inspection import inspect

    found = inspect(arguments.path, values=arguments.values)
    if arguments.json:
        _print_json(found.to_dict())
    else:
        _print_inspection(found)
    return 0


def _print_inspection(found: Inspection) -> None:
    from flagscale_convert.tensors import format_bytes

    dtypes = ", ".join(f"{count} x {dtype}" for dtype, count in found.dtypes.items())
    print(f"path        {found.path}")
    print(f"format      {found.format} ({found.dialect})")
    if found.iteration is not None:
        print(f"iteration   {found.iteration}")
    print(f"family      {found.family or 'none that can be converted'}")
    print(f"parameters  {found.num_parameters:,}")
    print(f"tensors     {found.num_tensors}, {format_bytes(found.model_bytes)} ({dtypes})")
    if found.optimizer_tensors:
        print(f"optimizer   {found.optimizer_tensors} tensors, {format_bytes(found.optimizer_bytes)}")
    for name, value in found.architecture.items():
        if name != "family":
            print(f"  {name:<18} {value}")
    for note in found.notes:
        print(f"note        {note}")
    for suspicion in found.suspicions:
        print(f"suspicious  {suspicion}")


def _config(arguments: argparse.Namespace) -> int:
    from flagscale_convert.configuration import config

    found = config(
        arguments.src,
        to=arguments.to,
        megatron=arguments.megatron,
        vocab_size=arguments.vocab_size,
        vocab_divisor=arguments.vocab_divisor,
    )
    if arguments.json:
        _print_json({"text": found.text, "notes": list(found.notes)})
        return 0
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(found.text, end="")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from flagscale_convert.tensors import format_bytes
    from flagscale_convert.verification import verify

    with _progress("verify") as progress:
        report = verify(arguments.a, arguments.b, vocab_size=arguments.vocab_size, progress=progress)
    if arguments.json:
        _print_json(report.to_dict())
    elif report.is_equal:
        print(f"equal: {report.num_tensors} tensors, {format_bytes(report.compared_bytes)}, every bit")
    else:
        print(f"different: {len(report.differences)} findings in {report.num_tensors} tensors compared")
        for found in report.differences[:10]:
            print(f"  {found}")
        if len(report.differences) > 10:
            print(f"  and {len(report.differences) - 10} more")
    return 0 if report.is_equal else _MISMATCH


def _families(arguments: argparse.Namespace) -> int:
    from flagscale_convert.families import FAMILIES

    if arguments.json:
        _print_json(
            {
                family.name: {
                    "architecture": family.architecture,
                    "models": family.models,
                    "proven_by": family.proven_by,
                }
                for family in FAMILIES.values()
            }
        )
        return 0
    for family in FAMILIES.values():
        print(f"{family.name:<11} {family.architecture:<21} {family.models}")
        print(f"{'':<11} proven by {family.proven_by}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
