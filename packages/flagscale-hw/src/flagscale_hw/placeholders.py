"""Placeholders: what a plan leaves open because only the host, or the launch, can know it.

`{port:NAME}` is a leased port, `{run_dir}` the run directory on the host, `{node_rank}` the number of the
host in the plan, `{own_address}` how other hosts reach it and `{address:TARGET}` how they reach another. They
are replaced in argv, env values, cwd, texts of files and probe URLs. Every other brace is left alone, so JSON
may stand in an argument; doubled braces, `{{run_dir}}`, mean the text `{run_dir}` itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

__all__ = ["literal", "pieces", "placeholders", "substitute"]

_NAMES = r"port:[a-z0-9_-]+|run_dir|node_rank|own_address|address:[A-Za-z0-9_.:\[\]-]+"
_ANY = re.compile(rf"\{{({_NAMES})\}}")
_FOUND = re.compile(rf"\{{\{{(?P<literal>{_NAMES})\}}\}}|\{{(?P<open>{_NAMES})\}}")


def placeholders(text: str) -> Iterator[tuple[str, str]]:
    """Yield kind and name of every placeholder: `("port", "http")`, `("run_dir", "")`."""
    if "{" in text:
        for found in _FOUND.finditer(text):
            if found["open"]:
                yield _split(found["open"])


def pieces(text: str) -> Iterator[str | tuple[str, str]]:
    """Yield the text in order: plain parts as strings, placeholders as kind and name."""
    end = 0
    for found in _FOUND.finditer(text):
        if found.start() > end:
            yield text[end : found.start()]
        yield f"{{{found['literal']}}}" if found["literal"] else _split(found["open"])
        end = found.end()
    if end < len(text):
        yield text[end:]


def substitute(text: str, value_of: Callable[[str, str], str | None], *, is_last: bool = True) -> str:
    """Replace placeholders.

    Args:
        text: what to fill.
        value_of: told kind and name; None leaves the placeholder for somebody who knows.
        is_last: turn doubled braces into single ones; only the last of several passes may.
    """
    if "{" not in text:
        return text

    def replace(found: re.Match[str]) -> str:
        if found["literal"]:
            return f"{{{found['literal']}}}" if is_last else found[0]
        value = value_of(*_split(found["open"]))
        return found[0] if value is None else value

    return _FOUND.sub(replace, text)


def literal(text: str) -> str:
    """Escape a text of the user, so that nothing in it is taken for a placeholder."""
    return _ANY.sub(r"{{\1}}", text)


def _split(name: str) -> tuple[str, str]:
    kind, _, rest = name.partition(":")
    return kind, rest
