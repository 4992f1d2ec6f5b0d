"""JSON Schemas of the files users write, for editors: what may stand where, with help, choices and defaults.

A schema sees one file, not the composed experiment: nothing is required in it, every value may be null, an
interpolation or `???`. What the typed contract checks beyond names and types, `flagscale-config check` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any

from pydantic import BaseModel

from flagscale_config.compression import Compression
from flagscale_config.experiment import ServeInstance
from flagscale_config.experiment_section import ExperimentSection
from flagscale_config.external import External
from flagscale_config.heterogeneous import HeteroFile
from flagscale_config.inference import InferenceFile
from flagscale_config.launch import ACTIONS, HYDRA
from flagscale_config.model_scripts import SCRIPTS, script_table
from flagscale_config.native_training import NativeTraining
from flagscale_config.options import Option, OptionTable, option_table
from flagscale_config.policy_server import PolicyArguments, PolicyServer
from flagscale_config.verl import verl_tree

__all__ = ["FILES", "file_schema"]

Schema = dict[str, Any]

_LATER: Schema = {
    "type": "string",
    "pattern": r"\$\{|^\?\?\?$",
    "description": "An interpolation, or ??? for a value that is still to be given.",
}
_FREE_REF: Schema = {"$ref": "#/$defs/later"}
_TYPES: dict[str, Schema] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": ["string", "number"]},
    "bool": {"type": ["string", "number"]},
    "size": {"type": ["integer", "string"]},
    "expr": {"type": ["string", "number", "array"]},
    "tuple": {"type": ["string", "array"]},
}
_KINDS: dict[str, Schema] = {
    "bool": {"type": "boolean"},
    "number": {"type": "number"},
    "text": {"type": ["string", "number", "array"]},
    "list": {"type": ["array", "string", "number"]},
    "map": {"type": "object"},
    "any": {},
}


def _open(schema: Schema) -> Schema:
    """Let null, an interpolation or `???` stand for a value."""
    if not schema or schema.get("type") == "object":
        return {"anyOf": [schema, _FREE_REF, {"type": "null"}]} if schema else {}
    words: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in words}
    return {"anyOf": [rest, _FREE_REF, {"type": "null"}], **words}


class _Builder:
    """One schema under construction; definitions are collected as they are used."""

    def __init__(self) -> None:
        self.definitions: Schema = {"later": _LATER}

    def model(self, model: type[BaseModel]) -> Schema:
        """Return a reference to a model's schema, relaxed as files need it."""
        schema = model.model_json_schema(mode="validation", by_alias=True)
        for name, part in schema.pop("$defs", {}).items():
            self.definitions.setdefault(name, self._relaxed(part))
        self.definitions[model.__name__] = self._relaxed(schema)
        return {"$ref": f"#/$defs/{model.__name__}"}

    def _relaxed(self, schema: Schema) -> Schema:
        """Require nothing, and let interpolations stand wherever a value may."""
        schema = {key: value for key, value in schema.items() if key not in {"required", "title"}}
        for name, part in schema.get("properties", {}).items():
            part.pop("title", None)
            schema["properties"][name] = _open(_items_open(part))
        if isinstance(schema.get("additionalProperties"), dict):
            schema["additionalProperties"] = _open(schema["additionalProperties"])
        return schema

    def options(self, table: OptionTable, own: Mapping[str, Schema] | None = None) -> Schema:
        """Return a reference to a closed mapping of an engine's options, by all their spellings."""
        name = f"{table.engine}-options"
        properties: Schema = dict(own or {})
        for option in table.options.values():
            self.definitions[f"{table.engine}.{option.name}"] = _option(option)
        for alias, target, is_opposite in table.spellings():
            reference = {"$ref": f"#/$defs/{table.engine}.{target}"}
            schema = _open({"type": "boolean", "description": f"The opposite of {target}."})
            for spelling in dict.fromkeys((alias, alias.replace("_", "-"))):
                properties.setdefault(spelling, schema if is_opposite else reference)
        self.definitions[name] = {
            "type": "object",
            "properties": properties,
            "patternProperties": {r"^[A-Za-z_-]+\.": {}},
            "additionalProperties": False,
        }
        return {"$ref": f"#/$defs/{name}"}


