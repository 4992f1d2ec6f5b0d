"""FlagScale's `serve:` list read as instances, their options typed by the engines' tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flagscale_config.arithmetic.vllm import check_vllm
from flagscale_config.errors import show
from flagscale_config.experiment import ServeInstance
from flagscale_config.findings import Findings
from flagscale_config.options import ENGINES, Option, OptionError, OptionTable, option_table, spelled
from flagscale_config.places import Path
from flagscale_config.resolve import is_incomplete
from flagscale_config.runner import Task
from flagscale_config.sections import read_model
from flagscale_config.suggest import Hint, suggestion

__all__ = ["check_vllm_options", "read_serve", "typed_options"]

_ENGINES = tuple(engine for engine in ENGINES if engine != "megatron")
_GONE = {
    "vllm": {
        "disable_log_requests": "vLLM no longer logs requests unless enable_log_requests is set",
        "swap_space": "vLLM 0.25 and later have no CPU swap space",
        "num_scheduler_steps": "vLLM 0.25 and later have no multi-step scheduling",
        "use_v2_block_manager": "vLLM 0.25 and later have one block manager",
        "max_seq_len_to_capture": "vLLM 0.25 and later read compilation_config instead",
    }
}


def read_serve(
    tree: Any,
    findings: Findings,
    task: Task | None = None,
    envs: Mapping[str, Any] | None = None,
    *,
    is_parted: bool = False,
) -> tuple[ServeInstance, ...]:
    """Return the instances of a file's `serve` section; broken ones are reported and left out.

    `envs` are the environment variables that the file sets, of which some lift limits of vLLM. Where the
    task names a script of FlagScale's as entrypoint, the items hold that script's arguments. Where prefill is
    parted from decode, each half is given its role in moving keys and values when it is started.
    """
    if not isinstance(tree, list) or not tree:
        findings.error(
            "config/value", ("serve",), f"must be a list of items, each with a serve_id ({show(tree)} given)"
        )
        return ()
    is_script = task is not None and task.entrypoint is not None
    instances = []
    for index, item in enumerate(tree):
        instance = _read_item(item, ("serve", index), findings, is_script=is_script)
        if instance is not None:
            instances.append(instance)
        if not is_script and isinstance(item, Mapping) and item.get("module") is None:
            _check_item(item, ("serve", index), findings, envs or {}, is_parted=is_parted)
    _check_ids(instances, findings)
    return tuple(instances)


def _read_item(item: Any, path: Path, findings: Findings, *, is_script: bool) -> ServeInstance | None:
    if not isinstance(item, Mapping):
        findings.error("config/value", path, f"must be a mapping with a serve_id ({show(item)} given)")
        return None
    engine = item.get("engine")
    is_class = item.get("module") is not None
    content = dict(item)
    args = item.get("engine_args")
    if isinstance(args, Mapping) and is_script:
        from flagscale_config.policy_server import PolicyArguments

        read = read_model(PolicyArguments, args, (*path, "engine_args"), findings)
        content["engine_args"] = read.model_dump(exclude_unset=True) if read is not None else {}
        content["engine"] = "native" if engine is None else engine
    elif isinstance(args, Mapping) and not is_class and engine != "native":
        content["engine_args"] = typed_options(args, "vllm", (*path, "engine_args"), findings)
    specific = item.get("engine_args_specific")
    if isinstance(specific, Mapping):
        content["engine_args_specific"] = _specific(specific, (*path, "engine_args_specific"), findings)
    for key in ("engine_args", "engine_args_specific", "resources"):
        if content.get(key) is None:
            content.pop(key, None)
    return read_model(ServeInstance, content, path, findings)


def _check_item(
    item: Mapping[str, Any], path: Path, findings: Findings, envs: Mapping[str, Any], *, is_parted: bool
) -> None:
    """Check the options of an item against each other, where vLLM serves it or no other engine is named."""
    specific = item.get("engine_args_specific")
    parts = {
        ("engine_args",): item.get("engine_args"),
        ("engine_args_specific", "vllm"): specific.get("vllm") if isinstance(specific, Mapping) else None,
    }
    if item.get("engine") in (None, "vllm"):
        trees = {where: _with_role(tree) if is_parted else tree for where, tree in parts.items()}
        check_vllm_options({(*path, *where): tree for where, tree in trees.items()}, findings, envs)


def _with_role(tree: Any) -> Any:
    """Give a connector the role that it will have, where options name one."""
    transfer = tree.get("kv_transfer_config") if isinstance(tree, Mapping) else None
    if not isinstance(transfer, Mapping) or "kv_connector" not in transfer:
        return tree
    return {**tree, "kv_transfer_config": {"kv_role": "kv_both", **transfer}}


def check_vllm_options(parts: Mapping[Path, Any], findings: Findings, envs: Mapping[str, Any]) -> None:
    """Report contradictions between vLLM's options that stand at these places; later ones win.

    Nothing is said where an option is wrong by itself or still to be given: it is known no better then.
    """
    given: dict[str, Any] = {}
    places: dict[str, Path] = {"": next(iter(parts))}
    table = option_table("vllm")
    for path, tree in parts.items():
        for key, value in _joined(tree).items() if isinstance(tree, Mapping) else ():
            found = table.find(table.renamed(spelled(key)) or spelled(key))
            if is_incomplete(value) and (found is None or found[0].name != "model"):
                return
            if found is None or value is None or is_incomplete(value):
                continue
            try:
                typed = found[0].coerce(value)
            except OptionError:
                return
            given[found[0].name] = not typed if found[1] else typed
            places[found[0].name] = (*path, key if key in tree else key.partition(".")[0])
    check_vllm(given, places, findings, envs)


def _specific(tree: Mapping[str, Any], path: Path, findings: Findings) -> dict[str, Any]:
    """Type the options that are said for one engine only."""
    typed: dict[str, Any] = {}
    for engine, options in tree.items():
        if engine not in _ENGINES and engine != "native":
            allowed = ", ".join(sorted((*_ENGINES, "native")))
            findings.error("config/unknown-key", (*path, engine), f"unknown engine; allowed: {allowed}")
        elif options is None:
            typed[engine] = {}
        elif not isinstance(options, Mapping):
            findings.error("config/value", (*path, engine), f"must be a mapping ({show(options)} given)")
        elif engine in _ENGINES:
            typed[engine] = typed_options(options, engine, (*path, engine), findings)
        else:
            typed[engine] = {spelled(key): value for key, value in options.items()}
    return typed


def typed_options(
    tree: Mapping[str, Any], engine: str, path: Path, findings: Findings, own: Sequence[str] = ()
) -> dict[str, Any]:
    """Return engine options by canonical name, typed by the engine's table; `own` are other names near."""
    table = option_table(engine)
    typed: dict[str, Any] = {}
    for key, value in _joined(tree).items():
        here = (*path, key if key in tree else next(word for word in tree if word.startswith(f"{key}.")))
        found = _option(key, table, here, findings, own)
        if found is None or value is None or is_incomplete(value):
            continue
        try:
            coerced = found[0].coerce(value)
        except OptionError as error:
            hint = Hint(allowed=error.allowed, suggestion=error.suggestion)
            findings.error("config/value", here, str(error), value, hint=hint)
            continue
        option, is_opposite = found
        coerced = not coerced if is_opposite else coerced
        if option.name in typed and typed[option.name] != coerced:
            message = (
                f"given twice: {show(coerced)} here, {show(typed[option.name])} in another spelling; keep one"
            )
            findings.error("config/conflict", here, message, value)
        typed[option.name] = coerced
    return typed


