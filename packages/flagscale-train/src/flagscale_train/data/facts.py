"""What stands beside a dataset in `PREFIX.json`: what it was made from, and what its files must hold."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Tokenized", "facts_file"]


@dataclass(frozen=True)
class Tokenized:
    """A dataset that was just written; also what `PREFIX.json` beside it says."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_empty: int
    """Documents without text, left out."""
    num_bytes: int
    dtype: str
    vocab_size: int
    max_token: int
    tokenizer: str
    tokenizer_sha256: str
    eod: int | None
    bin_sha256: str = ""
    """Of PREFIX.bin; empty where an older version wrote the dataset."""
    idx_sha256: str = ""
    """Of PREFIX.idx; as above."""
    request_sha256: str = ""
    """Of inputs (paths, sizes, times), tokenizer and options, by which the same command knows its work."""

    @classmethod
    def read(cls, prefix: Path) -> Tokenized | None:
        """Read what stands beside a dataset; None if it was made by another tool."""
        try:
            said = json.loads(facts_file(prefix).read_text(encoding="utf-8"))
            return cls(**{name: said[name] for name in cls.__dataclass_fields__ if name in said})
        except (OSError, ValueError, TypeError):
            return None

    def to_json(self) -> str:
        """Return the text of `PREFIX.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def facts_file(prefix: Path) -> Path:
    """Return the path of the JSON beside a dataset that says what it was made from."""
    return prefix.with_name(prefix.name + ".json")
