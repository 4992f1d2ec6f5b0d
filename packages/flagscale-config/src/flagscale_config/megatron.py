"""FlagScale's `train:` section read as Megatron options.

Users sort options into sections that mean nothing to Megatron (`system`, `model`, `data`, and any below
them); here the names of the sections are dropped, spellings unified, FlagScale's own options renamed or
refused, values typed by the option table. The same option in two places must have one value.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from flagscale_config.arithmetic import check_train, virtual_stages
from flagscale_config.errors import show
from flagscale_config.experiment import Parallelism, Train
from flagscale_config.findings import Findings
from flagscale_config.heterogeneous import HETERO_OPTIONS, Heterogeneous
from flagscale_config.meshes import is_enabled, read_heterogeneous
from flagscale_config.model_scripts import homes, model_script, script_table
from flagscale_config.options import Option, OptionError, OptionTable, option_table, spelled
from flagscale_config.places import Path, dotted
from flagscale_config.resolve import MISSING, is_incomplete
from flagscale_config.runner import Runner, Task
from flagscale_config.suggest import Hint, home_of_train_option, suggestion

__all__ = ["is_dropped", "read_train", "renamed_option", "renamed_value"]

_SECTIONS = ("system", "model", "data")
_ESCAPE = "; Megatron has no such option, but train.extra_args takes words as they are"


@functools.cache
def _own() -> dict[str, dict[str, str]]:
    """Return FlagScale's additions to Megatron: what is renamed, dropped and refused, with reasons."""
    text = files("flagscale_config").joinpath("data", "flagscale-megatron.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, str]] = json.loads(text)
    return loaded


def renamed_option(key: str) -> str:
    """Return the name that Megatron has today for an option of FlagScale's fork; any other key as it is."""
    name = spelled(key)
    return _own()["renamed"].get(name, name)


def renamed_value(option: str, value: Any) -> Any:
    """Return Megatron's choice for a tokenizer type of FlagScale's fork; any other value as it is."""
    is_type = option == "tokenizer_type" and isinstance(value, str)
    return _own()["tokenizer_types"].get(value, value) if is_type else value


def is_dropped(key: str) -> bool:
    """Whether an option of older files has no effect any more."""
    return spelled(key) in _own()["dropped"]


class _Reader:
    def __init__(self, findings: Findings, script: str | None = None) -> None:
        self.findings = findings
        self.table: OptionTable = option_table("megatron")
        self.script = script_table(script) if script is not None else None
        self.script_options: dict[str, Any] = {}
        self.hetero: dict[str, tuple[Any, Path]] = {}
        self.options: dict[str, Any] = {}
        self.places: dict[str, Path] = {}
        self.is_incomplete = False

    def read(self, key: str, value: Any, path: Path) -> None:
        """Read one leaf of the tree."""
        name = spelled(key)
        if is_incomplete(value):
            found = self.table.find(_own()["renamed"].get(name, name))
            self.findings.excused.add(found[0].name if found else name)  # it is missing, but not forgotten
            # A path still to be given takes part in no arithmetic; a number or a switch may.
            self.is_incomplete |= found is None or found[0].is_switch or found[0].type != "str"
            is_elsewhere = name in HETERO_OPTIONS or (self.script is not None and name in self.script)
            if found is None and not is_elsewhere and self._is_ours(name, path):
                self._unknown(name, path)
            return
        if name in HETERO_OPTIONS:
            self.hetero[name] = (value, path)
            return
        if self.script is not None and (own := self.script.find(name)) is not None:
            self._set_script(*own, value, path)
            return
        if not self._is_ours(name, path):
            return
        renamed = _own()["renamed"].get(name)
        if renamed is not None:
            hint = Hint(suggestion=renamed)
            self.findings.note("config/renamed", path, f"read as {renamed}", value, hint=hint)
        found = self.table.find(renamed or name)
        if found is None:
            self._unknown(name, path)
            return
        self._set(*found, value, path)

    def _is_ours(self, name: str, path: Path) -> bool:
        """Report FlagScale options without effect or support; return whether the key goes on to the table."""
        own = _own()
        if name in own["dropped"]:
            self.findings.note("config/dropped", path, f"has no effect: {own['dropped'][name]}")
            return False
        reason = own["refused"].get(name)
        if reason is None and homes(name):
            scripts = " or ".join(f"{script}.py" for script in homes(name))
            message = f"holds only with experiment.task.entrypoint {scripts}, which trains such models"
            self.findings.error("config/unsupported", path, message)
            return False
        if name in self.table and reason is None:
            return True
        reason = reason or self.table.elsewhere(name) or None
        if reason is None and not self._near(name):
            reason = next(
                (text for start, text in own["refused_prefixes"].items() if name.startswith(start)), None
            )
        if reason is not None:
            message = f"is not an option of Megatron {self.table.version}: {reason}"
            self.findings.error("config/unsupported", path, message)
        return reason is None

    def _near(self, name: str) -> list[str]:
        """Return the option of the model script or of meshes that a key may have meant."""
        known = [*HETERO_OPTIONS, *(self.script.options if self.script is not None else ())]
        return get_close_matches(name, known, 1, 0.8)

    def _unknown(self, name: str, path: Path) -> None:
        hint = suggestion(name, self.table, path, sections=self._near(name))
        self.findings.excused.add(self.table.nearest(name) or "")
        self.findings.error("config/unknown-key", path, f"unknown key{hint or _ESCAPE}", hint=hint)

    def _set(self, option: Option, is_opposite: bool, value: Any, path: Path) -> None:  # noqa: FBT001
        if value is None:
            return
        if value == "None" and option.type != "bool":
            self.findings.note("config/none-text", path, 'the text "None" is read as null; write null', value)
            return
        if option.name == "tokenizer_type" and (value := self._tokenizer(value, path)) is None:
            return
        try:
            typed = option.coerce(value)
        except OptionError as error:
            hint = Hint(allowed=error.allowed, suggestion=error.suggestion)
            self.findings.error("config/value", path, str(error), value, hint=hint)
            self.is_incomplete = True
            return
        self._store(option, not typed if is_opposite else typed, path)

    def _tokenizer(self, value: Any, path: Path) -> Any:
        """Return Megatron's name for one of FlagScale's tokenizers; None, and an error, where it has none."""
        own = _own()
        reason = own["tokenizer_types_refused"].get(str(value))
        if reason is not None:
            self.findings.error(
                "config/unsupported", path, f"is not a tokenizer of Megatron: {reason}", value
            )
            return None
        known = own["tokenizer_types"].get(str(value))
        if known is not None:
            hint = Hint(suggestion=known)
            self.findings.note("config/renamed-value", path, f"{value} is read as {known}", value, hint=hint)
        return known or value

    def _set_script(self, option: Option, is_opposite: bool, value: Any, path: Path) -> None:  # noqa: FBT001
        """Set an option of the model script."""
        if value is None:
            return
        try:
            typed = option.coerce(value)
        except OptionError as error:
            self.findings.error("config/value", path, str(error), value)
            return
        self.script_options[option.name] = not typed if is_opposite else typed
        self.findings.origins[f"train.script_options.{option.name}"] = self.findings.composed.origin(path)

    def check_twins(self) -> None:
        """Refuse `x` and `no_x` switched on together where they are two options of Megatron."""
        for name, path in self.places.items():
            twin = self.table.twin(self.table.options[name])
            if (
                twin is not None
                and twin.kind == "false"
                and self.options[name]
                and self.options.get(twin.name)
            ):
                place = self.findings.composed.origin(self.places[twin.name])
                message = f"contradicts {twin.name} at {place}; keep one"
                self.findings.error("config/conflict", path, message)

    def _store(self, option: Option, value: Any, path: Path) -> None:
        first = self.places.get(option.name)
        if first is None:
            self.options[option.name] = value
            self.places[option.name] = path
        elif self.options[option.name] != value:
            place = self.findings.composed.origin(first)
            before = show(self.options[option.name])
            message = f"given twice: {show(value)} here, {before} as {dotted(first)} at {place}; keep one"
            self.findings.error("config/conflict", path, message, value)


def _leaves(tree: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any, Path]]:
    """Yield key, value and path of each leaf; section names on the way are dropped."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield key, value, (*path, key)


def _verbatim(value: Any, findings: Findings, path: Path) -> tuple[str, ...]:
    """Return `extra_args` as words: a list as it is, a mapping as flags."""
    if value is None:
        return ()
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return tuple(str(item) for item in value)
    if not isinstance(value, Mapping):
        findings.error(
            "config/value", path, f"must be a list of words or a mapping ({show(value)} given)", value
        )
        return ()
    words: list[str] = []
    for key, item in value.items():
        flag = "--" + key.removeprefix("--").replace("_", "-")
        if item is True:
            words.append(flag)
        elif item is not False and item is not None:
            items = item if isinstance(item, list) else [item]
            words += [flag, *(part if isinstance(part, str) else json.dumps(part) for part in items)]
    return tuple(words)


def read_train(
    tree: Any, runner: Runner | None, findings: Findings, task: Task | None = None
) -> Train | None:
    """Return the training task of a file's `train` section; None when it is too broken to be one.

    `runner` says how many processes there are, `task` which script trains; None when that section is broken.
    """
    if not isinstance(tree, Mapping):
        message = f"must be a mapping of system, model and data ({show(tree)} given)"
        findings.error("config/value", ("train",), message)
        return None
    script = model_script(task.entrypoint) if task is not None else None
    reader = _Reader(findings, script)
    for section, content in tree.items():
        if section != "extra_args":
            _read_section(reader, section, content)
    reader.check_twins()
    _remember(findings, reader)
    extra_args = _verbatim(tree.get("extra_args"), findings, ("train", "extra_args"))
    hetero = read_heterogeneous(reader.hetero, reader.options, runner, findings)
    if not reader.is_incomplete:
        _check(reader, runner, findings)
    return _build(reader, extra_args, script, hetero)


def _check(reader: _Reader, runner: Runner | None, findings: Findings) -> None:
    """Check the options against each other; meshes have stages and processes of their own."""
    if not is_enabled(reader.hetero):
        check_train(reader.options, runner, findings)
        return
    of_meshes = ("pipeline_model_parallel_size", "expert_model_parallel_size")
    options = {name: value for name, value in reader.options.items() if name not in of_meshes}
    check_train(options, None, findings)


def _read_section(reader: _Reader, section: str, content: Any) -> None:
    """Read one of `system`, `model` and `data`."""
    path = ("train", section)
    if section not in _SECTIONS:
        hint = suggestion(section, None, ("train",), sections=_SECTIONS)
        if section in reader.table:
            home = home_of_train_option(spelled(section))
            hint = Hint(f"; it belongs under {home}", home, _SECTIONS)
        allowed = f"; allowed: {', '.join(_SECTIONS)}, extra_args"
        reader.findings.error("config/unknown-key", path, f"unknown key{hint or allowed}", hint=hint)
    elif isinstance(content, Mapping):
        for key, value, where in _leaves(content, path):
            reader.read(key, value, where)
    elif content is MISSING:
        reader.is_incomplete = True
    elif content is not None:
        reader.findings.error("config/value", path, f"must be a mapping ({show(content)} given)")


def _remember(findings: Findings, reader: _Reader) -> None:
    """Let options be looked up by name, whatever section they stood in."""
    for name, path in reader.places.items():
        findings.option_paths[name] = path
        findings.origins[f"train.options.{name}"] = findings.composed.origin(path)


def _build(
    reader: _Reader, extra_args: tuple[str, ...], script: str | None, hetero: Heterogeneous | None
) -> Train | None:
    options = reader.options
    if "micro_batch_size" not in options:
        if not reader.is_incomplete and "micro_batch_size" not in reader.findings.excused:
            message = "micro_batch_size is required; set train.system.micro_batch_size"
            reader.findings.error("config/required", ("train",), message)
        return None
    if reader.findings.problems:
        return None
    sizes = {name: options[name] for name in Parallelism.model_fields if name in options}
    return Train(
        options=options,
        parallelism=Parallelism(**sizes, virtual_pipeline_stages=virtual_stages(options)),
        micro_batch_size=options["micro_batch_size"],
        global_batch_size=options.get("global_batch_size"),
        train_iters=options.get("train_iters"),
        extra_args=extra_args,
        script=script,
        script_options=reader.script_options,
        heterogeneous=hetero,
    )
