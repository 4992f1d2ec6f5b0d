"""Looking into datasets and joining them."""

import json
import struct
from array import array

import pytest

from flagscale_train import inspect, merge, tokenize, train_tokenizer
from flagscale_train.cli import main
from flagscale_train.data.indexed import IndexedDataset, IndexedWriter, files_of
from flagscale_train.errors import InvalidInput


def write(prefix, documents, typecode="H"):
    with IndexedWriter(prefix, typecode) as writer:
        for ids in documents:
            writer.add(array(typecode, ids).tobytes(), [len(ids)])
    return prefix


def documents_of(prefix):
    dataset = IndexedDataset.open(prefix)
    return [dataset.ids_of(number) for number in range(dataset.num_documents)]


@pytest.fixture
def texts(tmp_path):
    """Two datasets made from text with one tokenizer."""
    lines = [f"the {word} of day {number}" for number in range(60) for word in ("first hour", "last hour")]
    (tmp_path / "all.txt").write_text("\n".join(lines))
    train_tokenizer([str(tmp_path / "all.txt")], tmp_path / "tok", vocab_size=270)
    for name, part in (("a", lines[:7]), ("b", lines[7:])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
        tokenize([str(file)], tmp_path / name, tokenizer=tmp_path / "tok")
    return tmp_path


def test_inspect_says_what_tokenize_wrote(texts):
    facts = inspect(texts / "a", tokenizer=texts / "tok", count=True)
    assert (facts.num_documents, facts.num_sequences, facts.num_eod) == (7, 7, 7)
    assert facts.made_by.num_tokens == facts.num_tokens
    assert facts.max_token == facts.made_by.max_token
    assert facts.text.startswith("the first hour of day 0")
    assert facts.shortest <= facts.num_tokens / 7 <= facts.longest
    assert inspect(files_of(texts / "a")[0]) == inspect(texts / "a"), "either file names the dataset"


def test_merge_is_the_documents_of_all_in_order(texts):
    made = merge([texts / "a", texts / "b"], texts / "ab")
    assert documents_of(texts / "ab") == documents_of(texts / "a") + documents_of(texts / "b")
    assert made == inspect(texts / "ab").made_by
    assert made.num_documents == 120
    assert inspect(texts / "ab", tokenizer=texts / "tok", count=True).max_token == made.max_token
    with pytest.raises(InvalidInput, match="exists: give another --output"):
        merge([texts / "a", texts / "b"], texts / "ab")
    merge([texts / "b", texts / "a"], texts / "ab", overwrite=True)
    assert documents_of(texts / "ab")[0] == documents_of(texts / "b")[0]


def test_documents_of_several_sequences_stay_whole(tmp_path):
    """Other tools write sentences as sequences; a document is then several of them."""
    many = tmp_path / "sentences"
    write(many, [[1, 2], [3], [4, 5, 6]])
    index = files_of(many)[1]
    whole = index.read_bytes()
    boundaries = struct.pack("<3q", 0, 2, 3)
    index.write_bytes(whole[:26] + struct.pack("<Q", 3) + whole[34 : 34 + 36] + boundaries)
    assert documents_of(many) == [[1, 2, 3], [4, 5, 6]]
    write(tmp_path / "plain", [[7], [8, 9]])
    assert merge([many, tmp_path / "plain"], tmp_path / "both") is None, (
        "nobody said what they were made from"
    )
    assert documents_of(tmp_path / "both") == [[1, 2, 3], [4, 5, 6], [7], [8, 9]]
    facts = inspect(tmp_path / "both")
    assert (facts.num_documents, facts.num_sequences, facts.longest) == (4, 5, 3)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda index, ids: index.write_bytes(index.read_bytes()[:-8]), "its counts need"),
        (lambda index, ids: index.write_bytes(b"nothing"), "does not begin as an index does"),
        (lambda index, ids: index.write_bytes(index.read_bytes()[:20]), "not a whole dataset"),
        (
            lambda index, ids: ids.write_bytes(ids.read_bytes() + b"\0\0"),
            "the ids need 8 bytes, their file has 10",
        ),
        (lambda index, ids: ids.unlink(), "without .bin or .idx"),
        (
            lambda index, ids: index.write_bytes(index.read_bytes()[:17] + b"\x09" + index.read_bytes()[18:]),
            "type code 9 is not known",
        ),
        (
            lambda index, ids: index.write_bytes(index.read_bytes()[:-8] + bytes(8)),
            "do not cover the sequences",
        ),
    ],
)
def test_damage_is_named(tmp_path, capsys, damage, text):
    write(tmp_path / "data", [[1, 2], [3, 4]])
    ids, index = files_of(tmp_path / "data")
    damage(index, ids)
    assert main(["data", "inspect", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_what_does_not_belong_together_is_refused(tmp_path, texts):
    write(tmp_path / "wide", [[1]], "i")
    write(tmp_path / "narrow", [[1]])
    write(tmp_path / "high", [[5_000]])
    with pytest.raises(InvalidInput, match=r"type of ids: .*wide has int32, .*narrow has uint16"):
        merge([tmp_path / "wide", tmp_path / "narrow"], tmp_path / "out")
    with pytest.raises(InvalidInput, match="give two or more"):
        merge([tmp_path / "wide"], tmp_path / "out")
    with pytest.raises(InvalidInput, match="is one of the inputs"):
        merge([tmp_path / "wide", tmp_path / "wide"], tmp_path / "wide", overwrite=True)
    with pytest.raises(InvalidInput, match="holds token 5000"):
        inspect(tmp_path / "high", tokenizer=texts / "tok", count=True)
    facts = json.loads((texts / "b.json").read_text())
    (texts / "b.json").write_text(json.dumps(facts | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(InvalidInput, match="data merge: tokenizer"):
        merge([texts / "a", texts / "b"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_commands(texts, capsys):
    assert main(["data", "merge", str(texts / "a"), str(texts / "b"), "--output", str(texts / "ab")]) == 0
    assert "120 documents" in capsys.readouterr().out
    words = ["data", "inspect", str(texts / "ab"), "--tokenizer", str(texts / "tok"), "--count"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "120 ends of documents" in said
    assert 'begins: "the first hour of day 0' in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_documents"] == 120
