"""Several hosts, one destination: each writes its part, one puts all in place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flagscale_convert import (
    DestinationRefused,
    SourceDamaged,
    SourceNotFound,
    convert,
    inspect,
    make_plan,
    verify,
)
from flagscale_convert.cli import main


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_any_order_make_the_whole(make, shape, tmp_path, order):
    source, out = make.megatron(shape(layers=4)), tmp_path / "out"
    plan = make_plan(source, out, to="hf", shard_bytes=60_000)
    assert len(plan.files) > 6
    for number in order:
        with pytest.raises((SourceDamaged, SourceNotFound)):
            inspect(out)
        report = convert(plan, shard=(number, 3))
        assert bool(report.missing) == (number != order[-1])
    assert not convert(plan, shard=(2, 3)).missing  # a host that comes late finds everything done
    assert verify(source, out).is_equal
    assert not inspect(out, hashes=True).suspicions
    convert(make_plan(source, tmp_path / "alone", to="hf", shard_bytes=60_000))
    for path in (tmp_path / "alone").iterdir():
        if path.name != "flagscale-manifest.json":
            assert path.read_bytes() == (out / path.name).read_bytes()


def test_hosts_at_the_same_time(make, shape, tmp_path):
    source, out = make.hf(shape(layers=4)), tmp_path / "out"
    argv = ["run", str(source), str(out), "--to", "torch_dist", "--shard-size", "60kB", "--json"]
    command = [sys.executable, "-m", "flagscale_convert.cli", *argv]
    hosts = [
        subprocess.Popen([*command, "--shard", f"{number}/3"], stdout=subprocess.PIPE, text=True)
        for number in (1, 2, 3)
    ]
    reports = [json.loads(host.communicate(timeout=120)[0]) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0, 0]
    assert any(not report["missing"] for report in reports)
    assert not (out / ".flagscale-convert").exists()
    assert verify(source, out).is_equal
    assert not inspect(out, hashes=True).suspicions


def test_a_part_can_be_finished_without_the_other_hosts(make, shape, tmp_path, capsys):
    source, out = make.hf(shape(layers=4)), tmp_path / "out"
    argv = ["run", str(source), str(out), "--to", "torch_dist", "--shard-size", "60kB"]
    assert main([*argv, "--shard", "2/2"]) == 0
    assert "files are left to other shards" in capsys.readouterr().out
    assert main(argv) == 0
    assert "were there already" in capsys.readouterr().out
    assert verify(source, out).is_equal


def test_another_conversion_is_not_joined(make, shape, tmp_path):
    one, other, out = make.hf(shape(), "one"), make.hf(shape(), "other"), tmp_path / "out"
    convert(make_plan(one, out, to="torch_dist", shard_bytes=60_000), shard=(1, 2))
    with pytest.raises(DestinationRefused, match="of another source"):
        convert(make_plan(other, out, to="torch_dist", shard_bytes=60_000), shard=(2, 2))


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1/"])
def test_a_wrong_shard_is_a_usage_error(tmp_path, text, capsys):
    assert main(["run", "a", str(tmp_path / "out"), "--to", "hf", "--shard", text]) == 2
    assert "write K/N" in capsys.readouterr().err
