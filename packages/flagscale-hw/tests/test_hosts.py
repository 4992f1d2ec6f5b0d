"""Runs on several hosts, each simulated by a supervisor of its own on this machine; ssh is in tests/hosts."""

from __future__ import annotations

import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from flagscale_hw import (
    File,
    HostEntry,
    HostsNotReady,
    InputError,
    InvalidPlan,
    LaunchError,
    LaunchRefused,
    Plan,
    Process,
    SurveyRequest,
    Target,
    find_nodes,
    judge,
    launch,
    literal,
    open_run,
    read_hostfile,
    survey,
)

SLEEP = "sleep 600"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(*codes, **rest):
    """Plan one shell process on each of as many hosts as there are texts."""
    names = [f"n{number}" for number in range(len(codes))]
    return Plan(
        **{
            "kind": "test",
            "name": "hosts",
            "targets": tuple(Target(name=name, transport="local", address="127.0.0.1") for name in names),
            "processes": tuple(
                Process(name=f"p-{rank}", host=f"n{rank}", rank=rank, argv=("sh", "-c", code))
                for rank, code in enumerate(codes)
            ),
            **rest,
        }
    )


def lines(run):
    return {line.process: line.text for line in run.logs()}


def test_every_host_gets_its_rank_the_addresses_and_the_port_of_the_first(keeper):
    code = "echo {node_rank} {own_address} {address:n1} {port:r} {{port:r}}"
    run = keeper.launch(plan(code, code, ports={"r": None}))
    status = run.wait(keeper.patience_s)
    assert status.state == "succeeded", status
    port = status.ports["r"]
    assert lines(run) == {f"p-{rank}": f"{rank} 127.0.0.1 127.0.0.1 {port} {{port:r}}" for rank in (0, 1)}
    assert [(process.host, process.exit_code) for process in status.processes] == [("n0", 0), ("n1", 0)]
    assert all(process.duration_s >= 0 for process in status.processes)


def test_files_are_placed_on_every_host_with_ports_of_other_hosts_filled_in(keeper):
    code = "cat conf/peer"
    run = keeper.launch(
        plan(
            code,
            code,
            files=(File(path="conf/peer", text="{node_rank} {port:a} {port:b}"),),
            ports={"a": None, "b": None},
            port_hosts={"a": "n1", "b": "n0"},
        )
    )
    status = run.wait(keeper.patience_s)
    ports = f"{status.ports['a']} {status.ports['b']}"
    assert lines(run) == {"p-0": f"0 {ports}", "p-1": f"1 {ports}"}


def test_one_host_that_fails_ends_the_others_and_is_named(keeper):
    run = keeper.launch(plan(SLEEP, "echo no disk >&2; exit 7", SLEEP))
    status = run.wait(keeper.patience_s)
    assert (status.state, status.exit_code) == ("failed", 4)
    assert status.reason == "n1: p-1: exited with code 7: no disk"
    assert [process.fate for process in status.processes][1] == "exit code 7"
    assert status.processes[1].cause == "no disk"
    assert not any(process.is_running for process in status.processes)
    assert keeper.carrying(keeper.run_id(run)) == []


def test_the_echo_of_a_lost_peer_is_not_taken_for_the_cause(keeper, tmp_path):
    flag = tmp_path / "peer"
    echo = f"until [ -e {flag} ]; do sleep 0.05; done; echo RuntimeError: Connection closed by peer; exit 1"
    cause = f"touch {flag}; sleep 2; echo out of memory; exit 9"
    status = keeper.launch(plan(echo, cause)).wait(keeper.patience_s)
    assert status.reason == "n1: p-1: exited with code 9: out of memory"


def test_an_echo_alone_is_reported_after_a_while(keeper):
    status = keeper.launch(plan("echo Connection reset by peer; exit 1", SLEEP)).wait(keeper.patience_s)
    assert status.reason == "n0: p-0: exited with code 1: Connection reset by peer"


GOES_SOFTLY = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"


def services(*codes, **rest):
    made = plan(*codes, **rest)
    return replace(made, processes=tuple(replace(one, is_service=True) for one in made.processes))


