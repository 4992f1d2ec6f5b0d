"""Typed sections: pydantic validates, this module turns its complaints into located problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flagscale_config.errors import show
from flagscale_config.findings import Findings
from flagscale_config.places import Path
from flagscale_config.resolve import MISSING, is_incomplete
from flagscale_config.suggest import Hint, models_in, suggestion

__all__ = ["read_field", "read_model"]

_MAX_LISTED = 12

_M = TypeVar("_M", bound=BaseModel)


def _given(value: Any) -> Any:
    """Drop values the user still has to give; they are reported already."""
    if isinstance(value, Mapping):
        return {key: _given(item) for key, item in value.items() if item is not MISSING}
    return [_given(item) for item in value if item is not MISSING] if isinstance(value, list) else value


def _holds(tree: Any, part: str | int) -> bool:
    """Whether a mapping or list has something under a key or index."""
    if isinstance(tree, Mapping):
        return part in tree
    return isinstance(tree, list) and isinstance(part, int) and part < len(tree)


def _absent(tree: Any, location: Sequence[str | int]) -> bool:
    """Whether the value pydantic misses is one the user still has to give."""
    for part in location:
        if not _holds(tree, part):
            return False
        tree = tree[part]
    return tree is MISSING


def read_model(model: type[_M], tree: Mapping[str, Any], path: Path, findings: Findings) -> _M | None:
    """Return a section as its model; None when it is wrong, every fault reported with its place."""
    if is_incomplete(tree):
        _report_misspelt(model, tree, path, findings)
    try:
        return model.model_validate(_given(tree))
    except ValidationError as error:
        seen: set[Path] = set()
        for item in error.errors(include_url=False):
            location = _location(item["loc"], tree)
            if item["type"] == "missing" and _absent(tree, item["loc"]):
                continue
            if location not in seen:  # a union complains once per member
                seen.add(location)
                _report(item, (*path, *location), model, findings)
    return None


def _report_misspelt(model: type[BaseModel], tree: Mapping[str, Any], path: Path, findings: Findings) -> None:
    """Report unknown keys whose values the user still has to give: the model is not shown those."""
    try:
        model.model_validate(tree)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] == "extra_forbidden" and item["input"] is MISSING:
                _report(item, (*path, *_location(item["loc"], tree)), model, findings)


def read_field(model: type[BaseModel], name: str, value: Any, path: Path, findings: Findings) -> Any:
    """Return one value as a model's field has it; None when it is wrong, which is reported at `path`."""
    try:
        return getattr(model.model_validate({name: value}), name)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        location = _location(item["loc"][1:], value)
        _report(item, (*path, *location), model, findings)
    return None


def _location(loc: Sequence[str | int], tree: Any) -> Path:
    """Return the part of pydantic's location that is in the file: unions add words of their own."""
    found: list[str | int] = []
    for index, part in enumerate(loc):
        if isinstance(part, int) and isinstance(tree, Mapping):
            continue  # one mapping that stands for a list of one
        if not _holds(tree, part):
            # The last part may name a key that is missing; anything else is pydantic's.
            is_missing = isinstance(tree, Mapping) and index + 1 == len(loc)
            return (*found, part) if is_missing else tuple(found)
        found.append(part)
        tree = tree[part]
    return tuple(found)


def _report(item: Any, path: Path, model: type[BaseModel], findings: Findings) -> None:
    kind = item["type"]
    if kind == "extra_forbidden":
        allowed = sorted(_fields_at(model, item["loc"][:-1]))
        hint = suggestion(str(path[-1]), None, path, sections=allowed)
        if not hint and len(allowed) <= _MAX_LISTED:
            hint = Hint(f"; allowed: {', '.join(allowed)}", None, tuple(allowed))
        findings.error("config/unknown-key", path, f"unknown key{hint}", item["input"], hint=hint)
    elif kind == "missing":
        findings.error("config/required", path[:-1], f"{path[-1]} is required")
    else:
        message = f"{_words(item)} ({show(item['input'])} given)"
        findings.error("config/value", path, message, item["input"], hint=_choice(item))


def _fields_at(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Return the keys allowed at a location inside a model."""
    current: Any = model
    for part in loc:
        if isinstance(part, str) and part in current.model_fields:
            found = models_in(current.model_fields[part].annotation)
            if not found:
                return []
            current = found[0]
    return list(current.model_fields)


def _choice(item: Any) -> Hint:
    """Return the values a choice allows, and the one that was probably meant; nothing for other fields."""
    if item["type"] != "literal_error":
        return Hint()
    expected = str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
    near = get_close_matches(str(item["input"]), expected, 1)
    return Hint(suggestion=near[0] if near else None, allowed=tuple(expected))


def _words(item: Any) -> str:
    """Say what is allowed, in the words of this package."""
    context = item.get("ctx", {})
    kind = item["type"]
    if kind == "literal_error":
        choice = _choice(item)
        near = f"; did you mean {choice.suggestion}?" if choice.suggestion else ""
        return f"must be one of {', '.join(choice.allowed)}{near}"
    simple = {
        "int_type": "must be an integer",
        "int_parsing": "must be an integer",
        "int_from_float": "must be an integer",
        "float_type": "must be a number",
        "float_parsing": "must be a number",
        "bool_type": "must be true or false",
        "bool_parsing": "must be true or false",
        "string_type": "must be text",
        "model_type": "must be a mapping",
        "dict_type": "must be a mapping",
        "mapping_type": "must be a mapping",
        "tuple_type": "must be a list",
        "string_pattern_mismatch": "must be the name of a class, such as transformers.AutoModel",
    }
    if kind in simple:
        return simple[kind]
    bounds = {
        "greater_than_equal": ("ge", "at least"),
        "less_than_equal": ("le", "at most"),
        "greater_than": ("gt", "more than"),
    }
    if kind in bounds:
        name, word = bounds[kind]
        return f"must be {word} {context[name]}"
    return str(item["msg"])
