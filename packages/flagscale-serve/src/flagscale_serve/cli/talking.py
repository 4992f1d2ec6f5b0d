"""A conversation on a terminal: lines in, answers out, until the end of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from flagscale_serve.chat import Conversation
from flagscale_serve.errors import InvalidService, RequestFailed

__all__ = ["talk"]

_BLOCK = '"""'
_MAX_HISTORY = 1000
_HELP = """\
/system TEXT   give the model instructions; without TEXT, take them back
/clear         forget what was said
/retry         ask the last question again
/help          this
/quit          leave; so does Ctrl-D
Ctrl-C breaks an answer off. A line that ends with \\ goes on in the next, as does everything between
two \"\"\"."""


def talk(conversation: Conversation, show: Callable[[str], None], *, history: Path) -> None:
    """Read questions and show the answers.

    Args:
        conversation: with whom.
        show: prints a piece of an answer, or a line of ours, without a line end of its own.
        history: file of the lines of earlier conversations, for the arrow keys.
    """
    show(f"{conversation.server.model or conversation.server.url}; /help tells the commands\n")
    with _line_editing(history):
        for asked in _questions(show):
            word, _, rest = asked.partition(" ")
            if word == "/quit":
                return
            if word.startswith("/") and "\n" not in asked:
                question = _command(conversation, word, rest.strip(), show)
            else:
                question = asked
            if question is not None:
                _answer(conversation, question, show)


def _questions(show: Callable[[str], None]) -> Iterator[str]:
    """Yield what a person says, several lines of it where they belong together."""
    while True:
        try:
            text = _question()
        except EOFError:
            show("\n")
            return
        except KeyboardInterrupt:
            show("\n(Ctrl-D leaves)\n")
            continue
        if text.strip():
            yield text


def _question() -> str:
    line = input("> ")
    if line.startswith(_BLOCK):
        lines = [line.removeprefix(_BLOCK)]
        while not lines[-1].endswith(_BLOCK):
            lines.append(input(". "))
        return "\n".join(lines).removesuffix(_BLOCK).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(input(". "))
    return "\n".join(lines)


def _command(conversation: Conversation, word: str, rest: str, show: Callable[[str], None]) -> str | None:
    """Do what a line with a slash asks for; return the question that it asks, if any."""
    if word == "/system":
        conversation.system = rest or None
    elif word == "/clear":
        conversation.said.clear()
    elif word == "/retry":
        if conversation.said:
            question = conversation.said[-2]["content"]
            del conversation.said[-2:]
            return question
        show("nothing was asked yet\n")
    else:
        show(f"{_HELP}\n" if word == "/help" else f"{word}: no such command\n{_HELP}\n")
    return None


def _answer(conversation: Conversation, question: str, show: Callable[[str], None]) -> None:
    try:
        with closing(conversation.say(question)) as pieces:
            for piece in pieces:
                show(piece)
    except KeyboardInterrupt:
        show(" (broken off)")
    except (InvalidService, RequestFailed) as error:
        show(f"error: {error}")  # the next question may be a better one
    show("\n")


@contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Let the arrow keys work, and remember lines; a Python without readline goes without."""
    try:
        import readline
    except ImportError:
        yield
        return
    with suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(_MAX_HISTORY)
            readline.write_history_file(history)  # readable by its owner alone
