"""The verbs that tell and write nothing: `inspect`, `verify`, `config`, `families`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_convert.cli.output import positive, print_json, show_progress

if TYPE_CHECKING:
    from flagscale_convert.inspection import Inspection
    from flagscale_convert.verification import VerifyReport

__all__ = ["add_config", "add_families", "add_inspect", "add_verify"]

_MISMATCH = 4


def add_inspect(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add `inspect`."""
    inspect = verbs.add_parser(
        "inspect", parents=[common], help="say what a checkpoint is and whether it is whole"
    )
    inspect.add_argument("path", metavar="PATH", type=Path)
    inspect.add_argument("--values", action="store_true", help="read the weights too: NaN, infinity, zeros")
    inspect.add_argument(
        "--hashes", action="store_true", help="check every file against the manifest beside it"
    )
    inspect.set_defaults(verb=_inspect)


def add_config(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add `config`."""
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
        "--vocab-size", type=positive, metavar="N", help="true vocabulary, if SRC does not tell it"
    )
    config.add_argument(
        "--vocab-divisor",
        type=positive,
        default=128,
        metavar="N",
        help="pad the vocabulary of config.json to a multiple (default 128)",
    )
    config.set_defaults(verb=_config)


def add_verify(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add `verify`."""
    verify = verbs.add_parser(
        "verify", parents=[common], help="compare two checkpoints of any formats and parallel layouts"
    )
    verify.add_argument("a", metavar="A", type=Path)
    verify.add_argument("b", metavar="B", type=Path)
    verify.add_argument(
        "--vocab-size", type=positive, metavar="N", help="true vocabulary, if A or B does not tell it"
    )
    verify.add_argument(
        "--mode",
        choices=("cover", "bitwise", "stats", "logits"),
        default="bitwise",
        help="cover: names, types, shapes; bitwise (default); stats: values, for casts; logits: what both"
        " compute, run by transformers",
    )
    verify.add_argument("--layers", type=positive, metavar="N", help="compare only the first N layers")
    verify.set_defaults(verb=_verify)


def add_families(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add `families`."""
    families = verbs.add_parser("families", parents=[common], help="list what can be converted")
    families.set_defaults(verb=_families)


def _inspect(arguments: argparse.Namespace) -> int:
    from flagscale_convert.inspection import inspect

    found = inspect(arguments.path, values=arguments.values, hashes=arguments.hashes)
    if arguments.json:
        print_json(found.to_dict())
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
        print_json({"text": found.text, "notes": list(found.notes)})
        return 0
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(found.text, end="")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from flagscale_convert.verification import verify

    with show_progress("verify") as progress:
        report = verify(
            arguments.a,
            arguments.b,
            mode=arguments.mode,
            vocab_size=arguments.vocab_size,
            num_layers=arguments.layers,
            progress=progress,
        )
    if arguments.json:
        print_json(report.to_dict())
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
        print_json(
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
        print(f"{family.name:<18} {family.architecture:<42} {family.models}")
        print(f"{'':<18} proven by {family.proven_by}")
    return 0