def test_a_service_that_ends_softly_ends_the_others_and_is_named(keeper):
    run = keeper.launch(services(GOES_SOFTLY, GOES_SOFTLY))
    keeper.until(lambda: len(list(run.logs())) == 2)
    other, ended = run.wait_ready(keeper.patience_s).processes
    os.kill(ended.pid, signal.SIGTERM)
    status = run.wait(keeper.patience_s)
    assert (status.state, status.exit_code) == ("failed", 4)
    assert status.reason == "n1: p-1: exited with code 0, although nobody had stopped it: bye"
    assert (status.processes[1].exit_code, status.processes[1].cause) == (0, "bye")
    assert keeper.start_time(other.pid) is None
    assert keeper.carrying(keeper.run_id(run)) == []


def test_a_service_that_ends_softly_is_started_again_on_every_host(keeper):
    run = keeper.launch(services(GOES_SOFTLY, GOES_SOFTLY, max_restarts=1))
    keeper.until(lambda: len(list(run.logs())) == 2)
    before = {one.pid for one in run.wait_ready(keeper.patience_s).processes}
    os.kill(max(before), signal.SIGTERM)
    keeper.until(lambda: (status := run.status()).state == "running" and status.restarts == 1)
    after = run.status()
    assert before.isdisjoint(one.pid for one in after.processes)
    assert all(one.is_running for one in after.processes)
    assert run.stop(5.0).state == "stopped"


def test_a_service_that_ended_softly_because_of_another_is_not_the_cause(keeper, tmp_path):
    flag = tmp_path / "peer"
    echo = f"until [ -e {flag} ]; do sleep 0.05; done; exit 0"
    cause = f"touch {flag}; sleep 2; echo out of memory; exit 9"
    status = keeper.launch(services(echo, cause)).wait(keeper.patience_s)
    assert status.reason == "n1: p-1: exited with code 9: out of memory"


def test_stop_reaches_every_host_with_the_polite_signal_first(keeper):
    code = "trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    run = keeper.launch(plan(code, code))
    keeper.until(lambda: len(list(run.logs())) == 2)
    status = run.stop()
    assert (status.state, status.reason) == ("stopped", "stopped on request")
    assert lines(run) == {"p-0": "asked", "p-1": "asked"}
    assert keeper.carrying(keeper.run_id(run)) == []


def test_what_is_deaf_to_the_polite_signal_is_killed_after_its_grace(keeper):
    run = keeper.launch(plan("trap '' TERM; while :; do sleep 0.1; done", SLEEP))
    assert run.wait_ready(keeper.patience_s).state == "running"
    status = run.stop(grace_s=0.2)
    assert [process.signal for process in status.processes] == [signal.SIGKILL, signal.SIGTERM]
    assert keeper.carrying(keeper.run_id(run)) == []


@pytest.mark.parametrize("role", ["supervisor", "guardian"])
def test_when_a_watcher_here_is_killed_every_host_ends(keeper, role):
    run = keeper.launch(plan(SLEEP, SLEEP))
    assert run.wait_ready(keeper.patience_s).state == "running"
    pids = [process.pid for process in run.status().processes]
    keeper.kill(keeper.pid_of(run, role))
    assert run.wait(keeper.patience_s).state == "failed"
    keeper.until(lambda: all(keeper.start_time(pid) is None for pid in pids))


def test_when_an_agent_is_killed_its_host_ends_and_the_run_fails(keeper):
    run = keeper.launch(plan(SLEEP, SLEEP))
    assert run.wait_ready(keeper.patience_s).state == "running"
    part = json.loads((run.dir / "hosts/n1/supervisor.json").read_text())
    agent = keeper.parent(part["guardian"]["pid"])
    keeper.kill(agent)
    status = run.wait(keeper.patience_s)
    assert status.reason.startswith("n1: connection lost: ")
    assert status.processes[1].is_lost
    assert not status.processes[1].is_running
    keeper.until(lambda: keeper.start_time(status.processes[1].pid) is None)


def test_a_run_without_its_launcher_ends_on_every_host_unless_detached(keeper):
    run = keeper.launch(plan(SLEEP, SLEEP), detach=False)
    assert run.wait_ready(keeper.patience_s).state == "running"
    assert open_run(run.dir).status().state == "running"


