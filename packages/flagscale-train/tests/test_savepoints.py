"""An interrupted `data tokenize` goes on from what is whole, to the files of an uninterrupted one."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagscale_train import inspect, merge, train_tokenizer
from flagscale_train.cli import main
from flagscale_train.data import encode
from flagscale_train.data.savepoints import Savepoints
from flagscale_train.errors import InvalidInput

pytest.importorskip("tokenizers")

SUFFIXES = (".bin", ".idx", ".json")


BATCH_BYTES = 1 << 16


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_BYTES", BATCH_BYTES)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, a corpus of several batches in two formats, and its dataset, made in one go."""
    folder = tmp_path_factory.mktemp("savepoints")
    text = "".join(f"day {number}: the cat sat on the mat, and the dog on the log. " for number in range(900))
    (folder / "sample.txt").write_text(text)
    train_tokenizer([str(folder / "sample.txt")], folder / "tok", vocab_size=500)
    corpus = folder / "corpus"
    corpus.mkdir()
    texts = ["" if number % 7 == 3 else f"{number} {text[number:][:7_000]}" for number in range(40)]
    lines = [{"text": each} for each in texts]
    (corpus / "a.jsonl").write_text("\n".join(map(json.dumps, lines[:25])) + "\n\n")
    (corpus / "b.txt").write_text(text)
    (corpus / "c.jsonl").write_text("\n".join(map(json.dumps, lines[25:])))
    assert main(words_for(folder, folder / "whole" / "d")) == 0
    return folder


def words_for(place, output, *more):
    known = ["--tokenizer", place / "tok", "--output", output]
    return [*map(str, ["data", "tokenize", place / "corpus", *known, *more])]


def assert_whole(place, output):
    for suffix in SUFFIXES:
        ours, theirs = (path.with_name(path.name + suffix) for path in (output, place / "whole" / "d"))
        if suffix == ".json":
            ours, theirs = (json.loads(path.read_text()) | {"prefix": ""} for path in (ours, theirs))
            assert ours == theirs
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(path.suffix for path in output.parent.iterdir()) == sorted(SUFFIXES), "nothing else is left"


def killed(place, output, *more, before, workers=1):
    """Run the command as a process that dies by SIGKILL right before its n-th call of `before`."""
    call, count = before
    script = f"""
import os, signal, sys
def hook(frame_event, arguments, left=[{count}]):
    if frame_event == {call!r} and "partial" in str(arguments[0]):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from flagscale_train.data.savepoints import Savepoints
real = Savepoints.add
def add(self, batch):
    sys.audit("test.before_batch", "partial")
    real(self, batch)
    sys.audit("test.after_batch", "partial")
Savepoints.add = add
from flagscale_train.data import encode
encode._BATCH_BYTES = {BATCH_BYTES}
from flagscale_train.cli import main
if __name__ == "__main__":
    main({words_for(place, output, *more, "--workers", workers)!r})
"""
    file = output.parent.parent / f"killed-{output.parent.name}.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


MOMENTS = {
    "before anything": (("test.before_batch", 1), 0),
    "between ids and savepoint": (("test.before_batch", 3), 2),
    "after a savepoint": (("test.after_batch", 2), 2),
    "after the last batch": (("test.after_batch", 5), 5),
    "before the ids are renamed": (("os.rename", 1), 5),
    "before the facts are renamed": (("os.rename", 2), 5),
    "before the index is renamed": (("os.rename", 3), 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_at_any_moment_costs_no_more_than_a_batch(place, tmp_path, capsys, moment):
    before, batches = MOMENTS[moment]
    output = tmp_path / "out" / "d"
    killed(place, output, before=before)
    assert not (tmp_path / "out" / "d.idx").exists(), "where there is an index, the dataset is whole"
    with Savepoints(output) as points:
        kept = list(points.batches())
    assert len(kept) == batches
    assert main(words_for(place, output)) == 0
    said = capsys.readouterr().err
    assert ("going on after" in said) == bool(batches)
    assert not batches or f"after {sum(batch.num_read for batch in kept):,} documents" in said
    assert_whole(place, output)


def test_killed_after_the_last_rename_nothing_remains(place, tmp_path, capsys):
    output = tmp_path / "out" / "d"
    killed(place, output, before=("os.remove", 4))  # three partial files that are gone, then the savepoints
    assert (tmp_path / "out" / "d.savepoints.partial").exists()
    assert main(words_for(place, output)) == 0
    assert "nothing remains" in capsys.readouterr().err
    assert_whole(place, output)


def test_the_processes_of_a_killed_command_end_too(place, tmp_path):
    output = tmp_path / "out" / "d"
    killed(place, output, before=("test.after_batch", 1), workers=2)
    end = time.monotonic() + 60
    while left := processes_with(str(tmp_path)):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert main(words_for(place, output, "--workers", 2)) == 0
    assert_whole(place, output)


def processes_with(mark):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "cmdline").read_bytes() + os.fsencode((folder / "cwd").readlink()):
                found.append(folder.name)
    return found


@pytest.fixture
def begun(place, tmp_path):
    """What a killed attempt left: two batches."""
    output = tmp_path / "out" / "d"
    killed(place, output, before=("test.after_batch", 2))
    return output


def test_what_is_damaged_is_made_again(place, begun, capsys):
    ids = begun.with_name("d.bin.partial")
    data = bytearray(ids.read_bytes())
    data[-3] ^= 1
    ids.write_bytes(data)
    assert main(words_for(place, begun)) == 0
    assert "going on after" in capsys.readouterr().err
    assert_whole(place, begun)


def test_what_is_cut_off_is_made_again(place, begun):
    ids, points = begun.with_name("d.bin.partial"), begun.with_name("d.savepoints.partial")
    ids.write_bytes(ids.read_bytes()[:-101])
    points.write_bytes(points.read_bytes()[:-5])
    assert main(words_for(place, begun)) == 0
    assert_whole(place, begun)
    points.write_bytes(b"{")
    begun.with_name("d.idx").unlink()
    begun.with_name("d.bin").unlink()
    assert main(words_for(place, begun)) == 0
    assert_whole(place, begun)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place, words: [*words, "--key", "body"], "--key text (now body)"),
        (lambda place, words: [*words, "--no-eod"], "the end of documents 0 (now None"),
        (lambda place, words: [*words[:2], str(place / "sample.txt"), *words[3:]], "sample.txt is new"),
        (lambda place, words: [*words[:2], str(place / "corpus" / "b.txt"), *words[3:]], "a.jsonl is gone"),
        (lambda place, words: [*words[:4], str(other_tokenizer(place)), *words[5:]], "another --tokenizer"),
    ],
    ids=["key", "end", "new input", "less input", "tokenizer"],
)
def test_something_else_than_was_begun_is_refused(place, begun, capsys, change, said):
    before = {path: path.read_bytes() for path in begun.parent.iterdir()}
    assert main(change(place, words_for(place, begun))) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "an interrupted attempt is there" in error
    assert "--overwrite" in error
    assert {path: path.read_bytes() for path in begun.parent.iterdir()} == before


