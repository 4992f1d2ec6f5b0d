"""The verbs that convert: `plan`, `run`, `reshard`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_convert.cli.output import positive, print_json, show_progress, write_events

if TYPE_CHECKING:
    from flagscale_convert.plan import Plan

__all__ = ["add_conversions"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_conversions(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command line's."""
    _add_conversion(verbs, common, "plan", _plan, "show what `run` would write, and write nothing")
    run = _add_conversion(
        verbs, common, "run", _run, "convert; run again to finish an interrupted conversion"
    )
    reshard = _add_conversion(
        verbs, common, "reshard", _reshard, "divide a Megatron checkpoint for other parallel sizes"
    )
    for writer in (run, reshard):
        writer.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")
        writer.add_argument("--workers", type=positive, default=2, metavar="N", help="threads (default 2)")
        writer.add_argument(
            "--shard",
            type=_shard,
            default=(1, 1),
            metavar="K/N",
            help="write part K of N, for N hosts that share DST; the last to finish puts all in place",
        )


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
        "--vocab-size", type=positive, metavar="N", help="true vocabulary, if SRC does not tell it"
    )
    parser.add_argument(
        "--vocab-divisor",
        type=positive,
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
        group.add_argument(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=text)
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
        choices=("0.16", "0.17", "0.18", "0.19"),
        default="0.19",
        help="megatron-core that will load it (default 0.19; newer ones load what older ones do)",
    )


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
        print_json(plan.to_dict())
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
        with write_events() if arguments.json else show_progress("convert") as progress:
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
        print_json(report.to_dict())
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
