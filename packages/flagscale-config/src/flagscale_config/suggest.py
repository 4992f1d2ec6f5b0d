"""What an unknown key may have meant, and where it belongs: all sections and all engines are searched."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from flagscale_config.base import Model
from flagscale_config.options import OptionTable, option_table, spelled

__all__ = ["Hint", "home_of_train_option", "models_in", "suggestion"]

_ENGINES = ("vllm", "sglang", "llama_cpp", "transformers")
_SURE = 0.9
"""Likeness from which a key is a typing error, even if the same key exists somewhere else."""

# Where FlagScale's own files keep an option; any section would do, but this is where a reader looks.
_TRAIN_HOMES = {
    "train.model.optimizer.lr_scheduler": "lr|min_lr|lr_.*",
    "train.model.optimizer": "optimizer|weight_decay.*|.*_weight_decay|(adam|sgd|muon)_.*|clip_grad",
    "train.system.checkpoint": "(async_)?save.*|load.*|ckpt_.*|no_(save|load)_.*|finetune|.*_checkpoint",
    "train.system.logging": "(log|tensorboard|wandb)_.*",
    "train.system.precision": "bf16|fp16|fp[48].*|initial_loss_scale|attention_softmax_in_fp32",
    "train.data.tokenizer": "(tokenizer|vocab|merge)_.*|padded_vocab_size|make_vocab_size_.*",
    "train.data": "data_.*|.*_data_path|split|mock_data|dataloader_.*|num_workers|reset_.*|eod_mask_loss",
    "train.system": ".*_parallel(_size)?|(overlap|recompute|distributed|tp_comm)_.*|.*_pipeline_.*",
}


@dataclass(frozen=True)
class Hint:
    """The end of a message, `; did you mean lr?`, and the same as data."""

    text: str = ""
    suggestion: str | None = None
    """A key or value, or the section in which the key belongs."""
    allowed: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return bool(self.text)


def models_in(annotation: Any) -> list[type[Model]]:
    """Return the models a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]


def _keys(model: type[Model], section: str) -> Iterator[tuple[str, str]]:
    """Yield key and section of every key of a model and of the models in it."""
    for name, field in model.model_fields.items():
        yield name, section
        for inner in models_in(field.annotation):
            is_list = "tuple" in str(field.annotation) or "list" in str(field.annotation)
            yield from _keys(inner, f"{section}.{name}{'[]' if is_list else ''}")


@functools.cache
def _homes() -> Mapping[str, tuple[str, ...]]:
    """Return, for each key of the typed sections, where it belongs."""
    from flagscale_config.experiment import ServeInstance
    from flagscale_config.experiment_section import ExperimentSection

    homes: dict[str, list[str]] = {}
    for name, section in (*_keys(ExperimentSection, "experiment"), *_keys(ServeInstance, "serve[]")):
        if section not in homes.setdefault(name, []) and section != "experiment.deploy":
            homes[name].append(section)
    return {name: tuple(sections) for name, sections in homes.items()}


def _table(engine: str) -> OptionTable | None:
    try:
        return option_table(engine)
    except KeyError:
        return None


def home_of_train_option(name: str) -> str:
    """Return the section in which FlagScale's files keep a Megatron option: `lr` is an optimizer's."""
    found = (home for home, names in _TRAIN_HOMES.items() if re.fullmatch(names, name))
    return next(found, "train.model")


def suggestion(
    name: str, table: OptionTable | None, path: Sequence[str | int], sections: Sequence[str] = ()
) -> Hint:
    """Return `; did you mean ...?` or `; it belongs under ...`, or an empty hint.

    `table` holds the options allowed where the key stands (None outside engine sections), `sections` other
    names allowed there. A typing error is likelier than a wrong section, a wrong section than a far guess.
    """
    name = spelled(str(name))
    near = get_close_matches(name, sections, 1, 0.7)
    is_typo = bool(near) and SequenceMatcher(None, name, near[0]).ratio() >= _SURE
    elsewhere = _elsewhere(name, path)
    if near and (is_typo or not elsewhere):
        return Hint(f"; did you mean {near[0]}?", near[0], tuple(sections))
    if elsewhere:
        return Hint(elsewhere.text, elsewhere.suggestion, tuple(sections))
    option = table.nearest(name) if table is not None else None
    found = Hint(f"; did you mean {option}?", option) if option else _similar_elsewhere(name, path)
    return Hint(found.text, found.suggestion, tuple(sections))


def _elsewhere(name: str, path: Sequence[str | int]) -> Hint:
    """Say in which other part of a file, or under which engine, exactly this key is known."""
    here = ".".join("[]" if isinstance(part, int) else part for part in path[:-1]).replace(".[]", "[]")
    translated = _translated(name, path)
    if translated:
        return translated
    # What the tuner varies are options of an engine: where they are set is the better answer.
    homes = [home for home in _homes().get(name, ()) if home != here and ".auto_tuner" not in home]
    if homes:
        return Hint(f"; it belongs under {' or '.join(homes[:3])}", homes[0])
    if path[:1] != ("train",) and _knows("megatron", name):
        home = home_of_train_option(name)
        what = "it is an option of megatron and belongs" if path[:1] == ("serve",) else "it belongs"
        return Hint(f"; {what} under {home}", home)
    for engine in _ENGINES:
        if engine not in path and _knows(engine, name):
            home = "engine_args" if engine == "vllm" else f"engine_args_specific.{engine}"
            if path[:1] == ("serve",):
                home = f"serve.{path[1]}.{'engine_args_specific.vllm' if engine == 'vllm' else home}"
                return Hint(f"; it is an option of {engine}: {home}", home)
            return Hint(f"; it belongs under serve[].{home}", f"serve[].{home}")
    return Hint()


def _translated(name: str, path: Sequence[str | int]) -> Hint:
    """Say what the engine whose option is expected calls an option of vLLM's."""
    from flagscale_config.translation import counterpart

    engine = next((part for part in path if part in _ENGINES), None)
    word = counterpart(str(engine), name) if engine not in {None, "vllm"} else None
    return Hint(f"; it is vLLM's name: {engine} calls it {word}", word) if word else Hint()


def _knows(engine: str, name: str) -> bool:
    table = _table(engine)
    return table is not None and name in table


def _similar_elsewhere(name: str, path: Sequence[str | int]) -> Hint:
    """Say in which other part of a file a similar key is known."""
    near = get_close_matches(name, _homes(), 1, 0.8)
    if near:
        key = f"{_homes()[near[0]][0]}.{near[0]}"
        return Hint(f"; did you mean {key}?", key)
    megatron = _table("megatron") if path[:1] != ("train",) else None
    option = megatron.nearest(name) if megatron is not None else None
    if option:
        key = f"{home_of_train_option(option)}.{option}"
        return Hint(f"; did you mean {key}?", key)
    return Hint()
