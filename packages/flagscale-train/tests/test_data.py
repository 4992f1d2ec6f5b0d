"""Tokenizing and training tokenizers; needs the `tokenizers` library, as these commands do."""

import contextlib
import gzip
import json
import resource
import signal
from array import array

import pytest

from flagscale_train.cli import main

pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat", "", "the dog sat on the log", "naïve café 🙂\n\n  tabs\tand more"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def tokenizer(corpus, tmp_path):
    path = tmp_path / "tok"
    assert main(["data", "train-tokenizer", str(corpus), "--vocab-size", "300", "--output", str(path)]) == 0
    return path


def decoded(tokenizer, prefix):
    """Read a dataset back as texts, each with its last id."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = array("H", prefix.with_name(prefix.name + ".bin").read_bytes()).tolist()
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    lengths = array("i", index[34 : 34 + 4 * count]).tolist()
    assert sum(lengths) == len(ids)
    texts = []
    for length in lengths:
        *body, end = ids[:length]
        del ids[:length]
        texts.append((reader.decode(body, skip_special_tokens=False), end))
    return texts


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokenize(*words):
    return main(["data", "tokenize", *map(str, words)])


def test_every_text_comes_back_in_order_with_its_end(corpus, tokenizer, tmp_path, capsys):
    assert tokenize(corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out" / "d") == 0
    assert decoded(tokenizer, tmp_path / "out" / "d") == [(text, 0) for text in TEXTS if text]
    assert "1 empty documents left out" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "d.json").read_text())
    assert facts["num_documents"] == 3
    assert facts["num_empty"] == 1
    assert facts["max_token"] < facts["vocab_size"]


def test_workers_do_not_change_a_byte(tokenizer, tmp_path):
    lines = tmp_path / "big.jsonl"
    lines.write_text("".join(json.dumps({"text": f"number {n} " * 400}) + "\n" for n in range(1500)))
    for workers in (1, 3):
        assert (
            tokenize(
                lines, "--tokenizer", tokenizer, "--output", tmp_path / f"w{workers}", "--workers", workers
            )
            == 0
        )
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w3{suffix}").read_bytes()


def test_json_lines_gzip_key_and_patterns(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "one"}\n\n{"body": ""}\n')
    with gzip.open(tmp_path / "in" / "b.jsonl.gz", "wt") as stream:
        stream.write('{"body": "two"}\n')
    words = [
        tmp_path / "in" / "*.jsonl*",
        "--key",
        "body",
        "--tokenizer",
        tokenizer,
        "--output",
        tmp_path / "d",
    ]
    assert tokenize(*words) == 0
    assert [text for text, _ in decoded(tokenizer, tmp_path / "d")] == ["one", "two"]


def test_tables_are_read_row_by_row(tokenizer, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow", reason="comes with flagscale-train[parquet]")
    from pyarrow import parquet

    path, out = tmp_path / "t.parquet", tmp_path / "out" / "t"
    texts = [*TEXTS, None, *(f"row {number}" for number in range(3000))]
    parquet.write_table(pyarrow.table({"body": texts, "n": range(len(texts))}), path, row_group_size=700)
    words = (path, "--tokenizer", tokenizer, "--output", out)
    assert tokenize(*words) == 2
    assert "no column 'text' (it has: body, n): name the text's column with --key" in capsys.readouterr().err
    assert tokenize(*words, "--key", "n") == 2
    assert "n: a column of int64: one of texts is expected" in capsys.readouterr().err
    assert tokenize(*words, "--key", "body", "--json") == 0
    assert decoded(tokenizer, out) == [(text, 0) for text in texts if text]
    told = json.loads(capsys.readouterr().out)
    assert told["num_bytes"] == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-9])
    assert tokenize(*words, "--key", "body", "--overwrite") == 2
    assert "not a whole Parquet file" in capsys.readouterr().err


def test_hidden_files_are_left_out_and_none_is_read_twice(corpus, tokenizer, tmp_path):
    (corpus / ".git").mkdir()
    (corpus / ".git" / "x").write_bytes(b"\xff\xfe")
    assert tokenize(corpus, corpus / "0.txt", "--tokenizer", tokenizer, "--output", tmp_path / "d") == 0
    assert len(decoded(tokenizer, tmp_path / "d")) == 3


def test_without_an_end(corpus, tokenizer, tmp_path):
    assert tokenize(corpus / "0.txt", "--tokenizer", tokenizer, "--output", tmp_path / "d", "--no-eod") == 0
    ids = array("H", (tmp_path / "d.bin").read_bytes()).tolist()
    assert 0 not in ids


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("bad.txt", b"ab\xff", "bad.txt: byte 2 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "bad.jsonl:2: not JSON"),
        ("bad.jsonl", b'{"body": "a"}\n', "bad.jsonl:1: no field 'text' (it has: body)"),
        ("bad.jsonl", b'{"text": 3}\n', "bad.jsonl:1: text: int"),
        ("bad.txt", b"", "holds no text"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tokenizer, tmp_path, capsys, name, data, said):
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    assert tokenize(tmp_path / name, "--tokenizer", tokenizer, "--output", out / "d") == 2
    assert said in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []


def test_wrong_words(corpus, tokenizer, tmp_path, capsys):
    out = tmp_path / "d"
    cases = [
        ([tmp_path / "none", "--tokenizer", tokenizer, "--output", out], "no such file"),
        ([corpus, "--tokenizer", corpus, "--output", out], "no tokenizer.json"),
        ([corpus, "--tokenizer", tokenizer, "--output", out, "--workers", 0], "at least 1"),
        ([corpus, "--tokenizer", tokenizer, "--output", out, "--eod", "<nope>"], "not a token"),
    ]
    for words, said in cases:
        assert tokenize(*words) == 2
        assert said in capsys.readouterr().err


def test_what_exists_is_kept_unless_told(corpus, tokenizer, tmp_path, capsys):
    words = [corpus, "--tokenizer", tokenizer, "--output", tmp_path / "d"]
    assert tokenize(*words) == 0
    before = files_below(tmp_path)
    assert tokenize(*words) == 0
    assert "nothing remains" in capsys.readouterr().err
    assert tokenize(*words, "--no-eod") == 2
    assert "made from other inputs, or with other options" in (said := capsys.readouterr().err)
    assert "--overwrite" in said
    assert files_below(tmp_path) == before
    assert tokenize(*words, "--no-eod", "--overwrite") == 0
    assert files_below(tmp_path).keys() == before.keys()
    assert (tmp_path / "d.bin").read_bytes() != before[tmp_path / "d.bin"]
    words = ["data", "train-tokenizer", str(corpus), "--vocab-size", "300", "--output", str(tokenizer)]
    assert main(words) == 2
    assert main([*words, "--overwrite"]) == 0


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """A limit on the size of files stands for a disk that is full."""
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limit[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)


def test_a_full_disk_says_so_and_leaves_nothing(tokenizer, tmp_path, capsys):
    (tmp_path / "big.txt").write_text("word " * 200_000)
    with files_of_at_most(50_000):
        code = tokenize(tmp_path / "big.txt", "--tokenizer", tokenizer, "--output", tmp_path / "out" / "d")
    assert code == 4
    assert "make room" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full_at_the_very_end_leaves_nothing(corpus, tokenizer, tmp_path, capsys):
    with files_of_at_most(300):  # enough for the ids, too little for the facts beside them
        code = tokenize(corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out" / "d")
    assert code == 4
    assert "make room" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_on_a_full_disk_leaves_nothing(corpus, tmp_path, capsys):
    words = ["data", "train-tokenizer", str(corpus), "--vocab-size", "300"]
    with files_of_at_most(1000):
        code = main([*words, "--output", str(tmp_path / "out" / "tok")])
    assert code == 4
    assert "make room" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_before_the_work(corpus, tokenizer, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "inside")
    for words in (
        ["tokenize", str(tmp_path / "corpus"), "--tokenizer", str(tokenizer)],
        ["train-tokenizer", str(tmp_path / "corpus"), "--vocab-size", "300"],
    ):
        assert main(["data", *words, "--output", where]) == 2
        assert f"--output: {where}: cannot be written" in capsys.readouterr().err


def test_a_tokenizer_has_what_transformers_reads(tokenizer):
    described = json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert described["eos_token"] == "<|endoftext|>"
    assert described["pad_token"] == "<|padding|>"
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary["<|endoftext|>"] == 0


def test_a_small_text_makes_a_small_tokenizer(corpus, tmp_path, capsys):
    words = ["data", "train-tokenizer", str(corpus), "--vocab-size", "9000", "--output", str(tmp_path / "t")]
    assert main(words) == 0
    assert "too small" in capsys.readouterr().err
    assert main([*words[:4], "100", "--output", str(tmp_path / "u")]) == 2