def test_a_long_log_is_set_aside(keeper):
    line = "x" * 99
    code = f"i=0; while [ $i -lt 2000 ]; do echo {line}; i=$((i+1)); done; sleep 7; echo last"
    run = keeper.launch(plan(code, log_limit_bytes=1 << 16))
    status = run.wait(keeper.patience_s)
    assert status.state == "succeeded", status
    log = run.dir / "hosts/n0/logs/p-0.log"
    assert log.stat().st_size < 1 << 16
    assert log.read_text().splitlines()[-1] == "last"
    assert log.with_name("p-0.log.1").stat().st_size >= 1 << 16


def test_all_hosts_start_again_when_one_failed(keeper, tmp_path):
    tried = tmp_path / "tried"
    code = f"echo here {{node_rank}}; [ -e {tried} ] && exit 0; touch {tried}; exit 5"
    run = keeper.launch(plan(code, "echo there; sleep 1", max_restarts=1))
    status = run.wait(keeper.patience_s)
    assert (status.state, status.restarts) == ("succeeded", 1), status
    assert [line.text for line in run.logs() if line.process == "p-0"] == ["here 0", "here 0"]


def test_a_port_that_is_taken_is_refused_and_nothing_is_left(keeper, tmp_path):
    first = keeper.launch(plan(SLEEP, ports={"r": None}))
    taken = first.wait_ready(keeper.patience_s).ports["r"]
    with pytest.raises(LaunchRefused, match=rf"n0: port 'r' \({taken}\): in use by pid"):
        launch(plan(SLEEP, SLEEP, ports={"r": taken}), tmp_path / "second")
    assert not (tmp_path / "second").exists()
    assert keeper.carrying(str(tmp_path / "second")) == []


