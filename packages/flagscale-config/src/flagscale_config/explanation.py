"""One key explained: its value, where that comes from, what the engine makes of it, where it may stand."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from os import PathLike
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flagscale_config.base import Model
from flagscale_config.compose import compose
from flagscale_config.errors import ConfigError, Origin, Problem
from flagscale_config.experiment import path_in_file
from flagscale_config.experiment_section import ExperimentSection
from flagscale_config.facts import Fact, facts, table_of
from flagscale_config.loader import check, find
from flagscale_config.masking import MASK, is_secret, masked
from flagscale_config.megatron import renamed_option
from flagscale_config.options import Option, OptionError, spelled
from flagscale_config.rendering import render_engine, render_megatron
from flagscale_config.suggest import home_of_train_option, models_in

__all__ = ["Explanation", "explain"]

_ENGINES = ("megatron", "vllm", "sglang", "llama_cpp", "transformers")


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What is known about one key of an experiment."""

    key: str
    """Where it stands in the file, or would stand."""
    value: Any = None
    """Resolved; `***` for a secret, the default where it is not set."""
    origin: Origin | None = None
    """Where the value comes from; None where it is not set."""
    engine: str = ""
    """Engine and version of the option the key is; empty for FlagScale's own keys."""
    words: tuple[str, ...] = ()
    """The words of the engine's command line."""
    type: str = ""
    choices: tuple[Any, ...] = ()
    default: Any = None
    help: str = ""
    """The engine's or this package's own text."""
    sections: tuple[str, ...] = ()
    """Where the key may stand."""
    checks: tuple[str, ...] = ()
    """Rules across keys that look at this one."""
    problems: tuple[Problem, ...] = ()
    """What `check` says about this key."""

    @property
    def is_set(self) -> bool:
        """Whether the files or an override say it."""
        return self.origin is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON can hold it."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        origin = str(self.origin) if self.origin is not None else None
        problems = [problem.to_dict() for problem in self.problems]
        return {**known, "origin": origin, "is_set": self.is_set, "problems": problems}


def explain(source: str | PathLike[str], key: str, overrides: Sequence[str] = ()) -> tuple[Explanation, ...]:
    """Explain a key of an experiment, as often as it stands there; where it is not set, its default.

    Args:
        source: an experiment file or a recipe; it need be neither complete nor right.
        key: a path (`train.model.num_layers`, `runner.nnodes`) or its last part (`lr`), in any spelling.
        overrides: in Hydra's grammar.

    Raises:
        ConfigError: the files cannot be composed, or nothing has such a key.
    """
    path = find(source)
    known = facts(compose(path, overrides))
    found = [_of_fact(fact) for fact in _matching(known, key)] or list(_unset(key))
    if not found:
        raise ConfigError([_unknown(known, key)])
    problems = check(path, overrides)
    return tuple(replace(each, problems=_about(each.key, problems)) for each in found)


