"""Text to token ids: many processes tokenize, this one writes, in the order of the input.

An attempt that was killed, or that ran out of disk, leaves `PREFIX.*.partial`; the same command goes on from
what of it is whole, and the files are then those of an attempt that was never interrupted.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale_train.data.corpus import Corpus, Document, find
from flagscale_train.data.facts import Tokenized
from flagscale_train.data.indexed import (
    DTYPES,
    Checksums,
    IndexedDataset,
    IndexedWriter,
    discard_partial,
    files_of,
    typecode_for,
)
from flagscale_train.data.progress import Progress
from flagscale_train.data.savepoints import Batch, Savepoints, checksum, difference, request_sha256
from flagscale_train.data.vocabulary import Vocabulary, library
from flagscale_train.data.writing import require_writable, saying_why
from flagscale_train.errors import InvalidInput, TrainError

__all__ = ["tokenize"]

_BATCH_BYTES = 1 << 20
"""Text handed to a worker at once; large enough that sending it costs little, small enough for memory."""


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
    say: Callable[[str], None] = lambda _text: None,
) -> Tokenized:
    """Write text as Megatron's indexed dataset `output`.bin and `output`.idx.

    Where an attempt of the same request was interrupted, however that happened, it goes on from the documents
    that are whole; where the dataset is complete already, nothing is done.

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
        overwrite: replace a dataset that exists, or an interrupted attempt of another request.
        say: told in one sentence where work is left out because it was done before.

    Returns:
        What was written.

    Raises:
        InvalidInput: an input, the tokenizer or an option is wrong; another dataset, or an interrupted
            attempt with other inputs or options, is there; another process is at work on it; or it cannot be
            written.
        TrainError: the disk is full, or a worker process died.
    """
    if workers < 1:
        raise InvalidInput(f"--workers: {workers}: at least 1 process is needed")
    library()
    vocabulary = Vocabulary.read(tokenizer, eod)
    if append_eod and vocabulary.eod is None:
        raise InvalidInput(
            f"{tokenizer}: names no eos_token: name the end of a document with --eod, or give --no-eod"
        )
    corpus = find(inputs, key)
    end = vocabulary.eod if append_eod else None
    require_writable(output)
    request = {
        "inputs": [[str(path.absolute()), *_state(path)] for path in corpus.files],
        "key": key,
        "tokenizer": vocabulary.sha256,
        "tokenizers": library().__version__,
        "end": end,
    }
    try:
        with saying_why(output, _KEPT), Savepoints(output) as points:
            whole = _settle_with_the_past(output, points, request, overwrite=overwrite)
            if whole is not None:
                discard_partial(output)
                points.discard()
                say(f"{output}: whole already, made from the same inputs and options: nothing remains")
                return whole
            work = _Work(output, corpus, vocabulary, end, workers, request_sha256(request))
            return work.done(points, say)
    except BrokenProcessPool as error:
        raise TrainError(
            "a tokenizing process was killed, perhaps for lack of memory: use fewer --workers; the same "
            "command goes on from what is whole"
        ) from error


_KEPT = "make room and run the same command again: it goes on from what is whole"


def _state(path: Path) -> tuple[int, int]:
    """Return what changes with a file: its size, and when it was written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _settle_with_the_past(
    output: Path, points: Savepoints, request: dict[str, Any], *, overwrite: bool
) -> Tokenized | None:
    """Look at what is there of `output` and make `points` ready for work on it.

    Returns:
        What the dataset says of itself, where it is whole and what was asked for.

    Raises:
        InvalidInput: something else is there, and it may not be overwritten.
    """
    begun = points.request
    is_same = begun == request
    present = [path for path in files_of(output) if path.exists()]
    if files_of(output)[1] in present or (present and not is_same):
        made = Tokenized.read(output)
        was_asked = made is not None and made.request_sha256 == request_sha256(request)
        if was_asked and (is_same or not overwrite):
            IndexedDataset.open(output)
            return made
        if not overwrite:
            other = "" if made is None else " and was made from other inputs, or with other options"
            raise InvalidInput(
                f"{present[-1]}: exists{other}: give another --output, or --overwrite to replace it"
            )
    if begun is not None and not is_same and not overwrite:
        raise InvalidInput(
            f"--output: {output}: an interrupted attempt is there, begun with {difference(begun, request)}: "
            "give what it was begun with, another --output, or --overwrite to begin again"
        )
    if not is_same:
        points.begin(request)
    return None


