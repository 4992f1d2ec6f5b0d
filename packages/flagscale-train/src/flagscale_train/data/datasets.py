"""Datasets that are there: look into one, and join several to one."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

from flagscale_train.data.encode import Tokenized, facts_file
from flagscale_train.data.indexed import DTYPES, IndexedDataset, IndexedWriter, files_of
from flagscale_train.data.progress import Progress
from flagscale_train.data.vocabulary import Vocabulary, library
from flagscale_train.data.writing import require_writable, saying_why
from flagscale_train.errors import InvalidInput

__all__ = ["DatasetFacts", "inspect", "merge"]


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a dataset whose files are whole."""

    prefix: str
    dtype: str
    num_bytes: int
    num_documents: int
    num_sequences: int
    num_tokens: int
    shortest: int
    """Ids of the shortest document."""
    longest: int
    max_token: int | None
    """Highest id: counted if asked for, else as said when it was made; None if neither."""
    num_eod: int | None
    """How often the end-of-document token occurs; None if not counted, or not known which it is."""
    made_by: Tokenized | None
    """What `data tokenize` wrote beside it."""
    text: str | None
    """Beginning of the first document, where a tokenizer was given."""


def inspect(
    prefix: Path, *, tokenizer: Path | None = None, count: bool = False, num_ids: int = 64
) -> DatasetFacts:
    """Check that a dataset is whole, and say what is in it.

    Args:
        prefix: path without `.bin` and `.idx`.
        tokenizer: directory with a `tokenizer.json`, to show text and to check the ids.
        count: read every id, for the highest one and the ends of documents.
        num_ids: how many ids of the first document to show as text.

    Raises:
        InvalidInput: a file is missing or damaged, or ids are beyond the tokenizer's vocabulary.
    """
    dataset = IndexedDataset.open(prefix)
    made_by = _made_by(dataset.prefix)
    vocabulary = Vocabulary.read(tokenizer) if tokenizer else None
    eod = vocabulary.eod if vocabulary else made_by.eod if made_by else None
    max_token, num_eod = _counted(dataset, eod) if count else (made_by.max_token if made_by else None, None)
    if vocabulary is not None and max_token is not None and max_token >= vocabulary.size:
        raise InvalidInput(
            f"{dataset.prefix}: holds token {max_token}, the tokenizer {tokenizer} ends at "
            f"{vocabulary.size - 1}: they do not belong together"
        )
    sizes = _document_sizes(dataset)
    return DatasetFacts(
        prefix=str(dataset.prefix),
        dtype=DTYPES[dataset.typecode],
        num_bytes=dataset.num_tokens * dataset.item_size,
        num_documents=dataset.num_documents,
        num_sequences=len(dataset.lengths),
        num_tokens=dataset.num_tokens,
        shortest=min(sizes, default=0),
        longest=max(sizes, default=0),
        max_token=max_token,
        num_eod=num_eod,
        made_by=made_by,
        text=_beginning(dataset, vocabulary, num_ids) if vocabulary and dataset.num_documents else None,
    )


def merge(inputs: Sequence[Path], output: Path, *, overwrite: bool = False) -> Tokenized | None:
    """Join datasets, one after another, to one.

    Args:
        inputs: prefixes of two datasets or more, of one type of ids and, where it is known, of one tokenizer.
        output: prefix of the dataset to write.
        overwrite: replace one that exists.

    Returns:
        What `PREFIX.json` says of the new one; None where not every input says what it was made from.

    Raises:
        InvalidInput: an input is damaged or of another kind, or the output exists or cannot be written.
        TrainError: the disk is full.
    """
    if len(inputs) < 2:
        raise InvalidInput("data merge: one dataset: give two or more")
    present = [path for path in files_of(output) if path.exists()]
    if present and not overwrite:
        raise InvalidInput(f"{present[-1]}: exists: give another --output, or --overwrite to replace it")
    datasets = [IndexedDataset.open(prefix) for prefix in inputs]
    if output.absolute() in {dataset.prefix.absolute() for dataset in datasets}:
        raise InvalidInput(f"--output: {output}: is one of the inputs: give another")
    _require_same("type of ids", {dataset.prefix: DTYPES[dataset.typecode] for dataset in datasets})
    facts = {dataset.prefix: _made_by(dataset.prefix) for dataset in datasets}
    _require_same("tokenizer", {prefix: one.tokenizer_sha256 for prefix, one in facts.items() if one})
    joined = _joined(output, [one for one in facts.values() if one]) if all(facts.values()) else None
    require_writable(output)
    total = sum(dataset.num_tokens * dataset.item_size for dataset in datasets)
    facts_file(output).unlink(missing_ok=True)
    with (
        saying_why(output),
        Progress("merging", total) as progress,
        IndexedWriter(output, datasets[0].typecode) as writer,
    ):
        for dataset in datasets:
            for num_bytes in writer.add_dataset(dataset):
                progress.advance(num_bytes)
    if joined is not None:
        facts_file(output).write_text(json.dumps(asdict(joined), indent=2) + "\n", encoding="utf-8")
    return joined


def _require_same(what: str, values: dict[Path, str]) -> None:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{prefix} has {value[:12]}" for prefix, value in values.items())
        raise InvalidInput(f"data merge: {what}: {listed}: all must have the same: tokenize them alike")


def _made_by(prefix: Path) -> Tokenized | None:
    """Read what stands beside a dataset; None if it was made by another tool."""
    try:
        said = json.loads(facts_file(prefix).read_text(encoding="utf-8"))
        return Tokenized(**{field.name: said[field.name] for field in fields(Tokenized)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _joined(output: Path, parts: Sequence[Tokenized]) -> Tokenized:
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("num_documents", "num_tokens", "num_empty", "num_bytes")
    }
    highest = max(part.max_token for part in parts)
    return Tokenized(**(asdict(parts[0]) | sums | {"prefix": str(output), "max_token": highest}))


def _counted(dataset: IndexedDataset, eod: int | None) -> tuple[int | None, int | None]:
    highest, ends = -1, 0
    with Progress("reading", dataset.num_tokens * dataset.item_size) as progress:
        for piece in dataset.pieces():
            ids = array(dataset.typecode, piece)
            highest = max((highest, max(ids)))
            ends += Counter(ids)[eod] if eod is not None else 0
            progress.advance(len(piece))
    return (highest if highest >= 0 else None), (ends if eod is not None else None)


def _document_sizes(dataset: IndexedDataset) -> list[int]:
    if len(dataset.lengths) == dataset.num_documents:
        return dataset.lengths.tolist()
    return [sum(dataset.lengths[first:last]) for first, last in pairwise(dataset.boundaries)]


def _beginning(dataset: IndexedDataset, vocabulary: Vocabulary, num_ids: int) -> str:
    tokenizer = library().Tokenizer.from_file(str(vocabulary.file))
    return str(tokenizer.decode(dataset.ids_of(0)[:num_ids], skip_special_tokens=False))
