"""Logs, and the first cause that is read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagscale_hw import LogLine, killed_rank
from flagscale_hw.logs import follow_logs, read_logs


def test_following_merges_and_ends_with_the_run(keeper):
    code = "for i in 1 2 3; do echo line $i; sleep 0.1; done; printf 'no end'"
    run = keeper.start(keeper.shell(code), keeper.shell("sleep 0.15; echo other >&2"))
    lines = list(run.logs(follow=True))
    assert run.status().is_over
    assert [line.text for line in lines if line.process == "a"] == ["line 1", "line 2", "line 3", "no end"]
    assert [line for line in lines if line.process == "b"] == [LogLine("b", "other")]
    assert list(run.logs()) == [line for line in lines if line.process == "a"] + [LogLine("b", "other")]


def test_following_shows_lines_while_the_run_goes_on(keeper):
    run = keeper.start(keeper.shell("echo first; while ! test -e go; do sleep 0.05; done; echo last"))
    lines = run.logs(follow=True)
    assert next(lines).text == "first"
    assert not run.status().is_over
    (run.dir / "go").touch()
    assert [line.text for line in lines] == ["last"]


def test_bytes_that_are_no_text_and_long_lines_pass(keeper):
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\r\\n' + b'x' * 1000000 + b'\\n\\n')"
    run = keeper.start(keeper.python(code))
    run.wait(keeper.patience_s)
    assert [line.text for line in run.logs()] == ["\ufffd\ufffd", "x" * 1000000, ""]


WORKER = """[rank1]: Traceback (most recent call last):
[rank1]:   File "train.py", line 3, in <module>
[rank1]:     raise torch.OutOfMemoryError("CUDA out of memory")
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
E1123 torch/distributed/elastic: failed (exitcode: 1)
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
"""
HANDLED = (
    """Traceback (most recent call last):
  File "probe.py", line 1, in <module>
ModuleNotFoundError: No module named 'apex'
continuing without apex
"""
    + "step done\n" * 200
)
CHAINED = """(EngineCore pid=9) ERROR 11-23 [core.py:7] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-23 [core.py:7]   File "core.py", line 7, in run
(EngineCore pid=9) ERROR 11-23 [core.py:7] ValueError: No available memory for the cache blocks.
Traceback (most recent call last):
  File "api.py", line 2, in <module>
RuntimeError: Engine core initialization failed. See root cause above.
"""


TORCHRUN = """E1123 17:00:01.1 2391 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1)
Traceback (most recent call last):
  File "torchrun", line 8, in <module>
    sys.exit(main())
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:21
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 3553)
  error_file: <N/A>
  traceback : {said}
============================================================
"""
QUIET = TORCHRUN.format(
    code=1, said="To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"
)
KILLED = TORCHRUN.format(code=-9, said="Signal 9 (SIGKILL) received by PID 3553")
ECHO = WORKER.replace(
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "x.DistError: reset"
)
PYDANTIC = """Traceback (most recent call last):
  File "serve.py", line 1, in <module>
    Config()
pydantic_core._pydantic_core.ValidationError: 1 validation error for Config
max_model_len
  Input should be a valid integer [type=int_parsing, input_value='x', input_type=str]
    For further information visit https://errors.pydantic.dev/2.12/v/int_parsing
"""
STATE = """[rank0]: Traceback (most recent call last):
[rank0]:   File "load.py", line 1, in <module>
[rank0]: RuntimeError: Error(s) in loading state_dict for Linear:
[rank0]: \tMissing key(s) in state_dict: "bias".
"""
BARE = """Traceback (most recent call last):
  File "check.py", line 3, in check
    assert world_size % tp == 0
           ^^^^^^^^^^^^^^^^^^^^
