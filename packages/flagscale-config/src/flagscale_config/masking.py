"""Secrets, kept out of everything that is printed or recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MASK", "is_secret", "masked"]

MASK = "***"

# Whole words at the end of a key, so that `max_tokens`, `tokenizer` and `pad_token` stay readable.
_SECRET = re.compile(
    r"(^|[_-])(api_?keys?|access_?keys?|secret(_?keys?)?|passw(or)?d|passphrase|credentials?|private_?key)$",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(^|[_-])(hf|hub|auth|access|api|bearer|github|gitlab|wandb|refresh|session|secret)[_-]?token$|^token$|_TOKEN$",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Whether a value under this key must not be shown: keys, tokens of services, secrets, passwords."""
    return bool(_SECRET.search(key) or _TOKEN.search(key))


def masked(tree: Any, key: str = "") -> Any:
    """Return a copy of plain data with every secret replaced by `***`; null stays null."""
    if isinstance(tree, Mapping):
        return {name: masked(value, str(name)) for name, value in tree.items()}
    if key and is_secret(key) and tree is not None and not isinstance(tree, bool):
        return MASK
    if isinstance(tree, (list, tuple)):
        return [masked(item) for item in tree]
    return tree
