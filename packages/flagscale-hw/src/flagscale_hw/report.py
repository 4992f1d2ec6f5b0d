"""A machine as the JSON document `flagscale-hw/1`: what other programs read.

Its schema is `machine.schema.json`, printed by `flagscale-hw schema`. Within this version members are only
added. Every number has its unit in its name; null means "not known" and never 0.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flagscale_hw.chips import Runtime, runtime
from flagscale_hw.errors import DetectError
from flagscale_hw.flagos import FlagOSProfile, flagos_env
from flagscale_hw.host import Host, this_host
from flagscale_hw.machine import Device, Machine, Problem, Vendor
from flagscale_hw.peaks import DTYPES, peak, specification
from flagscale_hw.topology import Topology

__all__ = ["SCHEMA", "report"]

SCHEMA = "flagscale-hw/1"

_MIB = 1 << 20
_PRESENCE = {"bus_only": "pci_only", "none": "none"}
_SOURCE = {"library": "library", "tool": "cli", "files": "pci"}


def report(
    machine: Machine, host: Host | None = None, *, topology: Topology | None = None, with_usage: bool = True
) -> dict[str, Any]:
    """Return the document that describes a machine.

    Args:
        machine: as `detect(host)` described it.
        host: where it is; this host when None.
        topology: the links between its devices, where they were asked for.
        with_usage: whether to give what changes from second to second.
    """
    host = this_host() if host is None else host
    visible = [device.index for device in machine.visible]
    return {
        "schema": SCHEMA,
        "generated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": _host(machine, host),
        "primary": machine.chip,
        "vendors": [_vendor(vendor, machine) for vendor in machine.vendors],
        "devices": [
            _device(device, visible, with_usage=with_usage) for device in (*machine.devices, *machine.others)
        ],
        "topology": None if topology is None else topology.to_dict(),
        "runtime": _runtime(runtime(machine.chip)),
        "problems": [asdict(problem) for problem in machine.problems],
    }


def _host(machine: Machine, host: Host) -> dict[str, Any]:
    kernel = host.read("/proc/sys/kernel/osrelease")
    nodes = [name for name in host.names("/sys/devices/system/node") if re.fullmatch(r"node\d+", name)]
    return {
        "hostname": machine.hostname,
        "os": _os(host),
        "arch": os.uname().machine if host.is_real else None,
        "kernel": kernel,
        "container": _container(host),
        "wsl": kernel is not None and "microsoft" in kernel.lower(),
        "numa_nodes": len(nodes) or None,
        "cpu_model": machine.cpu_name,
        "cpu_count": machine.num_cpus,
        "memory_mib": machine.memory_bytes // _MIB or None,
    }


def _os(host: Host) -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', host.read("/etc/os-release") or "", re.MULTILINE)
    return found[1] if found else None


def _container(host: Host) -> str | None:
    """Return what contains us, as far as files tell; None on a bare machine."""
    if host.path("/.dockerenv").exists():
        return "docker"
    if host.path("/run/.containerenv").exists():
        return "podman"
    found = re.search(r"(kubepods|docker|containerd|lxc)", host.read("/proc/1/cgroup") or "")
    return found[1] if found else None


def _vendor(vendor: Vendor, machine: Machine) -> dict[str, Any]:
    mine = [device for device in (*machine.devices, *machine.others) if device.chip == vendor.chip]
    is_primary = vendor.chip == machine.chip
    return {
        "name": vendor.chip,
        "presence": _presence(vendor),
        "source": f"plugin:{vendor.origin}"
        if vendor.origin != "built-in"
        else _SOURCE.get(vendor.source or ""),
        "driver": vendor.driver,
        "toolkit": vendor.toolkit,
        "firmware": None,
        "count": vendor.count,
        "visible_count": len(machine.visible) if is_primary else vendor.count,
        "unit": _unit(mine),
        "elapsed_ms": vendor.elapsed_ms,
        "errors": [_error(problem) for problem in _of(vendor.chip, machine.problems)],
    }


def _presence(vendor: Vendor) -> str:
    if vendor.is_forced:
        return "forced"
    if vendor.presence == "usable":
        return "pci" if vendor.on_bus else "node"
    return _PRESENCE[vendor.presence]


def _unit(devices: Sequence[Device]) -> str | None:
    if not devices:
        return None
    return "die" if any(device.die is not None for device in devices) else "chip"


def _of(chip: str, problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.where.split(" ")[0] == chip]


def _error(problem: Problem) -> dict[str, str]:
    return {"what": problem.where, "text": problem.text, "hint": problem.hint}


def _device(device: Device, visible: Sequence[int], *, with_usage: bool) -> dict[str, Any]:
    return {
        "vendor": device.chip,
        "index": device.index,
        "physical_index": device.physical_index,
        "container_index": visible.index(device.index) if device.index in visible else None,
        "uuid": device.uuid,
        "serial": device.serial,
        "pci": device.pci_bus,
        "pci_device_id": device.pci_device_id,
        "numa_node": device.numa_node,
        "cpu_affinity": device.cpu_affinity,
        "node": device.node,
        "board_id": device.board,
        "die": device.die,
        "virtual": device.is_virtual,
        "model": _model(device),
        "model_raw": device.name,
        "memory_mib": _mib(device.memory_total_bytes),
        "ecc": device.is_ecc_on,
        "driver": device.driver,
        "compute_capability": device.compute_capability,
        "slices": [asdict(part) for part in device.slices],
        "health": {"state": device.health or "unknown", "reasons": list(device.health_reasons)},
        "usage": _usage(device) if with_usage else None,
        "peak": _peak(device),
    }


def _model(device: Device) -> str | None:
    row = specification(device.name)
    return device.name if row is None else row.model


def _mib(count: int | None) -> int | None:
    return None if count is None else count // _MIB


def _usage(device: Device) -> dict[str, Any]:
    return {
        "util_pct": device.utilisation_percent,
        "memory_used_mib": _mib(device.memory_used_bytes),
        "temp_c": device.temperature_c,
        "power_w": device.power_w,
        "power_limit_w": device.power_limit_w,
        "processes": None
        if device.processes is None
        else [
            {"pid": one.pid, "name": one.name, "memory_used_mib": _mib(one.memory_used_bytes)}
            for one in device.processes
        ],
    }


def _peak(device: Device) -> dict[str, Any]:
    found = {dtype: peak(device.name, dtype) for dtype in DTYPES}
    row = specification(device.name)
    speed = row.memory_bytes_per_s if row is not None and row.scope == "device" else None
    known = [one for one in found.values() if one is not None]
    rates = {
        f"{dtype}_{'tops' if dtype == 'int8' else 'tflops'}": one.flops_per_s / 1e12 if one else None
        for dtype, one in found.items()
    }
    return {
        **rates,
        "mem_bw_gbps": speed.value / 1e9 if speed else None,
        "source": known[0].source if known else None,
        "grade": known[0].grade if known else None,
        "scope": row.scope if row else None,
    }


def _runtime(row: Runtime) -> dict[str, Any]:
    return {
        "torch_device": row.torch_device,
        "torch_module": row.torch_module,
        "torch_module_present": _is_here(row.torch_module),
        "dist_backend": row.collective_backend,
        "dist_library": row.collective_library,
        "flagcx": {"adaptor": row.flagcx_adaptor, "present": _is_here("flagcx")},
        "visible_env": row.visible_devices_variable,
        "container_env": row.container.variable,
        "ray_resource": row.ray_resource,
        "k8s_resource": row.kubernetes_resource,
        "vllm": {
            "comes_from": row.vllm.comes_from,
            "platform_plugin": row.vllm.entry_point,
            "package": row.vllm.distribution,
            "VLLM_PLUGINS": row.vllm.plugins,
        },
        "megatron": {"trains_with": row.trains_with, "vendor": row.megatron_vendor},
        "te": {"prefer": row.te_prefer, "vendor": row.te_vendor},
        "env_to_set": _flagos(row),
    }


def _flagos(row: Runtime) -> Mapping[str, str]:
    try:
        return flagos_env(FlagOSProfile(), row.chip)
    except DetectError:  # a plug-in's chip that FlagOS has never heard of
        return {}


def _is_here(module: str | None) -> bool | None:
    """Tell whether a module is installed, without importing it; None where there is none to look for."""
    if module is None:
        return None
    from importlib.util import find_spec

    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
