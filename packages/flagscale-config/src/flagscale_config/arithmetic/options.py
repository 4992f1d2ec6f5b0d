"""The options of a run as an engine's checks see them, and the shape of a check.

What does not live here: the checks themselves, one module per subject beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale_config.findings import Findings
from flagscale_config.options import option_table

__all__ = [
    "Check",
    "EngineOptions",
    "Options",
    "Rule",
    "clashes",
    "divisors",
    "listed",
    "nearest_multiples",
    "needs",
]


class EngineOptions:
    """Options as their engine would see them: what is not given has the engine's default.

    `options["no_x"]` is whether `no_x` was given, not the value of the attribute it switches off.
    """

    def __init__(self, given: Mapping[str, Any], findings: Findings, engine: str) -> None:
        self.given = given
        self.findings = findings
        self._table = option_table(engine).options

    def __getitem__(self, name: str) -> Any:
        value = self.given.get(name)
        option = self._table.get(name)
        if value is not None or option is None:
            return value
        # The default of `no_x` in the table is that of the attribute it switches off, which is true.
        return False if option.kind == "false" else option.default

    def has(self, *names: str) -> bool:
        """Whether every option named has a value."""
        return all(self[name] is not None for name in names)

    def knows(self, name: str) -> bool:
        """Whether the version of the engine that is meant has an option."""
        return name in self._table

    def values(self, name: str) -> tuple[Any, ...]:
        """Return a list option's values; empty when it has none."""
        value = self[name]
        if value is None:
            return ()
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    def error(self, name: str, message: str) -> None:
        """Report a contradiction at the place where an option is set."""
        self.findings.error("config/arithmetic", self.path(name), message, self[name])

    def note(self, name: str, message: str) -> None:
        """Report that an option does nothing."""
        self.findings.note("config/no-effect", self.path(name), message)

    def path(self, name: str) -> Sequence[str | int]:
        """Return where an option stands in the file; the section around it when it is a default."""
        raise NotImplementedError

    def blame(self, *names: str) -> str:
        """Return the first of the options that is given, to point at."""
        return next((name for name in names if name in self.given), names[0])


class Options(EngineOptions):
    """The options of a training run as Megatron would see them."""

    def __init__(self, given: Mapping[str, Any], findings: Findings, world_size: int | None) -> None:
        super().__init__(given, findings, "megatron")
        self.world_size = world_size

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return int(self["tensor_model_parallel_size"])

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return int(self["pipeline_model_parallel_size"])

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        return int(self["context_parallel_size"])

    @property
    def ep(self) -> int:
        """Expert-parallel size."""
        return int(self["expert_model_parallel_size"])

    @property
    def etp(self) -> int:
        """Tensor-parallel size of the experts; that of the rest when not given."""
        return int(self["expert_tensor_parallel_size"] or self.tp)

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model; weights may be cut finer than tensors."""
        finer = (self["tensor_parallel_num_weight_shards"] or self.tp) // self.tp
        return self.tp * self.pp * self.cp * max(1, finer)

    @property
    def expert_size(self) -> int:
        """Processes that hold one copy of the experts."""
        finer = (self["expert_tensor_parallel_num_weight_shards"] or self.etp) // self.etp
        return self.etp * self.ep * self.pp * max(1, finer)

    @property
    def data_parallel_size(self) -> int | None:
        """Copies of the model, when the number of processes is known and fits."""
        if self.world_size is None or self.world_size % self.model_size:
            return None
        return self.world_size // self.model_size

    @property
    def recompute(self) -> str | None:
        """What is recomputed: `full`, `selective` or nothing."""
        if self["recompute_activations"]:
            return "selective"
        granularity: str | None = self["recompute_granularity"]
        return granularity

    @property
    def position(self) -> str:
        """The kind of position embedding."""
        return "rope" if self["use_rotary_position_embeddings"] else str(self["position_embedding_type"])

    def path(self, name: str) -> Sequence[str | int]:
        """Return where an option stands in the file; the train section when it is a default."""
        return self.findings.option_paths.get(name, ("train",))


Check = Callable[[Options], None]


@dataclass(frozen=True)
class Rule:
    """A contradiction that needs no computing: `message` holds of `name` where `broken` is true.

    The message may name options in braces; their values are put there.
    """

    name: str
    broken: Callable[[Any], Any]
    message: str

    def __call__(self, options: EngineOptions) -> None:
        """Report the contradiction, if it is one."""
        if self.broken(options):
            options.error(self.name, self.message.format_map(options))


def needs(name: str, *others: str, words: str = "") -> list[Rule]:
    """Return the rules that a switch has no meaning without others."""
    return [
        Rule(name, lambda o, other=other: o[name] and not o[other], f"needs {other}{words}")  # type: ignore[misc]
        for other in others
    ]


def clashes(name: str, *others: str) -> list[Rule]:
    """Return the rules that of an option and each of others only one may be given."""
    return [
        Rule(name, lambda o, other=other: o[name] and o[other], f"does not go with {other}; keep one")  # type: ignore[misc]
        for other in others
    ]


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_multiples(number: int, of: int) -> str:
    """Return the multiples of `of` just below and above a number, as text."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def listed(values: Sequence[Any], limit: int = 12) -> str:
    """Return a list of valid values as text."""
    shown = ", ".join(map(str, values[:limit]))
    return shown + (", ..." if len(values) > limit else "")
