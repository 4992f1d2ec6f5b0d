"""Secrets, kept out of everything that is printed or recorded.

Two ways to know one: by the key it stands under (`hf_token`), and by its looks (`https://me:pw@host`,
`Bearer ...`, `ghp_...`). What does not live here: the launcher's masking of environments (`flagscale_hw`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["MASK", "is_secret", "masked", "masked_line", "masked_override", "masked_text"]

MASK = "***"

_KEYS = "access|account|api|auth|encryption|license|private|secret|service|session|shared|signing|ssh"
_SECRET = re.compile(
    rf"(^|[_-])(({_KEYS})[_-]?keys?|secrets?|credentials?|tokens?|authorization|bearer|cookies?|jwt|pat)"
    r"([_-]?key)?$"
    # Words that are glued to others: PGPASSWORD, apikey, clientsecret.
    r"|(passwords?|passwd|passphrase|passcode|apikeys?|clientsecret|accesskey|secretkey)$"
    r"|[_-](pwd|pass)$",
    re.IGNORECASE,
)

# `pad_token` is a word of a vocabulary and `max_tokens` a number; `hf_token` opens somebody's account.
_VOCABULARY = re.compile(
    r"(^|[_-])(ambiguous[_-]pad|audio|bos|cls|end|eod|eos|first|image|last|mask|middle|pad|prefix|sep|special|start"
    r"|stop|suffix|unk|video|vision|vocab)[_-]tokens?$",
    re.IGNORECASE,
)
_COUNT = re.compile(
    r"(^|[_-])(max|min|num|batch|batched|per|prompt|spec|total|draft|speculative|log|return|sync)[a-z_-]*[_-]tokens?$",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SHORTEST = 6
"""Letters a secret must have to be looked for in other values; shorter ones are ordinary words too."""

_URL = re.compile(r"(?<=://)([^\s/@:'\"]*):([^\s/'\"]+)@")
_URL_TOKEN = re.compile(r"(?<=https://)[^\s/@:'\"]+@")
_BEARER = re.compile(r"\b(bearer|basic|token)(\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
_VALUE = r"\"[^\"]*\"|'[^']*'|[^\s,;&{}\[\])\"']+"
_PAIR = re.compile(
    rf"(?P<key>[\w.-]*\w)(?P<sign>[\"']?\s?[:=]\s?)(?P<value>(?:bearer\s+|basic\s+)?(?:{_VALUE}))", re.I
)
_FLAG = re.compile(rf"(?P<key>(?<![\w-])--?[\w-]+)(?P<sign>\s+)(?P<value>(?!-)(?:{_VALUE}))")
_YAML_KEY = re.compile(r"(?P<key>[\w.-]+)[\"']?\s*:(?=\s|$)")
_BLOCK = re.compile(r"^\s*(-\s+)?[\"']?(?P<key>[\w.-]+)[\"']?\s*:\s*([|>][-+0-9]*\s*|[&!]\S*\s*)?(#.*)?$")


@functools.lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Whether a value under this key must not be shown: keys, tokens of services, secrets, passwords."""
    name = _CAMEL.sub("_", key.strip().lstrip("-").rpartition(".")[2])
    is_word = _VOCABULARY.search(name) or _COUNT.search(name) or name == "allow_credentials"
    return bool(_SECRET.search(name)) and not is_word


def masked(tree: Any, key: str = "") -> Any:
    """Return a copy of plain data with every secret replaced by `***`; null stays null.

    A secret is also masked where its value turns up under other keys, in URLs and in command lines.
    """
    known = sorted({text for text in _secrets(tree, key) if len(text) >= _SHORTEST}, key=len, reverse=True)
    return _masked(tree, key, tuple(known))


def _masked(tree: Any, key: str, known: tuple[str, ...]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _masked(value, str(name), known) for name, value in tree.items()}
    if key and is_secret(key) and tree is not None and not isinstance(tree, bool):
        return MASK
    if isinstance(tree, (list, tuple)):
        before = ("", *tree)
        return [
            MASK if _is_secret_flag(flag) and isinstance(item, str) else _masked(item, "", known)
            for flag, item in zip(before, tree, strict=False)
        ]
    if not isinstance(tree, str):
        return tree
    for text in known:
        tree = tree.replace(text, MASK)
    return masked_text(tree)


def _is_secret_flag(word: Any) -> bool:
    """Whether the word after this one is a secret: `--api-key`."""
    return isinstance(word, str) and word.startswith("-") and "=" not in word and is_secret(word)


def _secrets(tree: Any, key: str) -> Iterator[str]:
    """Yield the text of every value that stands under a secret's key."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _secrets(value, str(name))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _secrets(item, key)
    elif isinstance(tree, str) and is_secret(key):
        yield tree


def masked_text(text: str) -> str:
    """Return text with what looks like a secret replaced: `key=value`, `--key value`, URLs, known tokens."""
    text = _URL.sub(rf"\1:{MASK}@", text)
    text = _URL_TOKEN.sub(f"{MASK}@", text)
    text = _masked_pairs(_FLAG, _masked_pairs(_PAIR, text))
    text = _BEARER.sub(rf"\1\2{MASK}", text)
    return _KNOWN.sub(MASK, text)


def _masked_pairs(pattern: re.Pattern[str], text: str) -> str:
    """Mask the values of secret keys; another value may hold pairs of its own (`url: x?token=y`)."""
    parts, at = [], 0
    while match := pattern.search(text, at):
        parts.append(text[at : match.end("sign")])
        at = match.end("sign")
        if is_secret(match["key"]):
            parts.append(MASK)
            at = match.end()
    return "".join([*parts, text[at:]])


def masked_override(text: str) -> str:
    """Return an override with a secret value replaced: `experiment.envs.HF_TOKEN=***`."""
    key, sign, _ = text.partition("=")
    return f"{key}={MASK}" if sign and is_secret(key.strip("'\" ")) else masked_text(text)


def masked_line(lines: list[str], index: int) -> str:
    """Return one line of a YAML file, secrets replaced; `index` counts from 0.

    The lines before it are needed to know a secret that goes over several lines.
    """
    line = lines[index]
    if _is_inside_secret(lines, index):
        return line[: _indent(line)] + MASK
    for match in _YAML_KEY.finditer(line):
        if not is_secret(match["key"]):
            continue
        rest = line[match.end() :]
        is_flow = "{" in line[: match.start()] or "[" in line[: match.start()]
        value = re.match(r"\s*(\"[^\"]*\"?|'[^']*'?|[^,}\]]+)" if is_flow else r"\s*\S.*", rest)
        if value is not None:
            line = f"{line[: match.end()]} {MASK}{rest[value.end() :]}"
            break
    return masked_text(line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_inside_secret(lines: list[str], index: int) -> bool:
    """Whether a line belongs to the value of a secret key above it."""
    here = _indent(lines[index])
    for line in reversed(lines[:index]):
        if not line.strip():
            continue
        is_item = lines[index].lstrip().startswith("- ") and _indent(line) == here
        if _indent(line) < here or is_item:
            match = _BLOCK.match(line)
            if match is not None and is_secret(match["key"]):
                return True
            here = _indent(line)
        if here == 0:
            return False
    return False
