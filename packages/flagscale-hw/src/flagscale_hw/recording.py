"""Keep a host as a directory: the files that detection reads, and what the vendors' tools answered.

The directory is a faked host (see `fake.py`) made from a real one: `FLAGSCALE_HW_ROOT` names it, and attached
to an issue it lets anybody see what detection saw there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flagscale_hw.detection import detect
from flagscale_hw.errors import InputError
from flagscale_hw.host import Answer, Host, this_host
from flagscale_hw.machine import Machine
from flagscale_hw.topology import topology

__all__ = ["record_host"]

_PCI = "/sys/bus/pci/devices"
_OF_A_FUNCTION = (
    "vendor",
    "device",
    "class",
    "numa_node",
    "local_cpulist",
    "subsystem_vendor",
    "subsystem_device",
    "mem_info_vram_total",
    "mem_info_vram_used",
    "gpu_busy_percent",
    "product_name",
    "unique_id",
)
_LINKS = ("driver", "physfn")
_NODE_FOLDERS = ("/dev", "/dev/accel", "/dev/dri", "/dev/infiniband")
_FILES = (
    "/etc/hostname",
    "/etc/os-release",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/self/cgroup",
    "/proc/1/cgroup",
    "/proc/sys/kernel/osrelease",
)
# Nodes that every Linux has.
_ORDINARY_NODE = re.compile(r"(tty|vcs|loop|ram|zram|nbd|pty|std)\w*")
_SECRETS = (
    r"\b(?:[A-Z]{3}-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b",  # UUIDs
    r"\b(?:[0-9a-f]{32}|[0-9a-f]{64})\b",  # ids of containers
    r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b",  # MAC addresses
    # Private IPv4 addresses only: versions of drivers have four numbers too.
    r"\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b",
)
_SECRET = re.compile("|".join(_SECRETS), re.IGNORECASE)
# With a digit in it, for in the header of a table the name of the next column follows.
_SERIAL = re.compile(r"(?i)(serial[^:,\n]*[:,]\s*)(?=[\w.-]*\d)([\w.-]{4,})")


@dataclass(frozen=True)
class _Recorder(Host):
    """A host that remembers which files were read and what its tools answered.

    It says that it is not real, so that backends ask the tools: what a library answered cannot be replayed.
    """

    origin: Host = field(default_factory=Host)
    read_files: dict[str, str] = field(default_factory=dict)
    answers: dict[Path, list[tuple[list[str], Answer]]] = field(default_factory=dict)

    @property
    def is_real(self) -> bool:
        """Say no, always."""
        return False

    def read(self, absolute: str) -> str | None:
        """Read and remember."""
        text = super().read(absolute)
        if text is not None:
            self.read_files[absolute] = text
        return text

    def find_tool(self, name: str, *vendor_folders: str) -> Path | None:
        """Look where the real host looks, PATH included."""
        return self.origin.find_tool(name, *vendor_folders)

    def run(self, argv: Sequence[str | Path], timeout_s: float) -> Answer:
        """Run and remember."""
        answer = super().run(argv, timeout_s)
        words = [str(word) for word in argv]
        self.answers.setdefault(Path(words[0]), []).append((words[1:], answer))
        return answer


def record_host(
    directory: Path, *, host: Host | None = None, redact: bool = False, timeout_s: float | None = None
) -> Machine:
    """Record a host.

    Args:
        directory: where to; must not exist, or be empty.
        host: which; this one when None.
        redact: replace host name, UUIDs, serial numbers, ids of containers and addresses in the network, the
            same by the same.
        timeout_s: how long each vendor's tools may take; see `detect`.

    Returns:
        The machine as it was detected while recording.

    Raises:
        InputError: the directory holds something already, or cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: not empty: name a directory that does not exist yet")
    host = this_host() if host is None else host
    recorder = _Recorder(root=host.root, environ=host.environ, origin=host)
    machine = detect(recorder, timeout_s=timeout_s)
    topology(machine, recorder, timeout_s=timeout_s)
    hide = _Redaction(machine) if redact else None
    try:
        _write_all(directory, recorder, hide)
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}: name a place that can be written") from error
    return machine


