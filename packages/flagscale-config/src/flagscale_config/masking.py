"""Secrets, kept out of everything that is printed or recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MASK", "is_secret", "masked"]

MASK = "***"

_WORDS = r"((api|access|private)[_-]?keys?|secrets?|passwd|password|passphrase|credentials?|tokens?)"
_SECRET = re.compile(rf"(^|[_-]){_WORDS}([_-]?key)?$", re.IGNORECASE)

# `pad_token` is a word of a vocabulary and `max_tokens` a number; `hf_token` opens somebody's account.
_VOCABULARY = re.compile(
    r"(^|[_-])(bos|cls|end|eod|eos|image|mask|middle|pad|prefix|sep|special|start|stop|suffix|unk|video)[_-]tokens?$",
    re.IGNORECASE,
)
_COUNT = re.compile(r"(^|[_-])(max|min|num|batched|per|prompt|total|draft|speculative)[a-z_-]*[_-]tokens?$")


def is_secret(key: str) -> bool:
    """Whether a value under this key must not be shown: keys, tokens of services, secrets, passwords."""
    is_word = _VOCABULARY.search(key) or _COUNT.search(key)
    return bool(_SECRET.search(key)) and not is_word


def masked(tree: Any, key: str = "") -> Any:
    """Return a copy of plain data with every secret replaced by `***`; null stays null."""
    if isinstance(tree, Mapping):
        return {name: masked(value, str(name)) for name, value in tree.items()}
    if key and is_secret(key) and tree is not None and not isinstance(tree, bool):
        return MASK
    if isinstance(tree, (list, tuple)):
        return [masked(item) for item in tree]
    return tree