def _about(key: str, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(problem for problem in problems if problem.key == key)


def _matching(known: Sequence[Fact], key: str) -> list[Fact]:
    """Return the facts a key means: the same path, else the same end, else the same option."""
    wanted = spelled(key).split(".")
    of_file = spelled(path_in_file(key) or key)
    exact = [fact for fact in known if spelled(fact.key) == of_file]
    ending = [fact for fact in known if spelled(fact.key).split(".")[-len(wanted) :] == wanted]
    last = wanted[-1]
    same = [fact for fact in known if fact.option is not None and _means(fact, last)]
    return exact or ending or (same if len(wanted) == 1 or wanted[0] in {"train", "serve"} else [])


def _means(fact: Fact, name: str) -> bool:
    table = table_of(fact.engine)
    found = table.find(renamed_option(name)) if table is not None else None
    return found is not None and fact.option is not None and found[0].name == fact.option.name


def _of_fact(fact: Fact) -> Explanation:
    if fact.option is not None:
        made = _of_option(fact.engine, fact.option)
        words = _words(fact.engine, fact.option, fact.value)
        secret = is_secret(str(fact.path[-1]))
        if secret and fact.value not in {None, "???"}:
            words = (words[0], MASK) if words else ()
        return replace(made, key=fact.key, value=_shown(fact), origin=fact.origin, words=words)
    holder = _holder(fact.path)
    made = _of_field(fact.key, holder) if holder is not None else Explanation(key=fact.key)
    return replace(made, value=_shown(fact), origin=fact.origin)


def _shown(fact: Fact) -> Any:
    """Return a value that may be printed."""
    return masked({str(fact.path[-1]): fact.value})[str(fact.path[-1])]


def _words(engine: str, option: Option, value: Any) -> tuple[str, ...]:
    """Return the words an option becomes; none where the value is missing or does not fit."""
    if value is None or value == "???":
        return ()
    render = render_megatron if engine == "megatron" else functools.partial(render_engine, engine)
    try:
        words: tuple[str, ...] = render({option.name: value})
    except (ConfigError, OptionError):
        return ()
    return words


def _of_option(engine: str, option: Option) -> Explanation:
    table = table_of(engine)
    version = table.version if table is not None else ""
    kind = {
        "true": "switch",
        "false": "switch",
        "pair": "switch",
        "json": "JSON",
        "list": f"list of {option.type}",
    }
    home = home_of_train_option(option.name)
    # The default of `no_x` in the table is that of the attribute it switches off.
    default = False if option.kind == "false" else option.default
    sections = {
        "megatron": (home, "any other section of train.system, train.model or train.data"),
        "vllm": ("serve[].engine_args", "serve[].engine_args_specific.vllm"),
    }
    return Explanation(
        key=f"{home}.{option.name}" if engine == "megatron" else option.name,
        value=default,
        engine=f"{engine} {version}",
        type=kind.get(option.kind, option.type),
        choices=option.choices,
        default=default,
        help=option.help,
        sections=sections.get(engine, (f"serve[].engine_args_specific.{engine}",)),
        checks=tuple(_rules().get(option.name, ())) if engine == "megatron" else (),
    )


def _of_field(key: str, holder: type[Model]) -> Explanation:
    section, _, name = key.rpartition(".")
    field = holder.model_fields[name]
    default = None if field.default is PydanticUndefined else field.default
    is_plain = not isinstance(default, BaseModel)
    return Explanation(
        key=key,
        value=default if is_plain else None,
        type=_type_words(field),
        default=default if is_plain else None,
        help=holder.descriptions().get(name, ""),
        sections=(section,),
    )


def _type_words(field: FieldInfo) -> str:
    """Return a field's type as users think of it."""
    text = str(field.annotation)
    if isinstance(field.annotation, type):
        text = field.annotation.__name__
    for name, word in (
        ("typing.", ""),
        ("flagscale_config.runner.", ""),
        ("NoneType", "null"),
        ("None", "null"),
    ):
        text = text.replace(name, word)
    return text if "Annotated" not in text else text.partition("Annotated[")[2].partition(",")[0]


def _holder(path: Sequence[str | int]) -> type[Model] | None:
    """Return the model that has the field at a path below `experiment`; None where there is none."""
    if path[:1] != ("experiment",):
        return None
    holder: type[Model] | None = None
    inner: list[type[Model]] = [ExperimentSection]
    for part in path[1:]:
        holder = inner[0] if inner else None
        if holder is None or part not in holder.model_fields:
            return None
        inner = models_in(holder.model_fields[str(part)].annotation)
    return holder


def _unset(key: str) -> Iterator[Explanation]:
    """Yield what a key would be that the files do not set."""
    name = key.rpartition(".")[2]
    for engine in _ENGINES:
        table = table_of(engine)
        found = (
            table.find(renamed_option(name) if engine == "megatron" else name) if table is not None else None
        )
        is_there = "." not in key or key.startswith("train.") == (engine == "megatron")
        if found is not None and is_there:
            yield _of_option(engine, found[0])
    for path, holder in _fields(ExperimentSection, ("experiment",)):
        dotted = ".".join(path)
        if f".{dotted}".endswith(f".{spelled(path_in_file(key) or key)}"):
            yield _of_field(dotted, holder)


def _fields(model: type[Model], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type[Model]]]:
    for name, field in model.model_fields.items():
        yield (*path, name), model
        for inner in models_in(field.annotation):
            yield from _fields(inner, (*path, name))


def _unknown(known: Sequence[Fact], key: str) -> Problem:
    """Say that nothing has such a key, and which one was probably meant."""
    name = spelled(key).rpartition(".")[2]
    names = {fact.key.rpartition(".")[2]: fact.key for fact in known}
    near = get_close_matches(name, names, 1, 0.7)
    tables = (table_of(engine) for engine in _ENGINES)
    options = (table.nearest(name) for table in tables if table is not None)
    meant = names[near[0]] if near else next((option for option in options if option), None)
    hint = f"; did you mean {meant}?" if meant else "; `flagscale-config show FILE` lists the keys"
    return Problem(code="config/unknown-key", key=key, message=f"unknown key{hint}", suggestion=meant)


@functools.cache
def _rules() -> Mapping[str, tuple[str, ...]]:
    """Return, for each Megatron option, the rules of `arithmetic` that look at it.

    Read from the code of the rules itself: a list beside it would soon be wrong.
    """
    from flagscale_config import arithmetic

    table = table_of("megatron")
    found: dict[str, list[str]] = {}
    subjects = [item for item in vars(arithmetic).values() if isinstance(item, types.ModuleType)]
    for subject in (arithmetic, *subjects):
        if not subject.__name__.startswith(arithmetic.__name__):
            continue
        for name, function in vars(subject).items():
            if name.startswith("_check") and isinstance(function, types.FunctionType):
                for option in _constants(function.__code__):
                    if table is not None and option in table.options:
                        found.setdefault(option, []).append(_title(function))
    return {option: tuple(dict.fromkeys(titles)) for option, titles in found.items()}


def _constants(code: types.CodeType) -> Iterator[str]:
    """Yield every text in a function's code, tuples and inner functions included."""
    queue: list[Any] = list(code.co_consts)
    while queue:
        item = queue.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, types.CodeType):
            queue += item.co_consts
        elif isinstance(item, (tuple, frozenset)):
            queue += item


def _title(function: types.FunctionType) -> str:
    """Return what a rule is about in a few words."""
    about = (function.__doc__ or "").strip().split("\n", maxsplit=1)[0].rstrip(".")
    rule = about.partition(" ")[2] or function.__name__.removeprefix("_check_").replace("_", " ")
    return f"{function.__module__.rpartition('.')[2]}: {rule}"
