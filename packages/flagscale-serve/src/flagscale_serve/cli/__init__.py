"""The command line: arguments, printing and exit codes; every verb is one function of the package."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from flagscale_serve.__about__ import __version__
from flagscale_serve.cli.asking import add_chat, add_generate
from flagscale_serve.cli.looking import add_looking
from flagscale_serve.cli.measuring import add_bench, add_tune
from flagscale_serve.cli.starting import add_plan, add_run

__all__ = ["main"]

_SYNONYMS = {
    "serve": "flagscale-serve run",
    "start": "flagscale-serve run",
    "ps": "flagscale-serve list",
    "doctor": "flagscale-hw doctor",
    "explain": "flagscale-serve plan --explain",
}

_EXAMPLES = """\
examples:
  flagscale-serve run MODEL_DIR                    serve a model here, until Ctrl-C
  flagscale-serve run MODEL_DIR max_model_len=4096 with options of the engine
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

    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    arguments = command.parse(parser, argv)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    return verb(arguments)


class _Parser(argparse.ArgumentParser):
    """Tells people who come from `vllm serve` and FlagScale's `run.py` how things are written here."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and a message."""
        wrong = re.fullmatch(r"unrecognized arguments: --?([a-z][\w-]*)\b.*", message)
        unknown = re.match(r"argument COMMAND: invalid choice: '(\w+)'", message)
        if wrong is not None and wrong[1] in ("config-path", "config-name"):
            message += ": the file itself is what to give: `flagscale-serve run CONFIG_PATH/CONFIG_NAME.yaml`"
        elif wrong is not None:
            option = wrong[1].replace("-", "_")
            message += (
                f": options of an engine are written {option}=VALUE behind a model, and "
                f"++serve.0.engine_args.{option}=VALUE behind a file"
            )
        elif unknown is not None and unknown[1] in _SYNONYMS:
            message = f"no command {unknown[1]!r}: use `{_SYNONYMS[unknown[1]]}`"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flagscale-serve",
        description="Serve language models behind an OpenAI-compatible address.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flagscale-serve {__version__}")
    verbs = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    add_plan(verbs)
    add_run(verbs)
    add_looking(verbs)
    add_chat(verbs)
    add_generate(verbs)
    add_bench(verbs)
    add_tune(verbs)
    return parser