def _items_open(schema: Schema) -> Schema:
    """Let interpolations stand for the items of a list too."""
    if isinstance(schema.get("items"), dict):
        schema["items"] = _open(schema["items"])
    for member in schema.get("anyOf", []):
        _items_open(member)
    return schema


def _option(option: Option) -> Schema:
    """Return the schema of one option."""
    scalar = {"enum": list(option.choices)} if option.choices else dict(_TYPES[option.type])
    if option.is_switch:
        schema: Schema = {"type": "boolean"}
    elif option.kind == "json":
        schema = {}
    elif option.kind in {"list", "append"}:
        schema = {"anyOf": [{"type": "array", "items": _open(scalar)}, scalar, {"type": "string"}]}
    elif option.kind == "optional":
        schema = {"anyOf": [scalar, {"type": "boolean"}]}
    else:
        schema = scalar
    if option.help:
        schema["description"] = option.help
    if option.default is not None:
        schema["default"] = option.default
    return _open(schema) if set(schema) - {"description", "default"} else schema


def _megatron(builder: _Builder) -> Schema:
    """Return the schema of a train file for Megatron: options in sections of any name."""
    text = files("flagscale_config").joinpath("data", "flagscale-megatron.json").read_text(encoding="utf-8")
    own = json.loads(text)
    builder.options(option_table("megatron"))
    section = builder.definitions.pop("megatron-options")
    section.pop("patternProperties")
    properties = section["properties"]
    for old, new in own["renamed"].items():
        properties.setdefault(old, {"$ref": f"#/$defs/megatron.{new}", "deprecated": True})
    for name, reason in own["dropped"].items():
        note = {"description": f"Has no effect: {reason}.", "deprecated": True}
        properties.update(dict.fromkeys((name, name.replace("_", "-")), note))
    kinds = [properties.get("tokenizer_type", {}), {"enum": sorted(own.get("tokenizer_types", {}))}]
    properties["tokenizer_type"] = {"anyOf": [kind for kind in kinds if kind]}
    hetero = builder.model(HeteroFile)
    properties.update(builder.definitions[hetero["$ref"].rpartition("/")[2]]["properties"])
    for script in SCRIPTS:
        for option in script_table(script).options.values():
            schema = {**_option(option), "description": f"{option.help} Only with {script}.py and its like."}
            for spelling in (option.name, option.name.replace("_", "-")):
                properties.setdefault(spelling, schema)
    section["additionalProperties"] = {
        "anyOf": [{"$ref": "#/$defs/section"}, {"type": "null"}],
        "description": "A section of any name.",
    }
    # An option may also be the name of a section, as `optimizer` is.
    properties["optimizer"] = {"anyOf": [properties["optimizer"], {"$ref": "#/$defs/section"}]}
    builder.definitions["section"] = section
    sections = {name: _open({"$ref": "#/$defs/section"}) for name in ("system", "model", "data")}
    words = {
        "description": "Words or flags passed to Megatron as they are.",
        "type": ["object", "array", "null"],
    }
    return {
        "type": "object",
        "properties": {**sections, "extra_args": words},
        "additionalProperties": False,
    }


def _train(builder: _Builder) -> Schema:
    return {"anyOf": [_megatron(builder), builder.model(NativeTraining), _external(builder)]}


def _external(builder: _Builder) -> Schema:
    wrapper = builder.model(External)
    return {
        "type": "object",
        "properties": {"kerv": wrapper, "external": wrapper},
        "minProperties": 1,
        "additionalProperties": False,
    }


def _serve(builder: _Builder) -> Schema:
    builder.model(ServeInstance)
    item = builder.definitions["ServeInstance"]
    vllm = builder.options(option_table("vllm"), {name: {"deprecated": True} for name in _gone()})
    engines: Schema = {}
    for engine in ("vllm", "sglang", "llama_cpp", "transformers", "native"):
        try:
            table = option_table(engine)
            short: dict[str, Schema] = {
                name: {"deprecated": True} for name in ("tp", "dp", "pp", "ep") if table.renamed(name)
            }
            engines[engine] = _open(vllm if engine == "vllm" else builder.options(table, short))
        except KeyError:
            engines[engine] = {"type": ["object", "null"]}
    item["properties"]["engine_args"] = {"description": "Options in vLLM's vocabulary."}
    item["properties"]["engine_args_specific"] = _open(
        {"type": "object", "properties": engines, "additionalProperties": False}
    )
    known = {"anyOf": [vllm, builder.model(PolicyArguments), {"type": "null"}]}
    item["if"] = {"required": ["module"]}
    item["then"] = {"properties": {"engine_args": {"type": ["object", "null"]}}}
    item["else"] = {"properties": {"engine_args": known}}
    items = {"type": "array", "items": {"$ref": "#/$defs/ServeInstance"}}
    return {"anyOf": [items, builder.model(PolicyServer)]}


