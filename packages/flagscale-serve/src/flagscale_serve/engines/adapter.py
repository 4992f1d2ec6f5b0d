"""What every engine adapter takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Protocol

from flagscale_hw import File
from flagscale_serve.engines.choice import Chosen
from flagscale_serve.service import Instance

__all__ = ["Companion", "Context", "Engine", "Layout", "Rendered", "Seat", "text_of"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one instance is spread over devices; each at least 1."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    data_per_host: int | None = None
    """Copies that the file wants on each host; None: as many as there is room for."""

    @property
    def copy_devices(self) -> int:
        """Devices of one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def devices(self) -> int:
        """Devices of the whole instance."""
        return self.copy_devices * self.data


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The place of one process of an instance among the hosts that the instance spans."""

    rank: int = 0
    num_hosts: int = 1
    head: str = "127.0.0.1"
    """Address of the host of rank 0, as a placeholder of the plan."""
    own: str = "127.0.0.1"
    """Address of this host, as a placeholder of the plan."""
    rendezvous: str = ""
    """Port on the host of rank 0 at which the ranks meet, as a placeholder of the plan."""
    num_devices: int = 1
    """Devices of the instance on each host."""
    interface: str | None = None
    """Network interface by which this host reaches the first one, where it is known."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where an instance will run."""

    python: str
    """Interpreter that has the engine; a bare name is looked up where the engine starts."""
    chip: str
    torch_device: str
    """`cpu`, `cuda`, ..."""
    num_threads: int
    """CPU threads this instance may keep busy."""
    kv_cache_bytes: int
    """Memory this instance may fill with keys and values when the chip is the CPU itself."""
    version: str | None = None
    """Version of the engine in that interpreter; None: not known, the newest one is meant."""
    seat: Seat = field(default_factory=Seat)
    transfer_ports: tuple[str, ...] = ()
    """Ports for moving keys and values between prefill and decode, as placeholders; see the engine."""


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A process that an engine needs beside its own."""

    name: str
    """Appended to the name of the instance."""
    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One process of an instance, translated."""

    argv: tuple[str, ...]
    """Empty: on this host the companions do all the work."""
    env: Mapping[str, str]
    files: tuple[File, ...] = ()
    warnings: tuple[str, ...] = ()
    served_names: tuple[str, ...]
    """The names that this engine really answers to; the first is shown."""
    chosen: tuple[Chosen, ...] = ()
    """Where every option comes from, for `plan --explain`."""
    health_path: str | None = None
    """Where it answers with 200 when it generates tokens, if it cannot be asked for one by itself."""
    companions: tuple[Companion, ...] = ()
    """Processes to start beside it, with the same environment."""


class Engine(Protocol):
    """One serving program.

    Another package brings its own by an entry point in the group `flagscale_serve.engines`: its name is what
    users write after `--engine` (files name only engines that flagscale-config knows), its value is an object
    with these attributes, or a class of such objects.
    """

    @property
    def name(self) -> str:
        """What users write as `engine`."""

    @property
    def program(self) -> str | None:
        """The command that is the engine; None when it is a package of a Python."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Importable names that the engine's Python must have."""

    @property
    def distributions(self) -> tuple[str, ...]:
        """Distributions whose metadata the engine reads at start; the first is its own."""

    @property
    def install(self) -> str:
        """What a person types to get it."""

    @property
    def phases(self) -> tuple[tuple[str, str], ...]:
        """Part of a log line -> what the engine is doing from then on, in order."""

    @property
    def grace_s(self) -> float:
        """Seconds it needs to end by itself after SIGTERM."""

    def layout(self, instance: Instance) -> Layout:
        """Tell how an instance is spread over devices.

        Raises:
            InvalidService: a size is not a whole number of at least 1.
        """

    def render(self, instance: Instance, context: Context) -> Rendered:
        """Translate one instance.

        Raises:
            InvalidService: it asks for what this engine cannot do.
        """


def text_of(launcher: str) -> str:
    """Return a script of this package that the plan places in the run directory."""
    return files("flagscale_serve.engines").joinpath(launcher).read_text(encoding="utf-8")
