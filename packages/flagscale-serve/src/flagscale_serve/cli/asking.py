"""The verbs that ask a model: `chat` and `generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flagscale_serve.cli.output import add, finite, interrupt_on_signals, say, word

__all__ = ["add_chat", "add_generate"]

_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def add_chat(verbs: Any) -> None:
    """Add `chat`."""
    parser = add(verbs, "chat", _chat, "ask a served model one thing; the answer goes to standard output")
    parser.add_argument(
        "target",
        nargs="?",
        type=word,
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
    parser.add_argument("--temperature", type=finite, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--api-key", help="the server's key (default: $OPENAI_API_KEY)")


def add_generate(verbs: Any) -> None:
    """Add `generate`."""
    parser = add(verbs, "generate", _generate, "answer a file of requests, one JSON object per line")
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help='lines {"prompt": ...} or {"messages": ...}'
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="answers; an earlier file is completed")
    parser.add_argument(
        "target",
        nargs="?",
        type=word,
        metavar="TARGET",
        help="run, address, or a file, recipe or model, which is served meanwhile (default: the only run)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of the file")
    parser.add_argument("--model", help="which model, when several are served")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="at a time (default: 64)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    parser.add_argument("--temperature", type=finite, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random choices")
    parser.add_argument("--system", help="instructions in front of each conversation")
    parser.add_argument("--api-key", help="the server's key (default: $OPENAI_API_KEY)")
    parser.add_argument("--engine", metavar="NAME", help="of a service that is started for this")
    parser.add_argument("--python", help="interpreter that has the engine")


def _chat(arguments: argparse.Namespace) -> int:
    from flagscale_serve.chat import chat
    from flagscale_serve.errors import InvalidService

    message = arguments.message
    if message is None:
        if sys.stdin.isatty():
            raise InvalidService("message: nothing to say: give it with -m 'TEXT', or pipe it in")
        try:
            message = sys.stdin.read()
        except UnicodeDecodeError:
            raise InvalidService("message: standard input is not UTF-8 text: write it in UTF-8") from None
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


def _shown(piece: str) -> str:
    """Keep what a model says from steering the terminal; elsewhere every character passes."""
    if not sys.stdout.isatty():
        return piece
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _UNPRINTABLE for letter in piece)


def _generate(arguments: argparse.Namespace) -> int:
    from flagscale_serve.foreground import batch_progress
    from flagscale_serve.generate import Sampling, generate
    from flagscale_serve.runs import Options

    interrupt_on_signals()
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
    say(f"{ended.done} of {ended.total} answered{kept}; {rate}")
    if ended.failed:
        say(f"{ended.failed} failed: their lines in {arguments.output} say why; run it again to retry them")
        return 4
    return 0
