"""The verb `adapter`: low-rank adapters for peft, or added to the model they adapt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flagscale_convert.cli.output import print_json, show_progress, write_events

__all__ = ["add_adapter"]


def add_adapter(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
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
        with write_events() if arguments.json else show_progress("merge") as progress:
            merged = merge_adapter(arguments.src, arguments.dst, progress=progress, **places)
        if arguments.json:
            print_json(merged.to_dict())
        else:
            print(f"{merged.destination}: {merged.num_parameters:,} parameters, the adapters added")
        return 0
    made = export_adapter(arguments.src, arguments.dst, **places)
    if arguments.json:
        print_json(made.to_dict())
    else:
        print(
            f"{made.destination}: adapters of rank {made.rank} for {', '.join(made.target_modules)}, "
            f"{made.num_parameters:,} parameters"
        )
    return 0