@dataclass(frozen=True)
class _Work:
    """What is to be done for one dataset."""

    output: Path
    corpus: Corpus
    vocabulary: Vocabulary
    end: int | None
    workers: int
    request_sha256: str

    def done(self, points: Savepoints, say: Callable[[str], None]) -> Tokenized:
        """Do it, from the savepoints on."""
        writer = IndexedWriter(self.output, typecode_for(self.vocabulary.size), keeps_partial=True)
        sums = _Sums()
        try:
            with writer, Progress("tokenizing", self.corpus.num_bytes) as progress:
                _take_over(writer, points, sums)
                if sums.num_read:
                    say(f"{self.output}: going on after {sums.num_read:,} documents, which are whole")
                progress.advance(sums.num_bytes)
                batches = _batched(self.corpus.documents(skip=sums.num_read))
                for batch, tokens in _tokenized(batches, self.vocabulary, self.end, self.workers):
                    writer.add(tokens, batch.lengths)
                    points.add(batch)
                    sums.add(batch)
                    progress.advance(batch.num_bytes)
                made = self._described(sums, writer.seal())
                writer.describe(made.to_json())
        except BaseException as error:
            # Wrong input will be mended, and is another then; without a whole batch nothing is worth keeping.
            if isinstance(error, InvalidInput) or not sums.num_read:
                discard_partial(self.output)
                points.discard()
            raise
        points.discard()
        return made

    def _described(self, sums: _Sums, checksums: Checksums) -> Tokenized:
        if not sums.num_tokens:
            raise InvalidInput(f"{self.output}: the input holds no text: nothing to write")
        return Tokenized(
            prefix=str(self.output),
            num_documents=sums.num_documents,
            num_tokens=sums.num_tokens,
            num_empty=sums.num_empty,
            num_bytes=sums.num_bytes,
            dtype=DTYPES[typecode_for(self.vocabulary.size)],
            vocab_size=self.vocabulary.size,
            max_token=sums.max_token,
            tokenizer=str(self.vocabulary.directory),
            tokenizer_sha256=self.vocabulary.sha256,
            eod=self.vocabulary.eod,
            bin_sha256=checksums.bin,
            idx_sha256=checksums.idx,
            request_sha256=self.request_sha256,
        )


@dataclass
class _Sums:
    """Figures over all batches so far."""

    num_documents: int = 0
    num_tokens: int = 0
    num_empty: int = 0
    num_bytes: int = 0
    max_token: int = 0

    def add(self, batch: Batch) -> None:
        self.num_documents += len(batch.lengths)
        self.num_tokens += sum(batch.lengths)
        self.num_empty += batch.num_empty
        self.num_bytes += batch.num_bytes
        self.max_token = max(self.max_token, batch.max_token)

    @property
    def num_read(self) -> int:
        return self.num_documents + self.num_empty


def _take_over(writer: IndexedWriter, points: Savepoints, sums: _Sums) -> None:
    """Keep what an interrupted attempt left, up to the first batch whose ids are not what they were."""
    for batch in points.batches():
        if not writer.take_over(batch.lengths, batch.is_of):
            break
        sums.add(batch)
    writer.cut()
    points.cut()


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
) -> Iterator[tuple[Batch, bytes]]:
    settings = (vocabulary.file, eod, typecode_for(vocabulary.size))
    if workers == 1:
        encoder = _Encoder(*settings)
        yield from map(encoder.encode, batches)
        return
    # Spawned, not forked: the progress bar runs a thread here, and a fork would copy its locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings) as pool:
        waiting: deque[Future[tuple[Batch, bytes]]] = deque()
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

    def encode(self, documents: list[Document]) -> tuple[Batch, bytes]:
        """Return what is known of the documents, and their ids as bytes."""
        texts = [document.text for document in documents if document.text]
        tokens, lengths = array(self._typecode), []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids
            if ids:
                tokens.extend(ids if self._eod is None else [*ids, self._eod])
                lengths.append(len(ids) + (self._eod is not None))
        batch = Batch(
            lengths=lengths,
            num_empty=len(documents) - len(lengths),
            num_bytes=sum(document.num_bytes for document in documents),
            max_token=max(tokens, default=0),
            checksum=checksum(tokens.tobytes(), lengths),
        )
        return batch, tokens.tobytes()


_encoder: _Encoder | None = None


def _start_worker(file: Path, eod: int | None, typecode: str) -> None:
    global _encoder  # noqa: PLW0603 -- a pool's worker has no other place for what it loads once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = _Encoder(file, eod, typecode)


def _end_with_parent() -> None:
    """End this process when the one that gives it work is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(documents: list[Document]) -> tuple[Batch, bytes]:
    assert _encoder is not None  # noqa: S101 -- set by the initializer
    return _encoder.encode(documents)
