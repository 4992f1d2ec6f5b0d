"""Killed, full, limited, raced: nothing half-made looks whole, and the same command finishes the work."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess

import pytest

from flagscale_convert import (
    DestinationRefused,
    SourceDamaged,
    SourceNotFound,
    WriteFailed,
    convert,
    execution,
    inspect,
    make_plan,
    staging,
    verify,
)

KILLED_WHILE_WRITING = """
import os, signal, sys
from flagscale_convert import make_plan, convert
plan = make_plan(sys.argv[1], sys.argv[2], to=sys.argv[3], shard_bytes=50_000)
limit = float(sys.argv[4])
convert(plan, progress=lambda done, total: done > limit * total and os.kill(os.getpid(), signal.SIGKILL))
"""
KILLED_WHILE_PLACING = """
import os, signal, sys
from pathlib import Path
from flagscale_convert import make_plan, convert
plan = make_plan(sys.argv[1], sys.argv[2], to=sys.argv[3], shard_bytes=150_000)
left, replace = int(sys.argv[4]), Path.replace
def counted(self, target):
    global left
    if str(self).endswith("journal.json.new"):
        return replace(self, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)
Path.replace = counted
convert(plan)
"""


def sources(make, shape):
    model = shape(layers=4)
    return {"hf": make.megatron(model), "torch_dist": make.hf(model)}


def assert_not_whole(path):
    with pytest.raises((SourceDamaged, SourceNotFound)):
        inspect(path)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_killed_while_writing(make, shape, python, tmp_path, to, fraction):
    source, out = sources(make, shape)[to], tmp_path / "out"
    done = python(KILLED_WHILE_WRITING, source, out, to, fraction)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_not_whole(out)
    plan = make_plan(source, out, to=to, shard_bytes=50_000)
    report = convert(plan)
    assert (report.resumed_bytes > 0) == (fraction > 0.3)
    assert verify(source, out).is_equal
    assert not (out / ".flagscale-convert").exists()
    convert(make_plan(source, tmp_path / "fresh", to=to, shard_bytes=50_000))
    for path in (tmp_path / "fresh").rglob("*"):
        if path.suffix in (".safetensors", ".distcp"):
            assert path.read_bytes() == (out / path.relative_to(tmp_path / "fresh")).read_bytes()


@pytest.mark.parametrize("moves", [0, 1, 4])
@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_killed_while_putting_files_in_place(make, shape, python, tmp_path, to, moves):
    source, out = sources(make, shape)[to], tmp_path / "out"
    done = python(KILLED_WHILE_PLACING, source, out, to, moves)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_not_whole(out)
    # Other tools know nothing of the staging folder: for them nothing may be there that they would load.
    assert not (out / "config.json").exists()
    assert not (out / "latest_checkpointed_iteration.txt").exists()
    convert(make_plan(source, out, to=to, shard_bytes=150_000))
    assert verify(source, out).is_equal


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(make, shape, tmp_path, monkeypatch, code):
    source, out = make.megatron(shape(layers=4)), tmp_path / "out"
    plan = make_plan(source, out, to="hf", shard_bytes=150_000)
    written, pwrite = 0, os.pwrite

    def limited(descriptor, data, offset):
        nonlocal written
        written += len(data)
        if written > plan.total_bytes // 2:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(execution.os, "pwrite", limited)
    with pytest.raises(WriteFailed, match="run the same command again") as caught:
        convert(plan)
    assert caught.value.exit_code == 4
    assert_not_whole(out)
    monkeypatch.undo()
    assert convert(plan).resumed_bytes > 0
    assert verify(source, out).is_equal


def test_a_file_size_limit(make, shape, python, tmp_path):
    source, out = make.megatron(shape(layers=4)), tmp_path / "out"
    done = python(
        "import resource, sys\n"
        "from flagscale_convert import make_plan, convert, WriteFailed\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: convert(make_plan(sys.argv[1], sys.argv[2], to='hf'))\n"
        "except WriteFailed as error: print(error); sys.exit(error.exit_code)\n",
        source,
        out,
    )
    assert done.returncode == 4, done.stderr
    assert "a file size limit" in done.stdout
    assert_not_whole(out)


def test_too_little_room_is_told_before_the_first_byte(make, shape, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _path: Usage)
    with pytest.raises(WriteFailed, match=r"1.0 kB are free.*nothing was written"):
        convert(make_plan(make.hf(shape()), tmp_path / "out", to="torch_dist"))
    assert not (tmp_path / "out" / ".flagscale-convert").exists()


def test_a_read_only_place(make, shape, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DestinationRefused, match="cannot be written"):
        convert(make_plan(make.hf(shape()), tmp_path / "file" / "out", to="torch_dist"))


def test_two_conversions_into_one_place(make, shape, tmp_path):
    source, out = make.hf(shape()), tmp_path / "out"
    plan = make_plan(source, out, to="torch_dist")
    with (
        staging.Staging(plan, overwrite=False).opened(),
        pytest.raises(DestinationRefused, match="another conversion"),
    ):
        convert(plan)


def test_an_unfinished_conversion_of_something_else_is_kept(make, shape, python, tmp_path):
    one, other, out = make.hf(shape(layers=4), "one"), make.hf(shape(), "other"), tmp_path / "out"
    python(KILLED_WHILE_WRITING, one, out, "torch_dist", 0.5)
    with pytest.raises(DestinationRefused, match="of another source"):
        convert(make_plan(other, out, to="torch_dist"))
    convert(make_plan(other, out, to="torch_dist"), overwrite=True)
    assert verify(other, out).is_equal


def test_a_source_changed_in_between_is_not_resumed(make, shape, python, tmp_path):
    source, out = make.hf(shape(layers=4)), tmp_path / "out"
    python(KILLED_WHILE_WRITING, source, out, "torch_dist", 0.5)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(DestinationRefused):
        convert(make_plan(source, out, to="torch_dist", shard_bytes=150_000))


def test_a_source_that_shrinks_under_the_conversion(make, shape, tmp_path):
    source = make.hf(shape())
    plan = make_plan(source, tmp_path / "out", to="torch_dist")
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SourceDamaged, match="is truncated"):
        convert(plan)
    assert_not_whole(tmp_path / "out")


def test_interrupt_stops_soon_and_keeps_what_is_whole(make, shape, tmp_path):
    source, out = make.megatron(shape(layers=4)), tmp_path / "out"

    class Stop(KeyboardInterrupt):
        pass

    def interrupt(done, total):
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert(make_plan(source, out, to="hf", shard_bytes=150_000), progress=interrupt)
    assert_not_whole(out)
    assert convert(make_plan(source, out, to="hf", shard_bytes=150_000)).resumed_bytes > 0


KILLED_AT_A_SYSTEM_CALL = """
import os, signal, sys
from pathlib import Path
from flagscale_convert import ParallelLayout, make_plan, convert
sizes = ParallelLayout(tensor_model_parallel_size=2) if sys.argv[3] == "torch" else None
plan = make_plan(sys.argv[1], sys.argv[2], to=sys.argv[3], shard_bytes=60_000, parallel=sizes)
left = int(sys.argv[4])
def counted(function):
    def call(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
os.pwrite, os.fsync, Path.replace = counted(os.pwrite), counted(os.fsync), counted(Path.replace)
convert(plan)
print(left)
"""


@pytest.mark.parametrize("to", ["hf", "torch_dist", "torch"])
def test_killed_at_random_moments(make, shape, python, tmp_path, to):
    """Attempts killed at random writes, flushes and moves; the last one, left alone, ends byte-identical."""
    model = shape(layers=4, heads=4)
    source = make.megatron(model) if to == "hf" else make.hf(model)
    whole = tmp_path / "whole"
    done = python(KILLED_AT_A_SYSTEM_CALL, source, whole, to, 1_000_000)
    calls = 1_000_000 - int(done.stdout)
    generator = random.Random(f"killed {to}")
    out, rounds = tmp_path / "out", 0
    while rounds < 7:
        done = python(KILLED_AT_A_SYSTEM_CALL, source, out, to, generator.randrange(calls))
        if done.returncode == 0:  # earlier attempts had done so much that the moment never came
            shutil.rmtree(out)
            continue
        assert done.returncode == -signal.SIGKILL, done.stderr
        rounds += 1
        if list(out.glob("*")) or (out / ".flagscale-convert").exists():
            marks = ("config.json", "latest_checkpointed_iteration.txt")
            half_made = [name for name in marks if (out / name).exists()]
            if not half_made or (out / ".flagscale-convert").exists():
                assert_not_whole(out)
    assert python(KILLED_AT_A_SYSTEM_CALL, source, out, to, 1_000_000).returncode == 0
    assert not (out / ".flagscale-convert").exists()
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for path in files:
        assert (out / path).read_bytes() == (whole / path).read_bytes(), path


def test_a_disk_that_is_really_full(make, shape, tmp_path):
    """A file system of one megabyte, where this process may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        source = make.hf(shape(layers=4))
        plan = make_plan(source, small / "out", to="torch_dist", shard_bytes=150_000)
        assert plan.total_bytes < 900_000
        (small / "ballast").write_bytes(bytes(700_000))
        with pytest.raises(WriteFailed, match="nothing was written"):
            convert(plan)
        # Room when asked, none when written: another process takes it in between.
        (small / "ballast").unlink()

        def fill(done, total):
            if done > total // 3 and not (small / "ballast").exists():
                (small / "ballast").write_bytes(bytes(shutil.disk_usage(small).free))

        with pytest.raises(WriteFailed, match="the disk is full"):
            convert(plan, progress=fill, workers=1)
        assert_not_whole(small / "out")
        (small / "ballast").unlink()
        assert convert(plan).resumed_bytes > 0
        assert verify(source, small / "out").is_equal
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
