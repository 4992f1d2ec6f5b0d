"""Text to token ids: many processes tokenize, this one writes, in the order of the input."""

from __future__ import annotations

import json
import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagscale_train.data.corpus import Document, find
from flagscale_train.data.indexed import IndexedWriter, files_of, typecode_for
from flagscale_train.data.progress import Progress
from flagscale_train.data.vocabulary import Vocabulary, library
from flagscale_train.data.writing import require_writable, saying_why
from flagscale_train.errors import InvalidInput, TrainError

__all__ = ["Tokenized", "facts_file", "tokenize"]

_BATCH_BYTES = 1 << 20
"""Text handed to a worker at once; large enough that sending it costs little, small enough for memory."""


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


@dataclass(frozen=True)
class _Batch:
    tokens: bytes
    lengths: list[int]
    max_token: int
    num_empty: int
    num_bytes: int


def facts_file(prefix: Path) -> Path:
    """Return the path of the JSON beside a dataset that says what it was made from."""
    return prefix.with_name(prefix.name + ".json")


def tokenize(  # noqa: PLR0913 -- all but two by name only
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: Path,
    key: str = "text",
    workers: int = 1,
    eod: str | None = None,
    append_eod: bool = True,
    overwrite: bool = False,
) -> Tokenized:
    """Write text as Megatron's indexed dataset `output`.bin and `output`.idx.

    Args:
        inputs: files, directories and patterns. `.jsonl`, `.ndjson` and `.json` files hold one JSON object
            per line, `.parquet` files one document per row, every other file is one document; `.gz` of text
            is read as it is.
        output: prefix of the files.
        tokenizer: directory with a `tokenizer.json`.
        key: field of JSON lines, or column of a table, that holds the text.
        workers: processes that tokenize, at least 1.
        eod: end-of-document token, where the tokenizer's `eos_token` is not it.
        append_eod: end every document with that token.
        overwrite: replace a dataset that exists.

    Returns:
        What was written.

    Raises:
        InvalidInput: an input, the tokenizer or an option is wrong, or the dataset exists or cannot be
            written.
        TrainError: the disk is full, or a worker process died.
    """
    if workers < 1:
        raise InvalidInput(f"--workers: {workers}: at least 1 process is needed")
    present = [path for path in files_of(output) if path.exists()]
    if present and not overwrite:
        raise InvalidInput(f"{present[-1]}: exists: give another --output, or --overwrite to replace it")
    library()
    vocabulary = Vocabulary.read(tokenizer, eod)
    if append_eod and vocabulary.eod is None:
        raise InvalidInput(
            f"{tokenizer}: names no eos_token: name the end of a document with --eod, or give --no-eod"
        )
    corpus = find(inputs, key)
    end = vocabulary.eod if append_eod else None
    require_writable(output)
    try:
        with saying_why(output), Progress("tokenizing", corpus.num_bytes) as progress:
            batches = _tokenized(_batched(corpus.documents()), vocabulary, end, workers)
            return _write(batches, output, vocabulary, progress)
    except BrokenProcessPool as error:
        raise TrainError(
            "a tokenizing process was killed, perhaps for lack of memory: use fewer --workers"
        ) from error


def _write(batches: Iterable[_Batch], output: Path, vocabulary: Vocabulary, progress: Progress) -> Tokenized:
    facts_file(output).unlink(missing_ok=True)
    try:
        with IndexedWriter(output, typecode_for(vocabulary.size)) as writer:
            done = _described(_add_all(writer, batches, output, progress), output, vocabulary)
            # Before the dataset appears: a disk that fills up here must not leave half of the three files.
            facts_file(output).write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")
    except BaseException:
        facts_file(output).unlink(missing_ok=True)
        raise
    return done


def _add_all(
    writer: IndexedWriter, batches: Iterable[_Batch], output: Path, progress: Progress
) -> dict[str, int]:
    """Write every batch; returns the sums over them."""
    num_tokens = num_empty = num_bytes = max_token = 0
    for batch in batches:
        writer.add(batch.tokens, batch.lengths)
        num_tokens += sum(batch.lengths)
        num_empty += batch.num_empty
        num_bytes += batch.num_bytes
        max_token = max(max_token, batch.max_token)
        progress.advance(batch.num_bytes)
    if not num_tokens:
        raise InvalidInput(f"{output}: the input holds no text: nothing to write")
    return {
        "num_documents": writer.num_documents,
        "num_tokens": num_tokens,
        "num_empty": num_empty,
        "num_bytes": num_bytes,
        "max_token": max_token,
    }


def _described(sums: dict[str, int], output: Path, vocabulary: Vocabulary) -> Tokenized:
    return Tokenized(
        prefix=str(output),
        **sums,
        dtype={"H": "uint16", "i": "int32"}[typecode_for(vocabulary.size)],
        vocab_size=vocabulary.size,
        tokenizer=str(vocabulary.directory),
        tokenizer_sha256=vocabulary.sha256,
        eod=vocabulary.eod,
    )


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenized(
    batches: Iterable[list[Document]], vocabulary: Vocabulary, eod: int | None, workers: int
) -> Iterator[_Batch]:
    settings = (vocabulary.file, eod, typecode_for(vocabulary.size))
    if workers == 1:
        encoder = _Encoder(*settings)
        yield from map(encoder.encode, batches)
        return
    # Spawned, not forked: the progress bar runs a thread here, and a fork would copy its locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings) as pool:
        waiting: deque[Future[_Batch]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) > 3 * workers:  # reading must not run away from tokenizing
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Encoder:
    """Tokenizes batches in one process."""

    def __init__(self, file: Path, eod: int | None, typecode: str) -> None:
        self._tokenizer: Any = library().Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eod, self._typecode = eod, typecode

    def encode(self, documents: list[Document]) -> _Batch:
        texts = [document.text for document in documents if document.text]
        tokens, lengths = array(self._typecode), []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids
            if ids:
                tokens.extend(ids if self._eod is None else [*ids, self._eod])
                lengths.append(len(ids) + (self._eod is not None))
        return _Batch(
            tokens=tokens.tobytes(),
            lengths=lengths,
            max_token=max(tokens, default=0),
            num_empty=len(documents) - len(lengths),
            num_bytes=sum(document.num_bytes for document in documents),
        )


_encoder: _Encoder | None = None


def _start_worker(file: Path, eod: int | None, typecode: str) -> None:
    global _encoder  # noqa: PLW0603 -- a pool's worker has no other place for what it loads once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = _Encoder(file, eod, typecode)


def _encode(documents: list[Document]) -> _Batch:
    assert _encoder is not None  # noqa: S101 -- set by the initializer
    return _encoder.encode(documents)
