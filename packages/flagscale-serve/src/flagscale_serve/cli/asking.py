"""The verbs that ask a model: `chat` and `generate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flagscale_serve.cli.output import (
    OVERRIDES,
    add,
    add_engine,
    engine_options,
    finite,
    interrupt_on_signals,
    say,
    word,
)

__all__ = ["add_chat", "add_generate"]

_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def add_chat(verbs: Any) -> None:
    """Add `chat`."""
    parser = add(verbs, "chat", _chat, "ask a served model, once or in a conversation")
    parser.add_argument(
        "target",
        nargs="?",
        type=word,
        metavar="RUN_OR_URL",
        help="run, file, recipe, model, or address (default: the only run)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument(
        "-m",
        "--message",
        metavar="TEXT",
        help="what to say (default: a conversation on a terminal, else what standard input has)",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions in front of the message")
    parser.add_argument("--complete", action="store_true", help="continue plain text instead of answering")
    parser.add_argument("--model", metavar="NAME", help="which model, when several are served")
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="length at most (default: 512)"
    )
    parser.add_argument("--temperature", type=finite, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: $OPENAI_API_KEY)")


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
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--model", metavar="NAME", help="which model, when several are served")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="at a time (default: 64)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    parser.add_argument("--temperature", type=finite, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random choices")
    parser.add_argument("--system", metavar="TEXT", help="instructions in front of each conversation")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: $OPENAI_API_KEY)")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def _chat(arguments: argparse.Namespace) -> int:
    from flagscale_serve.chat import chat
    from flagscale_serve.errors import InvalidService

    message = arguments.message
    if message is None:
        if sys.stdin.isatty():
            if arguments.complete:
                raise InvalidService("message: nothing to go on from: give it with -m 'TEXT', or pipe it in")
            return _talk(arguments)
        try:
            message = sys.stdin.read()
        except UnicodeDecodeError:
            raise InvalidService("message: standard input is not UTF-8 text: write it in UTF-8") from None
    for piece in chat(
        arguments.target,
        message,
        system=arguments.system,
        complete=arguments.complete,
        overrides=arguments.overrides,
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        api_key=arguments.api_key,
    ):
        print(_shown(piece), end="", flush=True)
    print()
    return 0


def _talk(arguments: argparse.Namespace) -> int:
    from flagscale_serve.chat import Conversation, find_server
    from flagscale_serve.cli.talking import talk
    from flagscale_serve.targets import state_dir

    conversation = Conversation(
        find_server(arguments.target, arguments.model, arguments.overrides),
        system=arguments.system,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        api_key=arguments.api_key,
    )
    talk(
        conversation,
        lambda text: print(_shown(text), end="", flush=True),
        history=state_dir() / "chat_history",
    )
    return 0


def _shown(piece: str) -> str:
    """Keep what a model says from steering the terminal; elsewhere every character passes."""
    if not sys.stdout.isatty():
        return piece
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _UNPRINTABLE for letter in piece)


def _generate(arguments: argparse.Namespace) -> int:
    from flagscale_serve.foreground import batch_progress
    from flagscale_serve.generate import Sampling, generate

    interrupt_on_signals()
    with batch_progress() as tell:
        ended = generate(
            arguments.target,
            arguments.input,
            arguments.output,
            overrides=tuple(arguments.overrides),
            options=engine_options(arguments),
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
    if arguments.json:
        print(json.dumps(ended.to_dict(), indent=2))
    kept = f", {ended.kept} of them before" if ended.kept else ""
    rate = f"{ended.tokens} tokens, {ended.tokens_per_s:.1f} tokens/s"
    say(f"{ended.done} of {ended.total} answered{kept}; {rate}")
    if ended.failed:
        say(f"{ended.failed} failed: their lines in {arguments.output} say why; run it again to retry them")
        return 4
    return 0
