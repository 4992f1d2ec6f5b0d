"""Logs, and the first cause that is read from them."""

from __future__ import annotations

import pytest

from flagscale_hw import LogLine


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


@pytest.mark.parametrize(
    ("text", "cause"),
    [
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
    assert status.reason == f"a: exited with code 1: {cause}"


def test_a_silent_death_has_no_invented_cause(keeper):
    assert keeper.finish(keeper.shell("exit 7")).reason == "a: exited with code 7"
