"""Datasets that are there: look into one, and join several to one."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from flagscale_train.data.facts import Tokenized, facts_file
from flagscale_train.data.indexed import DTYPES, Checksums, IndexedDataset, IndexedWriter, files_of, prefix_of
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
    is_checked: bool = False
    """Whether both files were compared with their checksums."""


def inspect(
    prefix: Path,
    *,
    tokenizer: Path | None = None,
    count: bool = False,
    check: bool = False,
    num_ids: int = 64,
) -> DatasetFacts:
    """Check that a dataset is whole, and say what is in it.

    Args:
        prefix: path without `.bin` and `.idx`.
        tokenizer: directory with a `tokenizer.json`, to show text and to check the ids.
        count: read every id, for the highest one and the ends of documents.
        check: read both files whole and compare them with the checksums beside them.
        num_ids: how many ids of the first document to show as text.

    Raises:
        InvalidInput: a file is missing or damaged, ids are beyond the tokenizer's vocabulary, or there are no
            checksums to check against.
    """
    if check:
        _check(prefix_of(prefix))
    dataset = IndexedDataset.open(prefix)
    made_by = Tokenized.read(dataset.prefix)
    _compare_counts(dataset, made_by)
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
        is_checked=check,
    )


def _check(prefix: Path) -> None:
    """Compare both files with their checksums; the error names the one that is damaged."""
    said = Tokenized.read(prefix)
    if said is None or not said.bin_sha256:
        raise InvalidInput(
            f"--check: {facts_file(prefix)}: says no checksums, as `data tokenize` and `data merge` write: "
            "make the dataset again, or leave --check out"
        )
    try:
        total = sum(path.stat().st_size for path in files_of(prefix))
        with Progress("checking", total) as progress:
            found = Checksums.of(prefix, progress.advance)
    except OSError as error:
        raise InvalidInput(f"{error.filename}: {error.strerror}: copy or make it again") from None
    ids, index = files_of(prefix)
    _compare(ids, found.bin, said.bin_sha256)
    _compare(index, found.idx, said.idx_sha256)


def _compare(path: Path, found: str, said: str) -> None:
    if found != said:
        raise InvalidInput(
            f"{path}: damaged: its SHA-256 is {found[:16]}..., the .json beside it says {said[:16]}...: copy "
            "or make it again"
        )


def _refuse_damaged(prefix: Path, said: Tokenized | None, ids_sha256: str) -> None:
    """What is copied must be what was written; a new checksum would hide the damage."""
    if said is not None and said.bin_sha256:
        ids, index = files_of(prefix)
        _compare(ids, ids_sha256, said.bin_sha256)
        _compare(index, hashlib.sha256(index.read_bytes()).hexdigest(), said.idx_sha256)


def _compare_counts(dataset: IndexedDataset, said: Tokenized | None) -> None:
    if said is None:
        return
    for name, found in (("num_documents", dataset.num_documents), ("num_tokens", dataset.num_tokens)):
        if getattr(said, name) != found:
            raise InvalidInput(
                f"{facts_file(dataset.prefix)}: {name}: {getattr(said, name)}: the dataset has {found}: they "
                "do not belong together: copy or make them again"
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
    facts = [Tokenized.read(dataset.prefix) for dataset in datasets]
    known = [(dataset, one) for dataset, one in zip(datasets, facts, strict=True) if one]
    for dataset, one in known:
        _compare_counts(dataset, one)
    _require_same("tokenizer", {dataset.prefix: one.tokenizer_sha256 for dataset, one in known})
    joined = _joined(output, [one for _, one in known]) if all(facts) else None
    require_writable(output)
    total = sum(dataset.num_tokens * dataset.item_size for dataset in datasets)
    with (
        saying_why(output),
        Progress("merging", total) as progress,
        IndexedWriter(output, datasets[0].typecode) as writer,
    ):
        for dataset, made_by in zip(datasets, facts, strict=True):
            ids = hashlib.sha256()
            for piece in writer.add_dataset(dataset):
                ids.update(piece)
                progress.advance(len(piece))
            _refuse_damaged(dataset.prefix, made_by, ids.hexdigest())
        if joined is not None:
            sums = writer.seal()
            joined = replace(joined, bin_sha256=sums.bin, idx_sha256=sums.idx)
            writer.describe(joined.to_json())
    return joined


def _require_same(what: str, values: dict[Path, str]) -> None:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{prefix} has {value[:12]}" for prefix, value in values.items())
        raise InvalidInput(f"data merge: {what}: {listed}: all must have the same: tokenize them alike")


def _joined(output: Path, parts: Sequence[Tokenized]) -> Tokenized:
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("num_documents", "num_tokens", "num_empty", "num_bytes")
    }
    highest = max(part.max_token for part in parts)
    new = {"prefix": str(output), "max_token": highest, "request_sha256": ""}
    return Tokenized(**(asdict(parts[0]) | sums | new))


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