def _option(
    key: str, table: OptionTable, here: Path, findings: Findings, own: Sequence[str]
) -> tuple[Option, bool] | None:
    """Return the option a key means, and whether it says the opposite; report a key that means none."""
    name = spelled(key)
    found = table.find(name)
    if found is None and (renamed := table.renamed(name)) is not None:
        findings.note("config/renamed", here, f"read as {renamed}")
        found = table.find(renamed)
    if found is not None:
        return found
    if (reason := _GONE.get(table.engine, {}).get(name)) is not None:
        findings.note("config/dropped", here, f"has no effect: {reason}")
        return None
    gone = table.elsewhere(name)
    hint = Hint(f": {gone}") if gone else suggestion(key, table, here[:-1], sections=own)
    message = f"unknown option of {table.engine} {table.version}{hint}"
    findings.error("config/unknown-key", here, message, hint=hint)
    return None


def _joined(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Collect vLLM's dotted keys (`limit_mm_per_prompt.image: 8`) into the mapping they mean."""
    joined: dict[str, Any] = {}
    for key, value in tree.items():
        outer, dot, inner = key.partition(".")
        if dot and isinstance(joined.get(outer, {}), dict):
            joined.setdefault(outer, {})[inner] = value
        else:
            joined[key] = value
    return joined


def _check_ids(instances: list[ServeInstance], findings: Findings) -> None:
    """Refuse ids given twice and dependencies on nothing."""
    ids = [instance.serve_id for instance in instances]
    for index, instance in enumerate(instances):
        if instance.serve_id in ids[:index]:
            findings.error(
                "config/conflict",
                ("serve", index, "serve_id"),
                f"{instance.serve_id!r} is used twice; ids are unique",
            )
        for wanted in instance.depends:
            if wanted not in ids:
                message = f"depends on {wanted!r}, which is no serve_id of this file; known: {', '.join(ids)}"
                findings.error("config/value", ("serve", index, "depends"), message)
