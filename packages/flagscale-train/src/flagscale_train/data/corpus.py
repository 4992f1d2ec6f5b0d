"""Finds input files and reads documents from them."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from flagscale_train.errors import InvalidInput

__all__ = ["Corpus", "Document", "find"]

_LINES = {".jsonl", ".ndjson", ".json"}
"""Files with one JSON object per line; beside these and `.parquet` every file is one document."""


@dataclass(frozen=True)
class Document:
    """One document and how far into the corpus it ends."""

    text: str
    num_bytes: int
    """Bytes of input this document took, for progress."""


@dataclass(frozen=True)
class Corpus:
    """The input files, in the order they are read."""

    files: tuple[Path, ...]
    key: str = "text"
    """Field of each JSON line, or column of a table, that holds the text."""

    @property
    def num_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(path.stat().st_size for path in self.files)

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Yield every document, empty ones too.

        Args:
            skip: leave out so many at the beginning; their lines are found but not parsed.

        Raises:
            InvalidInput: a file is not UTF-8, a line is not a JSON object, or it has no text under the key.
        """
        for read in islice(self._entries(), skip, None):
            yield read()

    def _entries(self) -> Iterator[Callable[[], Document]]:
        """Yield what reads each document."""
        for path in self.files:
            if _suffix(path) in _LINES:
                yield from self._lines(path)
            elif path.suffix.lower() == ".parquet":
                yield from self._rows(path)
            else:
                yield partial(_whole, path)

    def _lines(self, path: Path) -> Iterator[Callable[[], Document]]:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield partial(self._line, line, path, number)

    def _line(self, line: bytes, path: Path, number: int) -> Document:
        return Document(self._text(line, f"{path}:{number}"), len(line))

    def _rows(self, path: Path) -> Iterator[Callable[[], Document]]:
        table = _parquet(path)
        names = table.schema_arrow.names
        if self.key not in names:
            has = ", ".join(names[:10])
            raise InvalidInput(
                f"{path}: no column {self.key!r} (it has: {has}): name the text's column with --key"
            )
        kind = str(table.schema_arrow.field(self.key).type)
        if "string" not in kind:
            raise InvalidInput(f"{path}: {self.key}: a column of {kind}: one of texts is expected")
        # Rows take shares of the file, which is compressed: good enough for progress, and its sum is exact.
        size, count, done = path.stat().st_size, max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=1024, columns=[self.key]):
            for text in batch.column(0).to_pylist():
                done += 1
                share = size * done // count - size * (done - 1) // count
                yield partial(Document, text or "", share)

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{where}: not JSON ({error}): one object per line is expected") from None
        if not isinstance(record, dict) or self.key not in record:
            has = ", ".join(sorted(record)[:10]) if isinstance(record, dict) else type(record).__name__
            raise InvalidInput(
                f"{where}: no field {self.key!r} (it has: {has}): name the text's field with --key"
            )
        text = record[self.key]
        if not isinstance(text, str):
            raise InvalidInput(f"{where}: {self.key}: {type(text).__name__}: a text is expected")
        return text


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InvalidInput(
            f"{path}: pyarrow, which reads it, is not installed: pip install 'flagscale-train[parquet]'"
        ) from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise InvalidInput(f"{path}: not a whole Parquet file ({error}): copy it again") from None


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _whole(path: Path) -> Document:
    with _open(path) as stream:
        data = stream.read()
    try:
        return Document(data.decode("utf-8"), len(data))
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path}: byte {error.start} is not UTF-8: convert the file, or leave it out (inputs may be "
            "patterns such as 'docs/**/*.txt')"
        ) from None


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    return inner.suffix.lower()


def find(inputs: Sequence[str], key: str = "text") -> Corpus:
    """Find the files that `inputs` name.

    Args:
        inputs: files, directories (all files below, without hidden ones) and patterns with `*`, `?`, `**`.
        key: field of JSON lines that holds the text.

    Returns:
        The corpus; files of a directory or pattern are sorted by path, and none is taken twice.

    Raises:
        InvalidInput: an input names nothing.
    """
    found: dict[Path, None] = {}
    for name in inputs:
        files = _expand(name)
        if not files:
            raise InvalidInput(
                f"{name}: no such file, and no file matches it: give files, directories or patterns"
            )
        found.update(dict.fromkeys(files))
    return Corpus(tuple(found), key)


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        below = (p for p in path.rglob("*") if p.is_file())
        return sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if path.is_file():
        return [path]
    return sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())  # noqa: PTH207
