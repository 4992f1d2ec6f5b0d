"""Which published model a training configuration is, or in which options it differs from the nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flagscale_config.errors import ConfigError, Problem
from flagscale_config.models import megatron, rwkv
from flagscale_config.models.catalogue import names, published
from flagscale_config.models.facts import ModelFacts
from flagscale_config.models.parts import Rwkv7

if TYPE_CHECKING:
    from flagscale_config.experiment import Experiment

    Subject = Experiment | Mapping[str, Any] | str | PathLike[str]

__all__ = ["Difference", "Match", "facts_of", "match"]

_RWKV = "train_rwkv"
_WEIGHTS = {
    "num_layers": 4,
    "hidden_size": 6,
    "num_attention_heads": 3,
    "num_experts": 4,
    "ffn_hidden_size": 2,
}
"""How much a difference counts when the nearest model is looked for; 1 for the rest."""


@dataclass(frozen=True)
class Difference:
    """One Megatron option in which a configuration is not the published model."""

    option: str
    given: Any
    """None where the configuration leaves the option out."""
    published: Any
    """None where the published model has no such thing."""
    also: tuple[str, ...] = ()
    """Models of the same family that have the given value."""

    def __str__(self) -> str:
        hint = f"; {_text(self.given)} is {' and '.join(self.also)}'s" if self.also else ""
        return f"{self.option}: {_text(self.given)} (published: {_text(self.published)}{hint})"


@dataclass(frozen=True)
class Match:
    """What a configuration is compared with the published models."""

    models: tuple[str, ...]
    """The models it equals, or the nearest one."""
    differences: tuple[Difference, ...]
    """Empty when equal."""
    num_parameters: int | None
    """Parameters of the configured model, as Megatron builds it; None where the vocabulary is not known."""

    @property
    def is_equal(self) -> bool:
        """Whether the configuration is a published model."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "is_equal": self.is_equal}

    def __str__(self) -> str:
        count = f"; {self.num_parameters:,} parameters" if self.num_parameters else ""
        if self.is_equal:
            return f"equals {', '.join(self.models)}{count}"
        lines = [f"nearest is {self.models[0]}, with {len(self.differences)} differences{count}"]
        return "\n".join([*lines, *(f"  {difference}" for difference in self.differences)]).replace(
            " 1 differences", " 1 difference"
        )


def facts_of(subject: Subject, vocab_size: int | None = None) -> ModelFacts:
    """Return the facts of the model that an experiment trains; of the language model where it also sees.

    Args:
        subject: An experiment of type train, Megatron options by canonical name, or the path of a file.
        vocab_size: Rows of the embedding, where the options do not say it.

    Raises:
        ConfigError: it trains nothing, or a model of a kind not described here.
    """
    options, kind = _options(subject, ())
    facts: ModelFacts = kind.read(options, vocab_size)
    return facts


def match(subject: Subject, overrides: Sequence[str] = ()) -> Match:
    """Compare a training configuration with the published models, option by option.

    Compared is what decides the tensors and their meaning, language models only; a vocabulary that is only
    padded is equal, and one that is not known is left out.

    Args:
        subject: An experiment of type train; Megatron options by canonical name; or the path of a training
            file or the name of a recipe, which need be neither finished nor free of mistakes.
        overrides: For a file, in Hydra's grammar.

    Raises:
        ConfigError: it trains nothing, or a model of a kind not described here.
    """
    options, kind = _options(subject, overrides)
    given = kind.read(options)
    wanted = kind.write(given)
    candidates = [
        (facts.name, _differences(options, wanted, facts, kind))
        for facts in map(published, names())
        if _is_of(facts, kind)
    ]
    fewest = min(_weight(differences) for _, differences in candidates)
    best = [(name, differences) for name, differences in candidates if _weight(differences) == fewest]
    models = tuple(name for name, _ in best) if not fewest else (best[0][0],)
    differences = tuple(_explained(difference, best[0][0], kind) for difference in best[0][1])
    is_known = given.vocab_size is not None
    count = given.num_parameters + given.num_mtp_parameters if is_known else None
    return Match(models=models, differences=differences, num_parameters=count)


def _options(subject: Subject, overrides: Sequence[str]) -> tuple[Mapping[str, Any], ModuleType]:
    """Return the options of a training task, and the module that knows what model they mean."""
    if isinstance(subject, Mapping):
        return subject, megatron
    if isinstance(subject, (str, PathLike)):
        from flagscale_config.models.file import read

        options, script = read(subject, overrides)
        return options, rwkv if script == _RWKV else megatron
    if subject.train is None:
        message = f"{subject.source}: trains nothing, so there is no model to compare"
        raise ConfigError([Problem(code="config/model", message=message)])
    return subject.train.options, rwkv if subject.train.script == _RWKV else megatron


def _is_of(facts: ModelFacts, kind: ModuleType) -> bool:
    """Return whether a published model can be written as options of a kind."""
    if kind is rwkv or isinstance(facts.attention, Rwkv7):
        return kind is rwkv and isinstance(facts.attention, Rwkv7)
    return not (facts.linear_attention or facts.norms_per_layer != 2)


def _differences(
    options: Mapping[str, Any], wanted: Mapping[str, Any], facts: ModelFacts, kind: ModuleType
) -> tuple[Difference, ...]:
    """Return in which options a configuration is not the model `facts`."""
    rows = wanted.get("padded_vocab_size")
    if rows is None or options.get("vocab_size") == facts.vocab_size:
        facts = replace(facts, vocab_size=rows)
    model = kind.write(facts)
    return tuple(
        Difference(key, wanted.get(key), model.get(key))
        for key in dict.fromkeys([*model, *wanted])
        if wanted.get(key) != model.get(key)
    )


def _weight(differences: tuple[Difference, ...]) -> int:
    return sum(_WEIGHTS.get(difference.option, 1) for difference in differences)


def _explained(difference: Difference, name: str, kind: ModuleType) -> Difference:
    """Name the models of the same family that have the given value, where it is a size."""
    if not isinstance(difference.given, int) or isinstance(difference.given, bool):
        return difference
    others = [facts for facts in map(published, names()) if facts.family == published(name).family]
    also = [facts.name for facts in others if kind.write(facts).get(difference.option) == difference.given]
    return replace(difference, also=tuple(also[:3]))


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    return str(value).lower() if isinstance(value, bool) else str(value)
