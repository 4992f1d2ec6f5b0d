"""What a host says about itself before a run: the side of preflight that runs there, in the agent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["interface_of", "look", "source_address"]

_SIOCGIFADDR = 0x8915
_ASK_LIMIT_S = 60.0
_VERSIONS = """
import importlib.metadata as m, json, sys
found = {"python": "%d.%d.%d" % sys.version_info[:3]}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def look(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a survey.

    Args:
        request: `head`, the address of node 0; `ports`, numbers that must be free here; `python` and
            `packages`, whose versions are asked; `paths` that must exist; `folder`, in which the run will
            write; `token`, the text of a file that the asking host has put there.
    """
    from flagscale_hw.detection import detect

    address, unreachable = source_address(str(request["head"]))
    return {
        "hostname": socket.gethostname(),
        "machine": detect().to_dict(),
        "supervisor_python": f"{platform.python_version()} ({sys.executable})",
        "address": address,
        "interface": interface_of(address) if address else None,
        "unreachable": unreachable,
        "versions": _versions(request.get("python"), request.get("packages", ())),
        "missing_paths": [path for path in request.get("paths", ()) if not Path(path).exists()],
        "busy_ports": _busy(request.get("ports", ())),
        "is_shared": _is_shared(request.get("folder"), request.get("token")),
        "unwritable": _unwritable(request.get("folder")),
        "time": time.time(),  # last: what came before took its time
    }


def source_address(head: str) -> tuple[str | None, str]:
    """Return the address from which this host would reach another, by its routes; and why there is none.

    Nothing is sent: connecting a datagram socket only asks the kernel for the route.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        return None, f"the name {head!r} is not known here: {error.strerror}"
    with socket.socket(family, kind, protocol) as asking:
        try:
            asking.connect(where)
        except OSError as error:
            return None, f"no route to {where[0]}: {error.strerror}"
        return str(asking.getsockname()[0]), ""


def interface_of(address: str) -> str | None:
    """Name the network interface that has an address."""
    if ":" in address:
        return _interface_of_v6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    if address.startswith("127."):
        return "lo"
    return None


def _interface_of_v6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    with contextlib.suppress(OSError):
        for row in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            fields = row.split()
            if fields[0] == wanted:
                return fields[-1]
    return None


def _versions(python: str | None, packages: Sequence[str]) -> dict[str, str | None]:
    if python is None:
        return {}
    program = shutil.which(python)
    if program is None:
        return {"python": None}
    try:
        done = subprocess.run(
            [program, "-c", _VERSIONS, *packages],
            capture_output=True,
            timeout=_ASK_LIMIT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        found: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"python": None}
    return found


def _busy(ports: Sequence[int]) -> dict[str, str]:
    from flagscale_hw.ports import port_owner

    busy = {}
    for number in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", number))
                trial.listen(1)
            except OSError as error:
                busy[str(number)] = port_owner(number) or str(error.strerror)
    return busy


def _is_shared(folder: str | None, token: Mapping[str, str] | None) -> bool | None:
    if folder is None or token is None:
        return None
    try:
        return (Path(folder) / token["name"]).read_text(encoding="utf-8") == token["text"]
    except OSError:
        return False


def _unwritable(folder: str | None) -> str:
    """Say why a folder, or the nearest one above it that exists, cannot be written; empty when it can."""
    if folder is None:
        return ""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place}: not writable"