def _gone() -> Iterable[str]:
    from flagscale_config import serving

    return sorted(serving._GONE.get("vllm", {}))  # noqa: SLF001


def _inference(builder: _Builder) -> Schema:
    reference = builder.model(InferenceFile)
    own = {
        "save": {"type": ["string", "null"], "description": "Folder for generated images (Emu3.5)."},
        "vq_model": {"type": ["string", "null"], "description": "Path of the vision tokenizer (Emu3)."},
    }
    llm = builder.options(option_table("vllm"), own)
    builder.definitions["InferenceFile"]["properties"]["llm"] = _open(llm)
    return {"anyOf": [reference, _external(builder)]}


def _compress(builder: _Builder) -> Schema:
    reference = builder.model(Compression)
    data = builder.definitions["CompressData"]["properties"]
    data["tokenzier_args"] = {**data["tokenizer_args"], "deprecated": True}
    return reference


def _rl(_: _Builder) -> Schema:
    tree = _section_of(verl_tree())
    tree["properties"].update(
        {
            "config-path": {"type": ["string", "null"], "description": "Folder of verl's configurations."},
            "config-name": {"type": ["string", "null"], "description": "One of verl's configurations."},
            "append_kargs": {
                "type": ["object", "null"],
                "description": "Keys that verl's configuration lacks.",
            },
        }
    )
    tree["patternProperties"] = {r"^[a-z_]+\.": {}}
    return tree


def _section_of(tree: Mapping[str, Any]) -> Schema:
    properties = {
        key: _section_of(value) if isinstance(value, Mapping) else _open(dict(_KINDS[value]))
        for key, value in tree.items()
    }
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


_DEFAULTS: Schema = {
    "type": "array",
    "description": "Files that are composed: `_self_`, `group: name`, or a path without suffix.",
    "items": {"type": ["string", "object"]},
}


def _experiment(builder: _Builder) -> Schema:
    hydra = {
        name: {
            "type": "object",
            "properties": {key: {} for key in keys},
            "additionalProperties": False,
        }
        if keys
        else {}
        for name, keys in HYDRA.items()
    }
    megatron = {"type": ["object", "null"], "additionalProperties": {"type": ["object", "null"]}}
    section = {"description": "The task; usually in a file of its own, named in defaults."}
    return {
        "type": "object",
        "properties": {
            "defaults": _DEFAULTS,
            "experiment": builder.model(ExperimentSection),
            "action": {"enum": list(ACTIONS), "description": "What FlagScale's run.py does by default."},
            "hydra": {"type": "object", "properties": hydra, "additionalProperties": False},
            "device_type_specific": megatron,
            "node_specific": megatron,
            **{
                name: {**section, "type": ["object", "array", "null"]}
                for name in ("train", "serve", "inference", "compress", "rl")
            },
        },
        "additionalProperties": False,
    }


FILES: dict[str, tuple[str, Callable[[_Builder], Schema]]] = {
    "experiment-file": ("A FlagScale experiment file.", _experiment),
    "train-file": ("The `train` part of an experiment.", _train),
    "serve-file": ("The `serve` part of an experiment.", _serve),
    "inference-file": ("The `inference` part of an experiment.", _inference),
    "compress-file": ("The `compress` part of an experiment.", _compress),
    "rl-file": ("The `rl` part of an experiment: verl's own keys.", _rl),
}
"""Kinds of files: what each is, and what builds its schema."""


def file_schema(kind: str) -> Schema:
    """Return the JSON Schema of a kind of file.

    Raises:
        KeyError: there is no such kind.
    """
    title, build = FILES[kind]
    builder = _Builder()
    schema = build(builder)
    for part in schema.get("anyOf", [schema]):
        mapping = builder.definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if "properties" in mapping:  # a file that is a list composes nothing
            mapping["properties"].setdefault("defaults", _DEFAULTS)
    return {"title": title, **schema, "$defs": builder.definitions}