class _Redaction:
    """Stand-ins for what must not leave the host; equal things stay equal."""

    def __init__(self, machine: Machine) -> None:
        self._known: dict[str, str] = {}
        devices = (*machine.devices, *machine.others)
        # A serial number in a table has no key beside it that would give it away.
        told = {name for device in devices for name in (device.uuid, device.serial) if name}
        # Whole words: a host may be called `vm`, and `vme` is a feature of its processor.
        words = "|".join(map(re.escape, sorted(told | {machine.hostname}, key=len, reverse=True)))
        self._told = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])")

    def text(self, text: str) -> str:
        """Return the text without what would tell whose host it is."""
        text = self._told.sub(lambda found: self._stand_in(found[0]), text)
        text = _SECRET.sub(lambda found: self._stand_in(found[0]), text)
        return _SERIAL.sub(lambda found: found[1] + self._stand_in(found[2]), text)

    def _stand_in(self, secret: str) -> str:
        if secret in self._known.values():
            return secret
        if secret not in self._known:
            # What a UUID begins with says what it is of, and readers go by it.
            head = secret.partition("-")[0] + "-" if secret[:3].isalpha() and "-" in secret else ""
            self._known[secret] = f"{head}redacted-{len(self._known):04d}"
        return self._known[secret]


def _write_all(directory: Path, recorder: _Recorder, hide: _Redaction | None) -> None:
    files = dict(_texts(recorder.origin)) | recorder.read_files
    if hide is not None:
        files["/etc/hostname"] = "recorded"
    hidden = hide.text if hide else str
    for absolute, text in files.items():
        _write(directory, hidden(absolute), hidden(text))
    _write_bus(directory, recorder.origin)
    for folder in _NODE_FOLDERS:
        for name in recorder.origin.names(folder):
            is_folder = recorder.origin.path(f"{folder}/{name}").is_dir()
            if not is_folder and not _ORDINARY_NODE.fullmatch(name):
                _write(directory, f"{folder}/{name}", "")
    for tool, answers in recorder.answers.items():
        _write_tool(directory, tool, answers, hide)
    (directory / "proc").mkdir(parents=True, exist_ok=True)


def _texts(host: Host) -> Iterator[tuple[str, str]]:
    for absolute in _FILES:
        text = host.read(absolute)
        if text is not None:
            yield absolute, text
    for name in host.names("/sys/devices/system/node"):
        if re.fullmatch(r"node\d+", name):
            yield (
                f"/sys/devices/system/node/{name}/cpulist",
                host.read(f"/sys/devices/system/node/{name}/cpulist") or "",
            )


def _write(directory: Path, absolute: str, text: str) -> None:
    path = directory / absolute.lstrip("/")
    # A path below a link of the bus is written where the link leads, once the bus itself is there.
    if not absolute.startswith(f"{_PCI}/"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n" if text else "")


def _write_bus(directory: Path, host: Host) -> None:
    """Copy the small files of every PCI function, and where it sits."""
    for address in host.names(_PCI):
        with contextlib.suppress(OSError):  # it was unplugged meanwhile
            target = host.path(f"{_PCI}/{address}").readlink()
            place = directory / _PCI.lstrip("/") / address
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(os.path.normpath(place.parent / target))
            folder.mkdir(parents=True, exist_ok=True)
            place.symlink_to(target)
            _write_function(folder, host, f"{_PCI}/{address}")
    for family in ("infiniband", "net"):
        for name in host.names(f"/sys/class/{family}"):
            _copy_link(
                host, f"/sys/class/{family}/{name}/device", directory / "sys/class" / family / name / "device"
            )


def _write_function(folder: Path, host: Host, source: str) -> None:
    for name in _OF_A_FUNCTION:
        text = host.read(f"{source}/{name}")
        if text is not None:
            (folder / name).write_text(text + "\n")
    for name in _LINKS:
        _copy_link(host, f"{source}/{name}", folder / name)


def _copy_link(host: Host, source: str, place: Path) -> None:
    with contextlib.suppress(OSError):  # there is none
        target = host.path(source).readlink()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)


def _write_tool(
    directory: Path, tool: Path, answers: Sequence[tuple[list[str], Answer]], hide: _Redaction | None
) -> None:
    """Write a script that says again what the tool said, with its exit code; a hang stays a hang."""
    absolute = f"/usr/bin/{tool.name}" if tool.name != "sh" else ""
    if not absolute:
        return
    kept = f"/usr/share/flagscale-hw-recorded/{tool.name}"
    cases = []
    for number, (words, answer) in enumerate(answers):
        for stream, text in (("out", answer.output), ("err", answer.errors)):
            place = directory / f"{kept}/{number}.{stream}".lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(hide.text(text) if hide else text)
        ending = "exec sleep 86400" if answer.exit_code is None else f"exit {answer.exit_code}"
        shown = f'cat "$here/{number}.out"; cat "$here/{number}.err" >&2; {ending}'
        cases.append(f"{shlex.quote(' '.join(words))}) {shown} ;;")
    lines = ["#!/bin/sh", f'here="${{0%{absolute}}}{kept}"', 'case "$*" in', *cases]
    lines += ['*) echo "was not asked when this host was recorded: $*" >&2; exit 2 ;;', "esac"]
    script = directory / absolute.lstrip("/")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
