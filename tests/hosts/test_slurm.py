"""Real Slurm: a training and plain plans, submitted, followed and cancelled by the same verbs as any run."""

from __future__ import annotations

import re

import pytest

import flagscale_hw as hw

pytestmark = pytest.mark.hosts

LOCAL = (
    "experiment.runner.hostfile=null",
    "+experiment.runner.nnodes=2",
    "+experiment.envs.GLOO_SOCKET_IFNAME=lo",
)


@pytest.fixture
def plain(slurm, tmp_path, monkeypatch):
    """Submit one shell text to two nodes."""
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))

    def submit(code, **rest):
        names = ("node-0", "node-1")
        plan = hw.Plan(
            kind="test",
            name="plain test",
            targets=tuple(hw.Target(name=name) for name in names),
            processes=tuple(
                hw.Process(name=f"p-{rank}", rank=rank, host=name, argv=("bash", "-c", code))
                for rank, name in enumerate(names)
            ),
            **rest,
        )
        return hw.submit(plan, tmp_path / "run")

    return submit


def test_every_node_gets_its_rank_files_ports_and_the_addresses(plain):
    code = 'echo {node_rank} {address:node-0} {own_address} {port:r} $(cat {run_dir}/f) "it\'s" {{run_dir}}'
    run = plain(code, ports={"r": None}, files=(hw.File(path="f", text="{port:r}"),))
    status = run.wait(120)
    assert status.state == "succeeded", (status, (run.dir / "slurm.log").read_text())
    said = {line.process: line.text for line in run.logs()}
    found = re.fullmatch(r"0 127\.0\.0\.1 127\.0\.0\.1 (\d+) \1 it's \{run_dir\}", said["p-0"])
    assert found is not None, said
    assert said["p-1"] == said["p-0"].replace("0 127", "1 127", 1)
    assert [process.exit_code for process in status.processes] == [0, 0]
    assert hw.open_run(run.dir).status() == status
    assert hw.list_runs() == (run,)


def test_the_first_failure_is_told_with_its_log_line_and_the_other_node_ends(plain, tmp_path):
    # A node that ends before the other one has begun leaves that one without an end.
    begun = tmp_path / "begun"
    wait = f"until [ -e {begun} ]; do sleep 0.1; done"
    status = plain(
        f"[ {{node_rank}} = 1 ] && {{ {wait}; echo no disk; exit 7; }}; touch {begun}; sleep 600"
    ).wait(120)
    assert status.state == "failed"
    assert status.reason.endswith("p-1: exit code 7: no disk")
    other = status.processes[0]
    assert other.ended_at is not None
    assert other.exit_code != 0


def test_stop_is_polite_first(plain):
    run = plain("trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.1; done")
    assert run.wait_ready(120).state == "running"
    while len(list(run.logs())) < 2:
        assert not run.status().is_over
    status = run.stop(grace_s=60)
    assert (status.state, status.reason) == ("stopped", "stopped on request")
    said = [(line.process, line.text) for line in run.logs()]
    assert {("p-0", "asked"), ("p-1", "asked")} <= set(said)


def test_a_job_that_was_cancelled_by_others_is_stopped(plain, slurm):
    run = plain("sleep 600")
    assert run.wait_ready(120).state == "running"
    slurm.ask("scancel", run.job)
    status = run.wait(120)
    assert (status.state, status.reason) == ("stopped", f"job {run.job} was cancelled")


def test_what_slurm_refuses_is_told_in_its_words_and_nothing_is_left(plain, tmp_path):
    plan = hw.Plan(kind="t", name="t", processes=(hw.Process(name="p", argv=("true",)),))
    with pytest.raises(hw.LaunchRefused, match=r"(?i)invalid partition"):
        hw.submit(plan, tmp_path / "refused", {"partition": "none"})
    assert not (tmp_path / "refused").exists()


def test_a_training_is_submitted_followed_and_stopped(bench, slurm):
    file = bench.write(steps=100000)
    said = bench.do("run", "--on", "slurm", "--chip", "cpu", str(file), *LOCAL)
    assert "flagscale-train logs -f" in said
    bench.until_step(3)
    assert [process["name"] for process in bench.status()["processes"]] == ["train-0", "train-1"]
    assert "running" in bench.do("status", str(bench.folder / "exp"))
    bench.do("stop", str(bench.folder / "exp"))
    now = bench.status()
    assert (now["state"], now["what_happened"]) == ("stopped", "stopped on request")
    assert bench.left() == []
    assert not slurm.ask("squeue", "-h").strip()