def test_every_host_that_cannot_be_reached_is_named_and_nothing_is_left(keeper, tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "ssh: connect to host x port 22: Connection refused" >&2\nexit 255\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("FLAGSCALE_SSH", str(ssh))
    made = plan(SLEEP, SLEEP, SLEEP)
    away = tuple(Target(name=target.name) if rank else target for rank, target in enumerate(made.targets))
    with pytest.raises(LaunchError) as caught:
        launch(plan(SLEEP, SLEEP, SLEEP, targets=away), tmp_path / "run")
    for name in ("n1", "n2"):
        assert f"{name}: ssh: connect to host x port 22: Connection refused: start its ssh server" in str(
            caught.value
        )
    assert not (tmp_path / "run").exists()
    assert keeper.carrying(str(tmp_path / "run")) == []


def test_ssh_gets_the_options_of_the_target_and_one_quoted_command(keeper, tmp_path, monkeypatch):
    """A stand-in for ssh that writes its words down and runs the command, as a login shell would."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words.$$\nfor last; do :; done\nexec sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("FLAGSCALE_SSH", f"{ssh} -F '{tmp_path}/my config'")
    target = Target(name="far", address="127.0.0.1", port=2222, user="me", jump="door,me@gate:22")
    run = keeper.launch(
        plan(
            "true",
            targets=(target,),
            processes=(Process(name="p", host="far", argv=("echo", "it's; $HOME")),),
        )
    )
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert lines(run) == {"p": "it's; $HOME"}
    words = next(tmp_path.glob("words.*")).read_text().splitlines()
    assert words[:2] == ["-F", f"{tmp_path}/my config"]
    assert words[words.index("-p") + 1] == "2222"
    assert words[words.index("-l") + 1] == "me"
    assert words[words.index("-J") + 1] == "door,me@gate:22"
    assert "BatchMode=yes" in words


def test_the_example_for_many_hosts_runs_as_it_stands(keeper, tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("FLAGSCALE_SSH", str(ssh))
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.exists():
        pytest.skip("the tests run outside the tree, without the README")
    (code,) = (
        block.partition("```")[0]
        for block in readme.read_text().split("```python\n")[1:]
        if "targets=" in block.partition("```")[0]
    )
    found: dict = {}
    exec(code, found)
    run = found["run"]
    keeper.runs.append(run)
    status = run.wait(keeper.patience_s)
    assert status.state == "succeeded", status
    assert lines(run)["w-1"] == f"node-1:{status.ports['meet']}"


def test_docker_wraps_the_agent(keeper, tmp_path, monkeypatch):
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\necho "$1 $2 $3" > {tmp_path}/docker\nshift 3\nexec "$@"\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    target = Target(name="n0", transport="local", docker="trainer")
    run = keeper.launch(plan("echo inside", targets=(target,)))
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert (tmp_path / "docker").read_text() == "exec -i trainer\n"


def test_the_supervisor_is_unpacked_once_into_a_private_folder(keeper, tmp_path):
    assert keeper.launch(plan("true", "true")).wait(keeper.patience_s).state == "succeeded"
    (folder,) = (tmp_path / "cache" / "flagscale").glob("hw-*")
    assert stat.S_IMODE((tmp_path / "cache" / "flagscale").stat().st_mode) & 0o022 == 0
    assert (folder / "flagscale_hw" / "agent.py").is_file()
    assert list((tmp_path / "cache" / "flagscale").glob(".hw-*")) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": (Target(name="n0"), Target(name="n0"))}, "two targets are called 'n0'"),
        ({"targets": (Target(name="n0"), Target(name="n1"))}, "target 'n1': no process runs there"),
        ({"targets": (Target(name="-oProxyCommand=x"),)}, "is not a target|give a host name"),
        ({"targets": (Target(name="n0", port=0),)}, "port 0"),
        ({"targets": (Target(name="n0", user="-x"),)}, "user '-x': not a plain word"),
        ({"targets": (Target(name="n0", jump="a b"),)}, "jump 'a b': not a plain word"),
        ({"targets": (Target(name="n0", docker="-it"),)}, "docker '-it': not a plain word"),
        ({"collect": ("../x",)}, "outside the run directory"),
        ({"log_limit_bytes": 1}, "65536 or more"),
        ({"files": (File(path="hosts/x", text=""),)}, "the launcher keeps"),
        ({"files": (File(path="f", text="{address:n9}"),)}, "address of 'n9'"),
    ],
)
def test_a_plan_with_hosts_that_cannot_be_is_refused(changes, match):
    with pytest.raises(InvalidPlan, match=match):
        plan("true", **changes)


def test_a_plan_with_hosts_survives_json():
    made = plan(
        "true",
        "true",
        ports={"r": 1234},
        port_hosts={"r": "n1"},
        collect=("events",),
        log_limit_bytes=1 << 20,
    )
    assert Plan.from_json(made.to_json(masked=False)) == made


def test_a_text_of_the_user_is_never_taken_for_a_placeholder(keeper):
    text = "{port:r} {run_dir} {{run_dir}} {node_rank} {x} {address:n0}"
    run = keeper.launch(plan("", processes=(Process(name="p", host="n0", argv=("echo", literal(text))),)))
    assert run.wait(keeper.patience_s).state == "succeeded"
    assert lines(run) == {"p": text}


# -- hostfiles ----------------------------------------------------------------------------------------------


def hostfile(tmp_path, text):
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_is_read(tmp_path):
    text = "# ours\n10.0.0.1 slots=8 type=A100 # head\n\n  node-2\tslots=4 type=B\n"
    first, second = read_hostfile(hostfile(tmp_path, text))
    assert (first.name, first.slots, first.type) == ("10.0.0.1", 8, "A100")
    assert (second.name, second.slots, second.type) == ("node-2", 4, "B")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=8 tpye=A100", "1: 'tpye': unknown word"),
        ("a slots=8 junk", "1: 'a slots=8 junk': not a host"),
        ("a slots=eight", "slots=eight: give the number"),
        ("a slots=0", "slots=0: give the number"),
        ("a", "slots=: give the number"),
        ("a slots=1 slots=2", "slots: given twice"),
        ("a slots=1\n\na slots=2", "3: a: listed twice (line 1)"),
        ("a slots=1 type=x\nb slots=1", "2: b: no type: either every host has one or none"),
        ("-oProxyCommand=sh slots=1", "1: '-oProxyCommand=sh slots=1': not a host"),
        ("-x slots=1", "target '-x': give a host name"),
        ("# nothing\n", "no host in it"),
    ],
)
def test_a_line_that_is_not_understood_is_an_error_with_its_place(tmp_path, text, said):
    with pytest.raises(InputError) as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert said in str(caught.value)


def test_all_lines_are_reported_at_once(tmp_path):
    with pytest.raises(InputError) as caught:
        read_hostfile(hostfile(tmp_path, "a slots=x\nb slots=1 z=1\n"))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["1", "2"]


def test_a_missing_hostfile_is_an_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_hostfile(tmp_path / "none")


# -- preflight ----------------------------------------------------------------------------------------------


def test_a_survey_asks_all_hosts_and_judges_what_they_say(tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "me@far: Permission denied (publickey)." >&2\nexit 255\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("FLAGSCALE_SSH", str(ssh))
    targets = (
        Target(name="n0", transport="local", address="127.0.0.1"),
        Target(name="n1", transport="local", address="127.0.0.1"),
        Target(name="far"),
    )
    request = SurveyRequest(
        folder=str(tmp_path / "exp"),
        python="python3",
        packages=("no-such-package",),
        paths=("/no/such/file",),
    )
    reports = survey(targets, request)
    good = reports[0]
    assert (good.problem, good.address, good.interface, good.is_shared) == ("", "127.0.0.1", "lo", True)
    assert good.machine is not None
    assert good.machine.num_cpus >= 1
    assert abs(good.clock_skew_s) < 60
    said = [str(obstacle) for obstacle in judge(reports, needs_shared=True)]
    assert (
        "far: me@far: Permission denied (publickey).: `ssh far true` must work without a password: "
        "see ssh-copy-id" in said
    )
    assert "n0: /no/such/file: not there" in said
    assert "n1: no-such-package: not installed" in said
    assert list((tmp_path / "exp").iterdir()) == []


def test_hosts_that_are_ready_become_nodes_in_the_order_of_the_hostfile(tmp_path):
    targets = [Target(name=name, transport="local", address="127.0.0.1") for name in ("n1", "n0")]
    listed = [
        (target, HostEntry(name=target.name, slots=slots, type="H"))
        for slots, target in enumerate(targets, 1)
    ]
    nodes = find_nodes(listed, SurveyRequest(folder=str(tmp_path)), needs_shared=True)
    assert [(one.target.name, one.slots, one.type, one.interface) for one in nodes] == [
        ("n1", 1, "H", "lo"),
        ("n0", 2, "H", "lo"),
    ]
    assert all(one.machine.num_cpus >= 1 for one in nodes)


def test_one_host_that_is_not_ready_stops_all_and_every_obstacle_is_named(tmp_path):
    target = Target(name="n0", transport="local", address="127.0.0.1")
    request = SurveyRequest(folder=str(tmp_path), paths=("/no/such/a", "/no/such/b"))
    with pytest.raises(HostsNotReady) as caught:
        find_nodes([(target, HostEntry(name="n0", slots=1))], request)
    assert str(caught.value).splitlines() == [
        "not every host is ready:",
        "n0: /no/such/a: not there",
        "n0: /no/such/b: not there",
    ]
    assert caught.value.exit_code == 3


def test_differences_between_hosts_are_obstacles():
    from flagscale_hw.preflight import HostReport

    def report(name, **facts):
        return HostReport(target=Target(name=name), address="10.0.0.1", **facts)

    found = judge(
        (
            report("a", versions={"torch": "2.11.0"}, is_shared=True, clock_skew_s=0.1),
            report("b", versions={"torch": "2.11.0"}, is_shared=True, clock_skew_s=-9.0),
            report("c", versions={"torch": "2.9.1"}, is_shared=False),
            report("d", versions={"torch": None}, is_shared=True),
        ),
        needs_shared=True,
    )
    said = {(obstacle.target, obstacle.is_fatal): obstacle.text for obstacle in found}
    assert said["b", False].startswith("its clock is 9.0 s behind")
    assert said["d", True] == "torch: not installed: install 2.11.0 as on the other hosts"
    texts = [str(obstacle) for obstacle in found]
    assert "c: torch 2.9.1: most hosts have 2.11.0: install the same version everywhere" in texts
    assert any(text.startswith("c: does not see the experiment's directory") for text in texts)
    assert not any(text.startswith("a: ") for text in texts)
