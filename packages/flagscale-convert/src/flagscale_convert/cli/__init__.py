"""The command line. Everything heavy is imported inside a verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from flagscale_convert.__about__ import __version__
from flagscale_convert.cli.adapter import add_adapter
from flagscale_convert.cli.conversion import add_conversions
from flagscale_convert.cli.inquiry import add_config, add_families, add_inspect, add_verify

__all__ = ["main"]

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
    add_inspect(verbs, common)
    add_conversions(verbs, common)
    add_verify(verbs, common)
    add_config(verbs, common)
    add_adapter(verbs, common)
    add_families(verbs, common)
    return parser
