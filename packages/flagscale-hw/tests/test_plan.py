"""Plans: refused when they could not be run as written, and the same text every time."""

from __future__ import annotations

import json

import pytest

from flagscale_hw import File, InvalidPlan, Plan, Probe, Process, StopPolicy


def plan(**changes: object) -> Plan:
    given = {"kind": "serve", "name": "n", "processes": (Process(name="a", argv=("true",)),), **changes}
    return Plan(**given)


def process(**changes: object) -> tuple[Process, ...]:
    return (Process(**{"name": "a", "argv": ("true",), **changes}),)


FULL = plan(
    processes=(
        Process(
            name="server-0", argv=("vllm", "{port:http}", '{"a": [1]}'), env={"KEY": "s3cret-value"}, rank=0
        ),
        Process(name="b", argv=("x", "--api-key=s3cret-value"), cwd="/tmp", env={"A": "漢"}),
    ),
    files=(File(path="conf/x.yaml", text="port: {port:http}\n"),),
    ports={"http": 8000, "free": None},
    probes=(
        Probe(
            url="http://127.0.0.1:{port:http}/v1",
            body={"n": 1},
            headers={"Authorization": "Bearer s3cret-value"},
        ),
    ),
    stop=StopPolicy(signal="SIGINT", grace_s=5.0),
    max_restarts=2,
    facts={"x": [1, None, "ü"]},
    secrets=("KEY",),
)


def test_a_plan_survives_json():
    again = Plan.from_json(FULL.to_json(masked=False))
    assert again == FULL
    assert again.to_json() == FULL.to_json()
    assert isinstance(again.processes[0].argv, tuple)


def test_secrets_are_masked_wherever_their_value_stands():
    shown = FULL.to_json()
    assert "s3cret" not in shown
    data = json.loads(shown)
    assert data["processes"][0]["env"] == {"KEY": "***"}
    assert data["processes"][1]["argv"][1] == "--api-key=***"
    assert data["probes"][0]["headers"] == {"Authorization": "Bearer ***"}


def test_a_short_secret_does_not_blacken_the_plan():
    shown = json.loads(
        plan(processes=process(env={"K": "1"}, argv=("x", "1", "port=11")), secrets=("K",)).to_json()
    )
    assert shown["processes"][0]["argv"] == ["x", "***", "port=11"]


def test_the_text_does_not_depend_on_the_order_of_maps():
    one = plan(processes=process(env={"A": "1", "B": "2"}), facts={"x": 1, "y": 2})
    two = plan(processes=process(env={"B": "2", "A": "1"}), facts={"y": 2, "x": 1})
    assert one.to_json() == two.to_json()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"processes": 3}', '{"kind": 1}'])
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(InvalidPlan, match="not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"processes": ()}, "no process to run"),
        ({"processes": process() * 2}, "two processes are called 'a'"),
        ({"processes": process(name="../x")}, "process name '../x': use a-z"),
        ({"processes": process(name="a\n")}, "process name 'a\\\\n'"),
        ({"processes": process(name="Ü")}, "use a-z"),
        ({"processes": process(name="x" * 101)}, "at most 100 characters"),
        ({"processes": process(argv=())}, "argv is empty"),
        ({"processes": process(argv=("",))}, "argv is empty"),
        ({"processes": process(argv=("x", "a\0b"))}, "NUL"),
        ({"processes": process(env={"A": "\0"})}, "NUL"),
        ({"processes": process(env={"A=B": ""})}, "has no `=`"),
        ({"processes": process(env={"": ""})}, "is not empty"),
        ({"processes": process(argv=("x", "{port:web}"))}, "a: port 'web' is not among"),
        ({"processes": process(env={"A": "{port:web}"})}, "a: port 'web' is not among"),
        ({"processes": process(cwd="/{port:web}")}, "a: port 'web' is not among"),
        ({"files": (File(path="x", text="{port:web}"),)}, "file 'x': port 'web'"),
        ({"probes": (Probe(url="http://h:{port:web}"),)}, "probe: port 'web'"),
        ({"files": (File(path="/etc/x", text=""),)}, "outside the run directory"),
        ({"files": (File(path="a/../../x", text=""),)}, "outside the run directory"),
        ({"files": (File(path="", text=""),)}, "plain names"),
        ({"files": (File(path="a//b", text=""),)}, "plain names"),
        ({"files": (File(path="a\0", text=""),)}, "plain names"),
        ({"files": (File(path="state.json", text=""),)}, "the launcher keeps its own file there"),
        ({"files": (File(path="logs/a.log", text=""),)}, "the launcher keeps its own file there"),
        ({"files": (File(path=".reserve", text=""),)}, "the launcher keeps its own file there"),
        ({"files": (File(path="x", text=""),) * 2}, "two files have the same path"),
        ({"ports": {"web": 0}}, "1 to 65535"),
        ({"ports": {"web": 70000}}, "1 to 65535"),
        ({"ports": {"We b": None}}, "port name"),
        ({"ports": {"a": 80, "b": 80}}, r"port 80 is wanted twice \(a, b\)"),
        ({"probes": (Probe(url="file:///etc/passwd"),)}, "http:// or https://"),
        ({"probes": (Probe(url="http://h", interval_s=0),)}, "interval_s"),
        ({"probes": (Probe(url="http://h", timeout_s=float("nan")),)}, "timeout_s"),
        ({"probes": (Probe(url="http://h", request_timeout_s=-1),)}, "request_timeout_s"),
        ({"stop": StopPolicy(signal="TERM")}, "give a name such as SIGTERM"),
        ({"stop": StopPolicy(grace_s=-1)}, "0 or more"),
        ({"stop": StopPolicy(grace_s=float("inf"))}, "0 or more"),
        ({"max_restarts": -1}, "0 or more"),
    ],
)
def test_what_could_not_be_run_is_refused(changes, match):
    with pytest.raises(InvalidPlan, match=match) as caught:
        plan(**changes)
    assert caught.value.exit_code == 2
