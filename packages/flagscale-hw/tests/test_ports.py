"""Ports: leased before the launcher hears of the run, and never given to two runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from flagscale_hw import LaunchError, launch

BIND = "import socket; s = socket.create_server(('0.0.0.0', {port:web})); print('bound', flush=True); input()"


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_busy_port_is_refused_with_its_owner(keeper, tmp_path, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as taken:
        number = taken.getsockname()[1]
        plan = keeper.plan(keeper.shell("exit 0"), ports={"web": number, "other": None})
        with pytest.raises(
            LaunchError, match=rf"port 'web' \({number}\): in use by pid {os.getpid()} \(.+\): choose"
        ) as refused:
            launch(plan, tmp_path / "run")
    assert refused.value.exit_code == 2  # another port would do: the input, not the run, is what is wrong
    assert not (tmp_path / "run").exists()


def test_a_port_of_another_run_is_refused_even_before_its_engine_has_bound_it(keeper, tmp_path):
    run = keeper.start(keeper.shell("exec sleep 600"), ports={"web": None})
    number = run.status().ports["web"]
    keeper.until(lambda: run.status().state == "running")
    plan = keeper.plan(keeper.shell("exit 0"), ports={"web": number})
    with pytest.raises(LaunchError, match=rf"in use by pid {keeper.pid_of(run, 'supervisor')} "):
        launch(plan, tmp_path / "second")
    run.stop(0.0)
    again = launch(plan, tmp_path / "second")
    keeper.runs.append(again)
    assert again.wait(keeper.patience_s).ports == {"web": number}


def test_an_engine_can_bind_its_port_at_once_and_again_after_a_restart(keeper):
    code = (
        "import os, socket\n"
        "with socket.create_server(('', {port:web})) as s, socket.create_connection(s.getsockname()) as c:\n"
        "    s.accept()[0].close()\n"  # leaves the remains of a connection behind
        "first = not os.path.exists('mark'); open('mark', 'w'); os._exit(3 if first else 0)"
    )
    status = keeper.finish(keeper.python(code), ports={"web": None}, max_restarts=1)
    assert (status.state, status.reason, status.restarts) == ("succeeded", "", 1)


def test_a_wanted_port_is_what_the_engine_gets(keeper):
    with socket.create_server(("", 0)) as free:
        number = free.getsockname()[1]
    status = keeper.finish(keeper.shell("test {port:web} = " + str(number)), ports={"web": number})
    assert status.state == "succeeded"
    assert status.ports == {"web": number}


def test_free_ports_stay_clear_of_those_the_kernel_gives_away(keeper):
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    status = keeper.finish(keeper.shell("exit 0"), ports={"a": None, "b": None, "c": None})
    assert len(set(status.ports.values())) == 3
    assert all(1024 <= number < first for number in status.ports.values())