def other_tokenizer(place):
    if not (place / "other").exists():
        train_tokenizer([str(place / "sample.txt")], place / "other", vocab_size=400)
    return place / "other"


def test_a_changed_input_is_named(place, begun, capsys):
    file = place / "corpus" / "c.jsonl"
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    try:
        assert main(words_for(place, begun)) == 2
        assert "corpus/c.jsonl as it was before" in capsys.readouterr().err
    finally:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert main([*words_for(place, begun), "--no-eod", "--overwrite"]) == 0
    assert "going on" not in capsys.readouterr().err, "begun anew"
    assert inspect(begun, count=True).num_eod == 0


def test_two_at_once_are_refused(place, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with Savepoints(tmp_path / "out" / "d"):
        assert main(words_for(place, tmp_path / "out" / "d")) == 2
        assert "another process is making this dataset" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_after_a_full_disk_the_same_command_goes_on(place, tmp_path, capsys):
    output = tmp_path / "out" / "d"
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    size = (place / "whole" / "d.bin").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, limit[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert main(words_for(place, output)) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)
    assert "make room and run the same command again" in capsys.readouterr().err
    assert main(words_for(place, output)) == 0
    assert "going on after" in capsys.readouterr().err
    assert_whole(place, output)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, path.stat().st_size - 2)])
@pytest.mark.parametrize("name", ["d.bin", "d.idx"])
def test_check_names_the_damaged_file(place, tmp_path, capsys, name, damage):
    for suffix in SUFFIXES:
        (tmp_path / f"d{suffix}").write_bytes((place / "whole" / f"d{suffix}").read_bytes())
    assert main(["data", "inspect", str(tmp_path / "d"), "--check"]) == 0
    assert "checksums they were written with" in capsys.readouterr().out
    damage(tmp_path / name)
    assert main(["data", "inspect", str(tmp_path / "d"), "--check"]) == 2
    assert f"{tmp_path / name}: damaged: its SHA-256 is" in capsys.readouterr().err
    with pytest.raises(InvalidInput, match=f"{name}: damaged|not a whole dataset"):
        merge([tmp_path / "d", place / "whole" / "d"], tmp_path / "out" / "both")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_merge_carries_checksums(place, tmp_path, capsys):
    whole = str(place / "whole" / "d")
    assert main(["data", "merge", whole, whole, "--output", str(tmp_path / "both")]) == 0
    assert main(["data", "inspect", str(tmp_path / "both"), "--check"]) == 0
    flip(tmp_path / "both.bin")
    assert main(["data", "inspect", str(tmp_path / "both"), "--check"]) == 2
    assert "both.bin: damaged" in capsys.readouterr().err


def test_counts_that_are_not_the_datasets_are_refused(place, tmp_path, capsys):
    for suffix in SUFFIXES:
        (tmp_path / f"d{suffix}").write_bytes((place / "whole" / f"d{suffix}").read_bytes())
    facts = json.loads((tmp_path / "d.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps(facts | {"num_documents": 7}))
    assert main(["data", "inspect", str(tmp_path / "d")]) == 2
    assert f"d.json: num_documents: 7: the dataset has {facts['num_documents']}" in capsys.readouterr().err


def test_without_checksums_nothing_can_be_checked(place, tmp_path, capsys):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes((place / "whole" / f"d{suffix}").read_bytes())
    assert main(["data", "inspect", str(tmp_path / "d"), "--check"]) == 2
    assert "says no checksums" in capsys.readouterr().err
