import pytest

from flagscale_train.cause import killed_rank

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
