"""The command line. Everything heavy is imported inside a verb."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_convert.__about__ import __version__

if TYPE_CHECKING:
    from flagscale_convert.inspection import Inspection
    from flagscale_convert.plan import Plan
    from flagscale_convert.verification import VerifyReport

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
    reshard = _add_conversion(
        verbs, common, "reshard", _reshard, "divide a Megatron checkpoint for other parallel sizes"
    )
    for writer in (run, reshard):
        writer.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")
        writer.add_argument("--workers", type=_positive, default=2, metavar="N", help="threads (default 2)")
        writer.add_argument(
            "--shard",
            type=_shard,
            default=(1, 1),
            metavar="K/N",
            help="write part K of N, for N hosts that share DST; the last to finish puts all in place",
        )
    _add_verify(verbs, common)
    _add_config(verbs, common)
    _add_adapter(verbs, common)
    families = verbs.add_parser("families", parents=[common], help="list what can be converted")
    families.set_defaults(verb=_families)
    return parser


def _add_inspect(verbs: Any, common: argparse.ArgumentParser) -> None:
    inspect = verbs.add_parser(
        "inspect", parents=[common], help="say what a checkpoint is and whether it is whole"
    )
    inspect.add_argument("path", metavar="PATH", type=Path)
    inspect.add_argument("--values", action="store_true", help="read the weights too: NaN, infinity, zeros")
    inspect.add_argument(
        "--hashes", action="store_true", help="check every file against the manifest beside it"
    )
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


def _add_adapter(verbs: Any, common: argparse.ArgumentParser) -> None:
    text = "write low-rank adapters for peft, or the model they make"
    adapter = verbs.add_parser("adapter", parents=[common], help=text, description=text)
    adapter.add_argument(
        "src", metavar="SRC", type=Path, help="checkpoint that flagscale-train saved with peft_type: lora"
    )
    adapter.add_argument("dst", metavar="DST", type=Path, help="directory to write")
    adapter.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="Hugging Face model that was adapted"
    )
    adapter.add_argument("--merge", action="store_true", help="write the whole model with the adapters added")
    adapter.add_argument("--overwrite", action="store_true", help="replace what is in DST")
    adapter.set_defaults(verb=_adapter)


def _adapter(arguments: argparse.Namespace) -> int:
    from flagscale_convert.adapter import export_adapter, merge_adapter

    places = {"base": arguments.base, "overwrite": arguments.overwrite}
    if arguments.merge:
        with _events() if arguments.json else _progress("merge") as progress:
            merged = merge_adapter(arguments.src, arguments.dst, progress=progress, **places)
        if arguments.json:
            _print_json(merged.to_dict())
        else:
            print(f"{merged.destination}: {merged.num_parameters:,} parameters, the adapters added")
        return 0
    made = export_adapter(arguments.src, arguments.dst, **places)
    if arguments.json:
        _print_json(made.to_dict())
    else:
        print(
            f"{made.destination}: adapters of rank {made.rank} for {', '.join(made.target_modules)}, "
            f"{made.num_parameters:,} parameters"
        )
    return 0


def _add_verify(verbs: Any, common: argparse.ArgumentParser) -> None:
    verify = verbs.add_parser(
        "verify", parents=[common], help="compare two checkpoints of any formats and parallel layouts"
    )
    verify.add_argument("a", metavar="A", type=Path)
    verify.add_argument("b", metavar="B", type=Path)
    verify.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="true vocabulary, if A or B does not tell it"
    )
    verify.add_argument(
        "--mode",
        choices=("cover", "bitwise", "stats", "logits"),
        default="bitwise",
        help="cover: names, types, shapes; bitwise (default); stats: values, for casts; logits: what both"
        " compute, run by transformers",
    )
    verify.add_argument("--layers", type=_positive, metavar="N", help="compare only the first N layers")
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
    if name == "reshard":
        parser.add_argument(
            "--to", choices=("torch_dist", "torch"), default="torch_dist", help="format (default torch_dist)"
        )
    else:
        parser.add_argument(
            "--to",
            choices=("hf", "torch_dist", "torch"),
            required=True,
            help="format to write; torch is Megatron's of one file per rank",
        )
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
        metavar="N",
        help="Megatron pads the vocabulary to a multiple of N times the tensor-parallel size (default: as"
        " SRC, else 128)",
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
    _add_megatron(parser)
    parser.set_defaults(verb=verb)
    return parser


_SIZES = {
    "tensor_model_parallel_size": "ranks that share each layer",
    "pipeline_model_parallel_size": "stages",
    "expert_model_parallel_size": "groups of experts",
    "expert_tensor_parallel_size": "ranks that share each expert (default: as tensor)",
    "virtual_pipeline_model_parallel_size": "chunks of each stage",
    "num_layers_in_first_pipeline_stage": "if not as many as in the others",
    "num_layers_in_last_pipeline_stage": "if not as many as in the others",
}


def _add_megatron(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's own options for parallel sizes and flavours, under Megatron's names."""
    group = parser.add_argument_group(
        "Megatron, under its own names",
        "sizes matter to --to torch; to torch_dist for vocabulary padding only",
    )
    for name, text in _SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="N", help=text)
    group.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="whose layers will load --to torch (default transformer_engine)",
    )
    group.add_argument(
        "--moe-grouped-gemm", action="store_true", help="--to torch will be loaded with that option"
    )
    group.add_argument(
        "--megatron-version",
        choices=("0.16", "0.19"),
        default="0.19",
        help="oldest megatron-core to load --to torch_dist (default 0.19)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: write K/N, with K from 1 to N")
    return int(number), int(count)


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


