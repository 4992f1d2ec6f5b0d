"""Training over real ssh: two and four hosts, and everything that can go wrong with one of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytestmark = pytest.mark.hosts


def hosts(cluster, count):
    return [f"{cluster.address(number)} slots=1" for number in range(1, count + 1)]


def assert_nothing_left(bench, cluster, *numbers):
    assert bench.left() == []
    for number in numbers:
        assert cluster.listening(number) == []


@pytest.mark.parametrize("count", [2, 4])
def test_a_training_runs_over_hosts(bench, cluster, count):
    bench.hosts(*hosts(cluster, count))
    file = bench.write(steps=4)
    said = bench.do("run", str(file))
    assert f"on {count} processes" in said
    assert "step 4/4" in said
    now = bench.status()
    assert now["state"] == "succeeded"
    assert [process["exit_code"] for process in now["processes"]] == [0] * count
    assert {process["host"] for process in now["processes"]} == {cluster.address(n + 1) for n in range(count)}
    logs = bench.do("logs", str(file))
    assert all(f"train-{rank}: " in logs for rank in range(count))
    assert_nothing_left(bench, cluster, *range(1, count + 1))


def test_stop_reaches_every_host(bench, cluster):
    bench.hosts(*hosts(cluster, 2))
    file = bench.write(steps=100000)
    bench.do("run", "--detach", str(file))
    bench.until_step(3)
    assert "stopped after step" in bench.do("stop", str(file))
    assert_nothing_left(bench, cluster, 1, 2)
    assert (bench.folder / "exp" / "checkpoints" / "latest_checkpointed_iteration.txt").is_file()
    bench.do("status", str(file))


def test_a_killed_host_ends_the_others_and_is_named(bench, cluster):
    bench.hosts(*hosts(cluster, 3)[1:])
    file = bench.write(steps=100000)
    bench.do("run", "--detach", str(file))
    bench.until_step(3)
    try:
        cluster.kill(3)
        said = bench.do("logs", "-f", str(file))
        assert said
        now = bench.status()
        assert now["state"] == "failed"
        assert now["what_happened"].startswith(f"{cluster.address(3)}: connection lost"), now["what_happened"]
        assert_nothing_left(bench, cluster, 2)
        bench.do("status", str(file), code=4)
    finally:
        cluster.start_sshd(3)


def test_a_cut_link_ends_both_sides(bench, cluster):
    bench.hosts(*hosts(cluster, 2))
    file = bench.write(steps=100000)
    bench.do("run", "--detach", str(file))
    bench.until_step(3)
    cluster.cut(2)
    try:
        bench.do("logs", "-f", str(file))
        now = bench.status()
        assert now["what_happened"].startswith(f"{cluster.address(2)}: no sign of life"), now["what_happened"]
        cluster.until(lambda: bench.left() == [], "the host that was cut off has ended its part")
        assert_nothing_left(bench, cluster, 1, 2)
    finally:
        cluster.mend(2)


def test_a_killed_rank_is_the_cause_and_not_its_echo(bench, cluster):
    bench.hosts(*hosts(cluster, 2))
    file = bench.write(steps=100000)
    bench.do("run", "--detach", str(file))
    bench.until_step(3)
    cluster.kill_worker(2)
    bench.do("logs", "-f", str(file))
    now = bench.status()
    assert now["what_happened"].startswith("rank 1 was killed by signal 9"), now["what_happened"]
    assert now["reason"].startswith(f"{cluster.address(2)}: train-1: "), now["reason"]
    assert_nothing_left(bench, cluster, 1, 2)


def test_all_hosts_that_are_not_ready_are_named_at_once(bench, cluster):
    cluster.configure("stranger")
    bench.hosts(*hosts(cluster, 2), "no-such-host slots=1")
    said = bench.do("run", str(bench.write(steps=4)), code=3)
    assert f"{cluster.address(1)}: " in said
    assert "Permission denied (publickey)" in said
    assert "ssh-copy-id" in said
    assert "Could not resolve hostname no-such-host" in said
    assert "write its address into the hostfile" in said
    assert "Traceback" not in said
    assert not (bench.folder / "exp" / "runs").exists()
    assert bench.left() == []


def test_a_port_that_is_taken_on_the_first_host_is_refused_with_its_owner(bench, cluster):
    bench.hosts(*hosts(cluster, 2))
    owner = cluster.occupy(1, 29511)
    try:
        said = bench.do("run", str(bench.write(steps=4)), "+experiment.runner.master_port=29511", code=3)
        assert f"{cluster.address(1)}: port 29511: in use by pid {owner.pid}" in said
    finally:
        owner.kill()
        owner.wait()


def test_a_missing_hostfile_is_an_error_and_nothing_runs_here(bench, cluster):
    said = bench.do("run", str(bench.write(steps=4)), code=2)
    assert "hostfile: No such file" in said
    assert bench.left() == []


def test_a_host_with_a_disk_of_its_own(bench, cluster):
    """Host 4 sees another file system below the experiment: said before the start, and logs come home."""
    bench.hosts(*hosts(cluster, 4)[2:])
    file = bench.write(steps=3)
    with cluster.own_disk(4, bench.folder / "exp"):
        said = bench.do("run", str(file), code=3)
        assert f"{cluster.address(4)}: does not see the experiment's directory" in said
        save = bench.folder / "checkpoints"
        bench.do(
            "run", str(file), "+experiment.runner.no_shared_fs=true", f"+train.system.checkpoint.save={save}"
        )
        logs = bench.do("logs", str(bench.folder / "exp"))
        assert "train-1: " in logs
    home = Path(bench.status()["run_dir"]) / "hosts" / cluster.address(4)
    assert "iteration" in (home / "logs" / "train-1.log").read_text()
    assert_nothing_left(bench, cluster, 3, 4)


def test_environment_by_node_and_device_type(bench, cluster):
    bench.hosts(*(f"{line} type={kind}" for line, kind in zip(hosts(cluster, 2), "AB", strict=True)))
    overlay = (
        "+experiment.envs.device_type_specific={A: {EVERYWHERE: typed}, B: {EVERYWHERE: typed}}",
        f"+experiment.envs.node_specific={{{cluster.address(2)}: {{EVERYWHERE: own}}}}",
    )
    said = bench.do("plan", str(bench.write(steps=4)), *overlay)
    assert said.index("EVERYWHERE=typed") < said.index("EVERYWHERE=own")
    assert said.count("GLOO_SOCKET_IFNAME=eth0") == 2


def test_the_survey_sees_address_interface_and_clock(cluster, monkeypatch):
    import flagscale_hw as hw

    monkeypatch.setenv("FLAGSCALE_SSH", f"ssh -F {cluster.folder / 'config'}")
    targets = [hw.Target(name=cluster.address(number)) for number in (1, 2, 3, 4)]
    for number, report in enumerate(hw.survey(targets), 1):
        assert (report.problem, report.address, report.interface) == ("", cluster.address(number), "eth0")
        assert report.machine is not None
        assert report.machine.hostname == socket.gethostname()
        assert abs(report.clock_skew_s) < 60  # one clock: what is left is the way of the answer
