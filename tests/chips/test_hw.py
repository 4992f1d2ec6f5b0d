"""hw x chip: the faked host is detected, described, and its devices can be selected."""

from flagscale_hw import env, runtime
from flagscale_hw.environment import docker_options, kubernetes_limits
from flagscale_hw.errors import InputError
from flagscale_hw.report import report
from flagscale_hw.testing import faked_host
from flagscale_hw.topology import topology


def test_cell(chip, machine, golden, record_property):
    described = report(machine, with_usage=False)
    chosen = machine.devices[2:4] or machine.devices
    facts = {
        "primary": described["primary"],
        "models": sorted({str(device["model"]) for device in described["devices"]}),
        "memory_mib": sorted({device["memory_mib"] for device in described["devices"]}),
        "count": len(described["devices"]),
        "runtime": {
            key: value
            for key, value in described["runtime"].items()
            if key not in ("flagcx", "torch_module_present")
        },
        "flagcx": runtime(chip).flagcx_adaptor,
        "two_devices": {
            "process": env(chosen),
            "docker": docker_options(chosen),
            "kubernetes": kubernetes(chosen),
        },
        "links": links(chip, machine),
    }
    assert described["problems"] == []
    assert facts["count"] == len(machine.devices)
    golden("hw", facts)
    record_property("note", f"{facts['count']} x {', '.join(facts['models']) or 'no device'}")


def kubernetes(devices):
    try:
        return kubernetes_limits(devices)
    except InputError as refusal:
        return str(refusal)


def links(chip, machine):
    if chip == "mps":  # a Mac's chip is told by its kernel, which no file can fake
        return None
    with faked_host(chip, len(machine.devices)) as host:
        found = topology(machine, host, timeout_s=60)
    return {"source": found.source, "islands": found.islands, "nics": [nic.name for nic in found.nics]}