@contextmanager
def _events() -> Iterator[Callable[[int, int], None]]:
    """Write progress to stderr as a line of JSON each second and at the end."""
    started = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < 1 and done != total:
            return
        told = now
        rate = done / max(now - started, 1e-9)
        left = round((total - done) / rate, 1) if rate else None
        event = {"event": "progress", "done_bytes": done, "total_bytes": total}
        print(json.dumps({**event, "bytes_per_second": round(rate), "seconds_left": left}), file=sys.stderr)

    yield tell


def _make_plan(arguments: argparse.Namespace) -> Plan:
    from flagscale_convert.parallel import ParallelLayout
    from flagscale_convert.plan import make_plan

    sizes = {name: getattr(arguments, name) for name in _SIZES if getattr(arguments, name) is not None}
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
        parallel=ParallelLayout(**sizes) if sizes else None,
        transformer_impl=arguments.transformer_impl,
        moe_grouped_gemm=arguments.moe_grouped_gemm,
        megatron_version=arguments.megatron_version,
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
    return _carry_out(arguments, _make_plan(arguments))


def _reshard(arguments: argparse.Namespace) -> int:
    from flagscale_convert.errors import Unsupported

    plan = _make_plan(arguments)
    if not plan.model.is_megatron:
        raise Unsupported(
            f"{arguments.src}: is a Hugging Face model, which has no ranks: use run --to {plan.to}"
        )
    return _carry_out(arguments, plan)


def _carry_out(arguments: argparse.Namespace, plan: Plan) -> int:
    from flagscale_convert.execution import convert
    from flagscale_convert.tensors import format_bytes

    for note in plan.notes if not arguments.json else ():
        print(f"note: {note}", file=sys.stderr)
    try:
        with _events() if arguments.json else _progress("convert") as progress:
            report = convert(
                plan,
                progress=progress,
                workers=arguments.workers,
                overwrite=arguments.overwrite,
                shard=arguments.shard,
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
    if report.missing:
        print(f"{len(report.missing)} files are left to other shards; {report.missing[0]} is one of them")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from flagscale_convert.inspection import inspect

    found = inspect(arguments.path, values=arguments.values, hashes=arguments.hashes)
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
    if found.published is not None:
        print(f"published   {found.published[1]:,} ({found.published[0]})")
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
    from flagscale_convert.verification import verify

    with _progress("verify") as progress:
        report = verify(
            arguments.a,
            arguments.b,
            mode=arguments.mode,
            vocab_size=arguments.vocab_size,
            num_layers=arguments.layers,
            progress=progress,
        )
    if arguments.json:
        _print_json(report.to_dict())
    elif report.is_equal:
        print(f"equal: {report.num_tensors} tensors, {_how_equal(report)}")
    else:
        print(f"different: {len(report.differences)} findings in {report.num_tensors} tensors compared")
        for found in report.differences[:10]:
            print(f"  {found}")
        if len(report.differences) > 10:
            print(f"  and {len(report.differences) - 10} more")
    return 0 if report.is_equal else _MISMATCH


def _how_equal(report: VerifyReport) -> str:
    from flagscale_convert.tensors import format_bytes

    if report.mode == "cover":
        return "names, types and shapes"
    if report.logits is not None:
        return f"logits within {report.logits[0]:.1e} of {report.logits[1]:.1f}"
    if report.mode == "stats":
        apart = max((entry.max_abs for entry in report.stats), default=0.0)
        return f"{format_bytes(report.compared_bytes)}, within rounding (largest difference {apart:.3g})"
    return f"{format_bytes(report.compared_bytes)}, every bit"


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
