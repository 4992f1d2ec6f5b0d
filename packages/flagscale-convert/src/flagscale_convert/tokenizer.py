"""Tokenizer files: which to carry along, how many tokens there are, which ids begin and end a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale_convert.errors import SourceNotFound
from flagscale_convert.huggingface import read_json

__all__ = ["FILES", "Tokenizer", "find_tokenizer", "read_tokenizer"]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "rwkv_vocab_v20230424.txt",
    "hf_rwkv_tokenizer.py",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Every file of a model directory that belongs to its tokenizer, its other inputs or to generation."""
_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "rwkv_vocab_v20230424.txt")
_IDS = ("bos", "eos", "pad")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A directory of tokenizer files."""

    directory: Path
    files: tuple[str, ...]
    num_tokens: int | None
    """Highest id + 1, as far as `tokenizer.json` tells."""
    ids: Mapping[str, int]
    """`bos_token_id`, `eos_token_id`, `pad_token_id` as far as known."""


def read_tokenizer(directory: Path) -> Tokenizer:
    """Look at a tokenizer directory.

    Raises:
        SourceNotFound: there is none.
    """
    if directory.is_file():
        directory = directory.parent
    files = tuple(name for name in FILES if (directory / name).is_file())
    if not set(files) & set(_CORE):
        raise SourceNotFound(f"{directory}: holds no tokenizer: one of {', '.join(_CORE)} is needed")
    table = _tokens(directory) if "tokenizer.json" in files else {}
    return Tokenizer(
        directory, files, max(table.values()) + 1 if table else None, _special_ids(directory, files, table)
    )


def find_tokenizer(asked: Path | None, candidates: tuple[Path, ...]) -> Tokenizer | None:
    """Take the tokenizer asked for, else the first candidate that is one.

    Raises:
        SourceNotFound: the one asked for is none.
    """
    if asked is not None:
        return read_tokenizer(asked)
    for candidate in candidates:
        if candidate.exists() and any((candidate / name).is_file() for name in _CORE):
            return read_tokenizer(candidate)
    return None


def _tokens(directory: Path) -> dict[str, int]:
    """Read token to id; a unigram model lists its tokens in the order of their ids."""
    parsed = read_json(directory / "tokenizer.json")
    model = parsed.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    table: dict[str, int] = {}
    if isinstance(vocabulary, Mapping):
        table.update({str(token): index for token, index in vocabulary.items() if isinstance(index, int)})
    elif isinstance(vocabulary, list):
        table.update(
            {str(entry[0]): index for index, entry in enumerate(vocabulary) if isinstance(entry, list)}
        )
    for entry in parsed.get("added_tokens") or ():
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int):
            table[str(entry.get("content"))] = entry["id"]
    return table


def _special_ids(directory: Path, files: tuple[str, ...], table: Mapping[str, int]) -> dict[str, int]:
    named: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if file in files:
            named.update(read_json(directory / file))
    ids = {}
    for kind in _IDS:
        token = named.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(content, str) and content in table:
            ids[f"{kind}_token_id"] = table[content]
    return ids
