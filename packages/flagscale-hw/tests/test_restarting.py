"""One process of several is started again while the others go on."""

from __future__ import annotations

import http.client
import os
import signal
from dataclasses import replace

import pytest

from flagscale_hw import InvalidPlan, Plan, Probe, Process
from flagscale_hw.restarting import WINDOW_S, Restarts

SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
open("child-{port:a}", "w").write(str(child.pid))
if os.path.exists("broken"):
    raise RuntimeError("made of cheese")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        open("asked-{port:a}", "a").write(self.path + " ")
        body = b'{"is_open": 1}' if os.path.exists("open") else b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


def servers(keeper, max_restarts: int = 2, **rest: object) -> Plan:
    names = ("a", "b")
    return Plan(
        kind="test",
        name="a test",
        processes=tuple(
            Process(
                name=name,
                argv=keeper.python(SERVER.replace("{port:a}", name).replace("PORT", f"{{port:{name}}}")),
                max_restarts=max_restarts,
            )
            for name in names
        ),
        ports=dict.fromkeys(names),
        probes=tuple(
            Probe(url=f"http://127.0.0.1:{{port:{name}}}/", interval_s=0.05, process=name) for name in names
        ),
        **rest,
    )


def answer(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    return connection.getresponse().status


def process(run, name: str):
    (found,) = (one for one in run.status().processes if one.name == name)
    return found


def kill_and_wait(keeper, run, name: str) -> None:
    before = process(run, name)
    keeper.kill(before.pid)
    keeper.until(lambda: process(run, name).restarts == before.restarts + 1)


def test_a_killed_process_comes_back_and_the_other_never_leaves(keeper):
    run = keeper.launch(servers(keeper))
    assert run.wait_ready(keeper.patience_s).state == "ready"
    first, other, ports = process(run, "a"), process(run, "b"), run.status().ports
    child = int((run.dir / "child-a").read_text())
    keeper.kill(first.pid)
    keeper.until(lambda: run.status().state == "starting")
    assert "a: restart 1 of 2 within 10 minutes, after: a: killed by signal 9" in run.status().reason
    assert answer(ports["b"]) == 200
    # What the dead one had started is gone before the next one starts.
    keeper.until(lambda: keeper.start_time(child) is None)
    assert run.wait_ready(keeper.patience_s).state == "ready"
    again = process(run, "a")
    assert (again.restarts, again.pid != first.pid, again.exit_code) == (1, True, None)
    assert again.ready_at > first.ready_at
    assert process(run, "b") == other
    assert answer(ports["a"]) == 200
    assert run.status().restarts == 0
    assert run.stop(5.0).state == "stopped"


def test_a_process_is_ready_when_all_its_probes_have_passed(keeper):
    plan = servers(keeper)
    first = plan.probes[0]
    second = replace(first, url=f"{first.url}second", expect="is_open")
    run = keeper.launch(replace(plan, probes=(*plan.probes, second)))
    asked = run.dir / "asked-a"
    # The second is still asked after the first has been answered, and read.
    keeper.until(lambda: asked.exists() and asked.read_text().partition("/ ")[2].count("second") > 5)
    assert process(run, "a").ready_at is None
    (run.dir / "open").touch()
    assert run.wait_ready(keeper.patience_s).state == "ready"
    assert process(run, "a").ready_at


def test_too_many_ends_are_the_end(keeper):
    run = keeper.launch(servers(keeper, max_restarts=1))
    run.wait_ready(keeper.patience_s)
    kill_and_wait(keeper, run, "a")
    run.wait_ready(keeper.patience_s)
    keeper.kill(process(run, "a").pid)
    status = run.wait(keeper.patience_s)
    assert status.state == "failed"
    assert status.reason.startswith("a: killed by signal 9")


def test_what_ends_before_it_was_ever_ready_is_not_tried_again(keeper):
    plan = servers(keeper)
    run_dir = keeper.folder / "run0"
    run_dir.mkdir()
    (run_dir / "broken").touch()
    run = keeper.launch(plan)
    status = run.wait(keeper.patience_s)
    assert status.state == "failed"
    assert "made of cheese" in status.reason
    assert {one.restarts for one in status.processes} == {0}


def test_a_process_that_no_longer_answers_is_ended_and_started_again(keeper):
    watch = Probe(
        url="http://127.0.0.1:{port:a}/", interval_s=0.1, request_timeout_s=0.3, timeout_s=2.0, process="a"
    )
    run = keeper.launch(servers(keeper, watches=(watch,)))
    run.wait_ready(keeper.patience_s)
    first = process(run, "a")
    os.kill(first.pid, signal.SIGSTOP)
    keeper.until(lambda: process(run, "a").restarts == 1)
    assert run.wait_ready(keeper.patience_s).state == "ready"
    assert process(run, "a").pid != first.pid
    assert "no good answer for 2 s" in (run.dir / "supervisor.log").read_text()
    assert process(run, "b").restarts == 0


def test_stop_while_one_waits_for_its_next_start(keeper):
    run = keeper.launch(servers(keeper))
    run.wait_ready(keeper.patience_s)
    keeper.kill(process(run, "b").pid)
    keeper.until(lambda: run.status().state == "starting")
    assert run.stop(5.0).state == "stopped"
    assert keeper.carrying(keeper.run_id(run)) == []


def test_pauses_double_and_old_restarts_are_forgotten():
    policy = Restarts([Process(name="a", argv=("x",), max_restarts=3), Process(name="b", argv=("x",))])
    assert (policy.governs("a"), policy.governs("b")) == (True, False)
    assert [policy.schedule("a", at) for at in (0.0, 10.0, 20.0, 30.0)] == [1.0, 2.0, 4.0, None]
    assert policy.take_due(23.0) == []
    assert policy.next_due == 24.0
    assert policy.take_due(24.0) == ["a"]
    assert policy.next_due is None
    assert policy.schedule("a", WINDOW_S + 2) == 4.0  # the first one is out of the window


def test_a_plan_says_it_and_reads_it_back(keeper):
    watch = Probe(url="http://127.0.0.1:{port:a}/", process="a")
    plan = servers(keeper, watches=(watch,))
    plan = replace(plan, processes=(replace(plan.processes[0], is_service=True), *plan.processes[1:]))
    assert Plan.from_json(plan.to_json(masked=False)) == plan
    silent = keeper.plan(("x",)).to_json()
    assert not [
        word for word in ('max_restarts": 2', "is_service", "watches", '"process":') if word in silent
    ]
    for wrong in (Probe(url="http://x/"), Probe(url="http://x/", process="c")):
        with pytest.raises(InvalidPlan, match="process"):
            servers(keeper, watches=(wrong,))
    with pytest.raises(InvalidPlan, match="max_restarts"):
        servers(keeper, max_restarts=-1)
