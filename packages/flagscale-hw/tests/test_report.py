"""The JSON document: real output obeys the published schema, for every chip."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest

from flagscale_hw import Device, Machine, cli
from flagscale_hw.host import Host
from flagscale_hw.machine import Vendor
from flagscale_hw.report import report
from flagscale_hw.testing import FAKED, fake_host, faked_host
from flagscale_hw.topology import topology


@pytest.fixture(scope="module")
def schema():
    import flagscale_hw

    text = (Path(flagscale_hw.__file__).parent / "machine.schema.json").read_text()
    found = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def obeys(document, schema):
    jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    ).validate(json.loads(json.dumps(document)))


@pytest.mark.parametrize("chip", [*FAKED, "mps"])
def test_every_chip_obeys_the_schema(chip, schema, tmp_path):
    count = {"cpu": 0, "mps": 1}.get(chip, 8)
    machine = fake_host(chip, count)
    made = report(machine, Host(tmp_path), topology=topology(machine, Host(tmp_path)))
    obeys(made, schema)
    assert made["primary"] == chip
    assert len(made["devices"]) == count
    assert made["runtime"]["visible_env"] is None or made["runtime"]["visible_env"].isupper()


def test_this_host_obeys_the_schema(schema, capsys, monkeypatch):
    monkeypatch.delenv("FLAGSCALE_HW_ROOT", raising=False)
    assert cli.main(["--json"]) == 0
    obeys(json.loads(capsys.readouterr().out), schema)


def test_the_schema_is_printed(schema, capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema


# A schema that accepts everything proves nothing.
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("devices", 0, "memory_mib"), -1),
        (("devices", 0, "memory_mib"), "80 GiB"),
        (("devices", 0, "health", "state"), "fine"),
        (("devices", 0, "usage", "util_pct"), 101),
        (("vendors", 0, "presence"), "usable"),
        (("schema",), "flagscale-hw/2"),
        (("topology", "matrix", 0, 0), 3),
        (("runtime", "env_to_set", "TE_FL_STRICT"), 1),
        (("host", "cpu_count"), None),
    ],
)
def test_the_schema_refuses(schema, path, value):
    with faked_host("nvidia", 2) as host:
        machine = fake_host("nvidia", 2)
        made = report(machine, host, topology=topology(machine, host, timeout_s=60))
    obeys(made, schema)
    broken = copy.deepcopy(made)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        obeys(broken, schema)


def test_members_may_be_added_but_none_may_go(schema, tmp_path):
    made = report(fake_host("ascend", 8), Host(tmp_path))
    obeys({**made, "invented_later": 1}, schema)
    for member in made:
        with pytest.raises(jsonschema.ValidationError):
            obeys({name: value for name, value in made.items() if name != member}, schema)


def test_what_is_not_known_is_null(tmp_path):
    bare = Device(chip="ascend", index=0)
    machine = Machine(
        hostname="h",
        num_cpus=1,
        memory_bytes=0,
        chip="ascend",
        devices=(bare,),
        vendors=(Vendor(chip="ascend", presence="usable", source="files", count=1),),
    )
    made = report(machine, Host(tmp_path))
    (device,) = made["devices"]
    assert device["memory_mib"] is None
    assert device["health"] == {"state": "unknown", "reasons": []}
    assert set(device["usage"].values()) == {None}
    assert device["peak"]["bf16_tflops"] is None
    assert made["host"]["memory_mib"] is None
    assert made["vendors"][0]["presence"] == "node"
    assert made["vendors"][0]["source"] == "pci"


def test_presence_and_peaks(tmp_path):
    made = report(fake_host("nvidia", 8), Host(tmp_path))
    assert made["vendors"][0] == {
        **made["vendors"][0],
        "name": "nvidia",
        "presence": "pci",
        "source": "cli",
        "count": 8,
        "visible_count": 8,
        "unit": "chip",
    }
    peaks = made["devices"][0]["peak"]
    assert (peaks["bf16_tflops"], peaks["int8_tops"], peaks["mem_bw_gbps"]) == (989, 1979, 3360)
    assert peaks["source"]
    assert made["devices"][3]["container_index"] == 3
