"""How the devices of a machine are linked: the matrix, fast islands, network cards, and groups that fit them.

The links come from the vendor's tool where it prints them, and else from where the devices sit on the bus.
The words are those of `nvidia-smi topo`: PIX one PCIe bridge, PXB several, PHB a host bridge, NODE the same
NUMA node, SYS across nodes; every other word is a link of the vendor's own, such as `NV12`, `HCCS` or
`XGMI`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from flagscale_hw.backends.values import clean
from flagscale_hw.host import Host, this_host
from flagscale_hw.machine import Device, Machine

__all__ = ["Nic", "Topology", "parse_matrix", "topology"]

SELF = "X"
_BUS_WORDS = frozenset(
    {"PIX", "PXB", "PHB", "NODE", "SYS", "PCIE", "ETH", "NA", "N/A", "DIS", "UNKNOWN", SELF}
)
_PCI = "/sys/bus/pci/devices"
_TOOLS: Mapping[str, tuple[str, ...]] = {
    "nvidia": ("nvidia-smi", "topo", "-m"),
    "metax": ("mx-smi", "topo", "-n"),
    "amd": ("rocm-smi", "--showtopo"),
    "hygon": ("hy-smi", "--showtopo"),
    "ascend": ("npu-smi", "info", "-t", "topo"),
    "iluvatar": ("ixsmi", "topo", "-m"),
    "mthreads": ("mthreads-gmi", "topo", "-m"),
    "thead": ("ppu-smi", "topo", "-m"),
}
_COLUMN = re.compile(r"([A-Za-z]+)(\d+)")
_NETWORK_CLASS = "02"


@dataclass(frozen=True, kw_only=True)
class Nic:
    """One network card."""

    name: str
    """As programs name it: `mlx5_0`, `eth0`."""
    pci_bus: str | None = None
    numa_node: int | None = None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The links between devices, and from devices to network cards."""

    indices: tuple[int, ...]
    """The devices, by their driver's number; rows and columns follow this order."""
    links: tuple[tuple[str | None, ...], ...] = ()
    """Devices x devices; None where nothing tells, `X` for a device itself."""
    numa_nodes: tuple[int | None, ...] = ()
    nics: tuple[Nic, ...] = ()
    nic_links: tuple[tuple[str | None, ...], ...] = ()
    """Devices x network cards."""
    source: str | None = None
    """The command that told the links, `bus`, or None."""

    @property
    def islands(self) -> tuple[tuple[int, ...], ...]:
        """The groups of devices that are all linked to each other by the vendor's own links.

        Where there are no such links, the devices of one NUMA node; where that is not known either, one
        group.
        """
        if not self.indices:
            return ()
        if any(is_fast(link) for row in self.links for link in row):
            return _cliques(self)
        groups: dict[int | None, list[int]] = {}
        for index, node in zip(self.indices, self.numa_nodes, strict=True):
            groups.setdefault(node, []).append(index)
        return tuple(tuple(group) for group in groups.values())

    def tensor_parallel_groups(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Return, for each power of two from 2, disjoint groups of that size which stay within one island."""
        found: dict[int, tuple[tuple[int, ...], ...]] = {}
        size = 2
        while size <= max(map(len, self.islands), default=0):
            found[size] = tuple(
                island[start : start + size]
                for island in self.islands
                for start in range(0, len(island) - size + 1, size)
            )
            size *= 2
        return found

    def nearest_nics(self, position: int) -> tuple[str, ...]:
        """Return the names of the network cards that are closest to the device in this row."""
        if position >= len(self.nic_links):
            return ()
        order = ("PIX", "PXB", "PHB", "NODE", "SYS")
        ranks = [order.index(link) if link in order else len(order) for link in self.nic_links[position]]
        best = min(ranks, default=len(order))
        if best == len(order):
            return ()
        return tuple(nic.name for nic, rank in zip(self.nics, ranks, strict=True) if rank == best)

    def to_dot(self, chip: str) -> str:
        """Render as an undirected Graphviz graph: islands as boxes, fast links bold, devices and cards.

        Links across the bus between devices are left out where fast ones are there: they would hide those.
        """
        lines = ["graph topology {", "  layout=fdp; overlap=false; splines=true; node [shape=box];"]
        for number, island in enumerate(self.islands):
            nodes = " ".join(f'"{chip} {index}";' for index in island)
            lines.append(f'  subgraph cluster_{number} {{ label="island {number}"; {nodes} }}')
        has_fast = any(is_fast(link) for row in self.links for link in row)
        for row, one in enumerate(self.indices):
            for column in range(row + 1, len(self.indices)):
                link = self.links[row][column] if self.links else None
                if link is not None and (is_fast(link) or not has_fast):
                    style = " style=bold" if is_fast(link) else ""
                    other = self.indices[column]
                    lines.append(f'  "{chip} {one}" -- "{chip} {other}" [label="{link}"{style}];')
            lines += [f'  "{chip} {one}" -- "{name}" [style=dotted];' for name in self.nearest_nics(row)]
        lines += [f'  "{nic.name}" [shape=ellipse];' for nic in self.nics]
        return "\n".join([*lines, "}"])

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return {
            "devices": list(self.indices),
            "matrix": [list(row) for row in self.links],
            "kinds": sorted({link for row in self.links for link in row if link not in (None, SELF)}),
            "numa_nodes": list(self.numa_nodes),
            "nics": [
                {**asdict(nic), "links": [row[column] for row in self.nic_links]}
                for column, nic in enumerate(self.nics)
            ],
            "islands": [list(island) for island in self.islands],
            "tensor_parallel_groups": {
                str(size): [list(group) for group in groups]
                for size, groups in self.tensor_parallel_groups().items()
            },
            "source": self.source,
        }


def is_fast(link: str | None) -> bool:
    """Tell whether a link is one of the vendor's own, faster than the bus."""
    return link is not None and link.upper() not in _BUS_WORDS


def _cliques(topology: Topology) -> tuple[tuple[int, ...], ...]:
    """Put each device into the first island with whose every member it has a fast link."""
    islands: list[list[int]] = []
    for position, row in enumerate(topology.links):
        for island in islands:
            if all(is_fast(row[member]) for member in island):
                island.append(position)
                break
        else:
            islands.append([position])
    return tuple(tuple(topology.indices[position] for position in island) for island in islands)


def topology(machine: Machine, host: Host | None = None, *, timeout_s: float | None = None) -> Topology:
    """Find out how the devices of a machine are linked. Never raises for a tool that does not answer.

    Args:
        machine: as `detect(host)` described it.
        host: where it is; this host when None.
        timeout_s: how long the vendor's tool may take; see `detect`.
    """
    host = this_host() if host is None else host
    timeout_s = host.timeout_s if timeout_s is None else timeout_s
    devices = machine.devices
    numa = tuple(_numa_node(host, device) for device in devices)
    indices = tuple(device.index for device in devices)
    nics = tuple(_nics(host))
    told = _ask(host, machine.chip, timeout_s) if len(devices) > 1 else None
    if told is not None:
        links, by_tool, source = told
        if len(links) == len(devices):
            nic_links = _nic_links_by_tool(by_tool, nics, len(devices)) or _nic_links(host, devices, nics)
            return Topology(
                indices=indices, links=links, numa_nodes=numa, nics=nics, nic_links=nic_links, source=source
            )
    links = tuple(tuple(_on_bus(host, one.pci_bus, other.pci_bus) for other in devices) for one in devices)
    is_known = any(link not in (None, SELF) for row in links for link in row)
    return Topology(
        indices=indices,
        links=links,
        numa_nodes=numa,
        nics=nics,
        nic_links=_nic_links(host, devices, nics),
        source="bus" if is_known else None,
    )


def _ask(
    host: Host, chip: str, timeout_s: float
) -> tuple[tuple[tuple[str | None, ...], ...], dict[str, tuple[str | None, ...]], str] | None:
    words = _TOOLS.get(chip)
    tool = host.find_tool(words[0]) if words else None
    if words is None or tool is None:
        return None
    try:
        answer = host.run([tool, *words[1:]], timeout_s)
    except OSError:
        return None
    links, nics = parse_matrix(answer.output)
    return (links, nics, " ".join(words)) if links else None


def parse_matrix(text: str) -> tuple[tuple[tuple[str | None, ...], ...], dict[str, tuple[str | None, ...]]]:
    """Read the matrix that `nvidia-smi topo -m` and its relatives print, by its header.

    Columns behind the last device or card (CPU and NUMA affinity) are left alone. Of several matrices the one
    with words in it is taken: AMD's tool prints weights and hops first.

    Returns:
        Devices x devices, and for each network card, by the name that programs use, its link to every device.
        Both are empty where there is no matrix.
    """
    text = clean(text)  # nvidia-smi underlines its header even where it writes into a pipe
    names = dict(re.findall(r"^\s*(NIC\d+)\s*:\s*(\S+)", text, re.MULTILINE))
    for header, rows in _matrices(text):
        devices = [name for name in header if not name.startswith("NIC")]
        if any(len(rows.get(name, ())) < len(header) for name in devices):
            continue
        cells = {name: dict(zip(header, rows[name], strict=False)) for name in devices}
        links = tuple(
            tuple(_link(cells[one][other], is_self=one == other) for other in devices) for one in devices
        )
        if all(link in (None, SELF) for row in links for link in row) and len(devices) > 1:
            continue
        nics = {
            names.get(name, name): tuple(_link(cells[device][name], is_self=False) for device in devices)
            for name in header
            if name.startswith("NIC")
        }
        return links, nics
    return (), {}


def _matrices(text: str) -> Iterator[tuple[list[str], dict[str, list[str]]]]:
    header: list[str] = []
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.split()
        columns = _columns(words)
        if columns:
            if rows:
                yield header, rows
            header, rows = columns, {}
        elif words and words[0] in header:
            rows[words[0]] = words[1 : 1 + len(header)]
    if rows:
        yield header, rows


def _columns(words: Sequence[str]) -> list[str]:
    """Return the names at the start of a header line; none when the line is none.

    A row begins with a name too, but its second word is a link (`NV12`), not another name of the same kind.
    """
    columns: list[str] = []
    kind = ""
    for word in words:
        found = _COLUMN.fullmatch(word)
        if found is None or word in columns or (columns and found[1] not in (kind, "NIC")):
            break
        kind = found[1] if not columns else kind
        columns.append(word)
    return columns if len(columns) > 1 else []


def _link(cell: str, *, is_self: bool) -> str | None:
    if is_self:
        return SELF
    # Numbers are weights, hops or bandwidths, no kinds.
    return None if re.fullmatch(r"[\d.]+|N/?A|-|UNKNOWN", cell, re.IGNORECASE) else cell


def _nic_links_by_tool(
    told: Mapping[str, tuple[str | None, ...]], nics: Sequence[Nic], num_devices: int
) -> tuple[tuple[str | None, ...], ...]:
    if not any(nic.name in told for nic in nics):
        return ()
    unknown = (None,) * num_devices
    columns = [told.get(nic.name, unknown) for nic in nics]
    return tuple(tuple(column[row] for column in columns) for row in range(num_devices))


def _nic_links(
    host: Host, devices: Sequence[Device], nics: Sequence[Nic]
) -> tuple[tuple[str | None, ...], ...]:
    return tuple(tuple(_on_bus(host, device.pci_bus, nic.pci_bus) for nic in nics) for device in devices)


def _nics(host: Host) -> Iterator[Nic]:
    """Yield RDMA devices, and the other network interfaces that have hardware behind them."""
    seen: set[str] = set()
    for family in ("infiniband", "net"):
        for name in host.names(f"/sys/class/{family}"):
            address = _target(host, f"/sys/class/{family}/{name}/device")
            kind = host.read(f"{_PCI}/{address}/class") or "" if address else ""
            if address is None or address in seen or kind[2:4] not in (_NETWORK_CLASS, ""):
                continue
            seen.add(address)
            yield Nic(name=name, pci_bus=address, numa_node=_numa_of(host, address))


def _target(host: Host, link: str) -> str | None:
    """Return the PCI address that a link leads to."""
    try:
        name = host.path(link).readlink().name
    except OSError:
        return None
    return name if re.fullmatch(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", name) else None


def _numa_node(host: Host, device: Device) -> int | None:
    if device.numa_node is not None:
        return device.numa_node
    return _numa_of(host, device.pci_bus) if device.pci_bus else None


def _numa_of(host: Host, address: str) -> int | None:
    text = host.read(f"{_PCI}/{address}/numa_node") or ""
    return int(text) if text.isdigit() else None  # the kernel says -1 where it does not know


def _on_bus(host: Host, one: str | None, other: str | None) -> str | None:
    """Return how two PCI functions are linked by the bridges above them."""
    if one is not None and one == other:
        return SELF
    above, above_other = _bridges(host, one), _bridges(host, other)
    if one is None or other is None or above is None or above_other is None:
        return None
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(above, above_other, strict=False)))
    if shared > 1:
        return "PIX" if shared == len(above) == len(above_other) else "PXB"
    return "PHB" if shared else _across_host_bridges(host, one, other)


def _across_host_bridges(host: Host, one: str, other: str) -> str | None:
    nodes = _numa_of(host, one), _numa_of(host, other)
    if None in nodes:
        return None
    return "NODE" if nodes[0] == nodes[1] else "SYS"


def _bridges(host: Host, address: str | None) -> list[str] | None:
    """Return the way from the host bridge down to a function, without the function itself."""
    try:
        steps = host.path(f"{_PCI}/{address}").readlink().parts
    except OSError:
        return None
    return [step for step in steps if step not in ("..", "devices", "sys")][:-1]
