"""Tokenizer directories: reading what tokenizing needs from one, and training a new one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale_train.data.corpus import find
from flagscale_train.data.progress import Progress
from flagscale_train.data.writing import require_writable, saying_why
from flagscale_train.errors import InvalidInput

__all__ = ["TrainedTokenizer", "Vocabulary", "library", "train_tokenizer"]

EOS, PAD = "<|endoftext|>", "<|padding|>"


def library() -> Any:
    """Import the `tokenizers` library.

    Raises:
        InvalidInput: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InvalidInput(
            "tokenizers: not installed: data preparation needs it: pip install 'flagscale-train[data]'"
        ) from error
    return tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer directory says, read without building the tokenizer."""

    directory: Path
    size: int
    """Highest id + 1 over the model's and the added tokens."""
    eod: int | None
    """Id of the end-of-document token (the tokenizer's `eos_token`); None if it names none."""
    sha256: str
    """Of tokenizer.json."""

    @property
    def file(self) -> Path:
        """The tokenizer itself."""
        return self.directory / "tokenizer.json"

    @classmethod
    def read(cls, directory: Path, eod: str | None = None) -> Vocabulary:
        """Read a directory with a `tokenizer.json`.

        Args:
            directory: the tokenizer directory; the path of the `tokenizer.json` itself is also taken.
            eod: end-of-document token to use in place of the tokenizer's own.

        Raises:
            InvalidInput: it has no tokenizer.json, or the token is not in the vocabulary.
        """
        if directory.name == "tokenizer.json":
            directory = directory.parent
        path = directory / "tokenizer.json"
        try:
            data = path.read_bytes()
            described = json.loads(data)
            ids = _ids(described)
        except FileNotFoundError:
            raise InvalidInput(
                f"{directory}: no tokenizer.json in it: give a Hugging Face tokenizer directory"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"{path}: not a tokenizer ({error}): a Hugging Face tokenizer.json is expected"
            ) from None
        name = eod or _eos_name(directory)
        if eod is not None and eod not in ids:
            raise InvalidInput(f"--eod: {eod}: not a token of {path}: use one of its tokens")
        return cls(
            directory,
            max(ids.values()) + 1,
            ids.get(name) if name else None,
            hashlib.sha256(data).hexdigest(),
        )


def _ids(described: dict[str, Any]) -> dict[str, int]:
    model = described["model"]["vocab"]
    # A Unigram model lists pairs of piece and score; its ids are the positions.
    ids = dict(model) if isinstance(model, dict) else {piece: index for index, (piece, _) in enumerate(model)}
    return ids | {token["content"]: token["id"] for token in described.get("added_tokens") or []}


def _eos_name(directory: Path) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((directory / file).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        if token:
            return str(token["content"] if isinstance(token, dict) else token)
    return None


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was just trained."""

    directory: Path
    vocab_size: int
    """May be less than asked for if the text is small."""
    num_documents: int
    num_bytes: int


def train_tokenizer(
    inputs: Sequence[str], output: Path, *, vocab_size: int, key: str = "text", overwrite: bool = False
) -> TrainedTokenizer:
    """Train a byte-level BPE tokenizer and write it as a Hugging Face tokenizer directory.

    Args:
        inputs: files, directories and patterns, as for `tokenize`.
        output: directory to write; appears only when complete.
        vocab_size: tokens wanted, with the 256 bytes and the two special tokens; at least 258.
        key: field of JSON lines that holds the text.
        overwrite: replace an `output` that exists.

    Returns:
        What was made.

    Raises:
        InvalidInput: an input is wrong, `vocab_size` is too small, or `output` exists or cannot be written.
        TrainError: the disk is full.
    """
    if vocab_size < 256 + 2:
        raise InvalidInput(f"--vocab-size: {vocab_size}: 256 bytes and 2 special tokens make 258 the least")
    if output.exists() and not overwrite:
        raise InvalidInput(f"{output}: exists: give another --output, or --overwrite to replace it")
    tokenizers = library()
    corpus = find(inputs, key)
    require_writable(output)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    num_documents = 0
    with Progress("reading", corpus.num_bytes) as progress:

        def texts() -> Any:
            nonlocal num_documents
            for document in corpus.documents():
                num_documents += 1
                yield document.text
                progress.advance(document.num_bytes)

        tokenizer.train_from_iterator(texts(), trainer)
    with saying_why(output):
        _write(tokenizer, output)
    return TrainedTokenizer(output, tokenizer.get_vocab_size(), num_documents, corpus.num_bytes)


def _write(tokenizer: Any, output: Path) -> None:
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        # Not tokenizer.save(): on a full disk that raises a bare Exception.
        (partial / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        }
        (partial / "tokenizer_config.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )
        if output.is_dir():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