AssertionError
"""
WARNING = """/lib/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked objects
  warnings.warn('resource_tracker: There appear to be %d '
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("tokenizer.json: not found\n" + QUIET, "tokenizer.json: not found"),
        (
            ECHO + KILLED,
            "rank 1 was killed by signal 9 (SIGKILL), which the kernel does when memory is short",
        ),
        (
            PYDANTIC,
            (
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for Config: max_model_len: "
                "Input should be a valid integer"
            ),
        ),
        (
            STATE + QUIET,
            'RuntimeError: Error(s) in loading state_dict for Linear: Missing key(s) in state_dict: "bias".',
        ),
        (BARE + QUIET, "AssertionError: assert world_size % tp == 0"),
        ("no space left\n" + "=" * 60 + "\n", "no space left"),
        ("=" * 60 + "\n", ""),
        ("port 80: in use\n" + WARNING, "port 80: in use"),
        (WORKER, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        (HANDLED + WORKER, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        (CHAINED, "ValueError: No available memory for the cache blocks."),
        ("loading\nbash: line 1: vllm: command not found\n\n", "bash: line 1: vllm: command not found"),
        ("Traceback (most recent call last):\n  File", "File"),
        ("x" * 5000, "x" * 400),
        ("10%\r50%\r100%", "100%"),
    ],
)
def test_the_first_cause_is_found(keeper, tmp_path, text, cause):
    (tmp_path / "text").write_text(text)
    status = keeper.finish(keeper.shell(f"cat {tmp_path}/text; exit 1"))
    assert status.reason == "a: exited with code 1" + (f": {cause}" if cause else "")


def test_a_silent_death_has_no_invented_cause(keeper):
    assert keeper.finish(keeper.shell("exit 7")).reason == "a: exited with code 7"


TABLE = """
RuntimeError: Connection reset by peer
============================================================
Failures:
[1]:
  time      : 2026-01-01_00:00:24
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : {other} (pid: 3552)
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:21
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {root} (pid: 3553)
  traceback : Signal 9 (SIGKILL) received by PID 3553
"""


@pytest.mark.parametrize(
    ("other", "root", "said"),
    [
        (1, -9, "rank 1 was killed by signal 9 (SIGKILL), which the kernel does when memory is short"),
        (-15, -11, "rank 1 was killed by signal 11 (SIGSEGV)"),
        (-15, 1, ""),
        (1, 1, ""),
    ],
)
def test_the_killed_rank_is_named(tmp_path, other, root, said):
    log = tmp_path / "train.log"
    log.write_text("x" * 100_000 + TABLE.format(other=other, root=root))
    assert killed_rank(log) == said


def test_no_log_no_cause(tmp_path):
    assert killed_rank(tmp_path / "none") == ""


@pytest.mark.parametrize(
    "text", ["", "\n", "one", "one\n", "one\ntwo", "one\ntwo\n", "\n\n", "a\n\nb\n\n", "long " * 9 + "\n" * 7]
)
@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 18])
def test_the_last_lines_are_those_of_the_whole(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr("flagscale_hw.logs._CHUNK_BYTES", chunk)
    (tmp_path / "log").write_text(text)
    files = {"a": tmp_path / "log", "missing": tmp_path / "missing"}
    whole = list(read_logs(files))
    for last in range(len(whole) + 2):
        found = list(read_logs(files, last))
        assert found == whole[max(0, len(whole) - last) :]
        assert list(follow_logs(files, lambda: True, last)) == found


def bytes_read():
    """Return what this process has read so far, as the kernel counts it."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_beginning_of_a_long_log_is_not_read(tmp_path):
    log = tmp_path / "log"
    log.write_text("a line that nobody asks for\n" * 1_000_000 + "before\nlast\n")
    then = bytes_read()
    assert [line.text for line in read_logs({"a": log}, 2)] == ["before", "last"]
    assert bytes_read() - then < log.stat().st_size / 10
    lines = follow_logs({"a": log}, lambda: False, 1)
    assert next(lines).text == "last"
    with log.open("ab") as file:
        file.write(b"more\n")
    assert next(lines).text == "more"


def test_a_run_tells_the_last_lines_of_each_process(keeper):
    run = keeper.start(keeper.shell("echo 1; echo 2; echo 3"), keeper.shell("echo x"))
    run.wait(keeper.patience_s)
    assert [(line.process, line.text) for line in run.logs(last=2)] == [("a", "2"), ("a", "3"), ("b", "x")]
    assert [line.text for line in run.logs(follow=True, last=0)] == []
