"""The section of a file that says what is to be done: `train`, `serve`, `inference`, `compress` or `rl`.

Each reader returns fields of `Experiment`. Which vocabulary holds depends on the task's type, its backend
and, for FlagScale's own scripts, on the entrypoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from flagscale_config.errors import show
from flagscale_config.findings import Findings
from flagscale_config.resolve import MISSING
from flagscale_config.runner import Runner, Task
from flagscale_config.sections import read_model
from flagscale_config.serving import check_vllm_options, read_serve, typed_options

if TYPE_CHECKING:
    from flagscale_config.external import External
    from flagscale_config.inference import Inference, LanguageModel
    from flagscale_config.native_training import NativeTraining

__all__ = ["BACKENDS", "TASKS", "check_task", "read_task"]

BACKENDS: dict[str, tuple[str, ...]] = {
    "train": ("megatron", "native", "native_train", "robotics", "pi0"),
    "serve": ("vllm", "sglang", "llama_cpp", "transformers", "native", "native_serve"),
    "inference": ("vllm", "native", "native_inference"),
    "compress": ("native", "native_compress", "llmcompressor"),
    "rl": ("verl", "native", "native_rl"),
}
"""Backends of each type of task; none given leaves the choice to FlagScale."""

TASKS = tuple(BACKENDS)
_WRAPPERS = ("kerv", "external")
_NATIVE_SCRIPTS = ("train_pi0", "train_robotics", "train_gr00t", "train_dreamzero", "train_qwen_gr00t")


def check_task(task: Task, findings: Findings) -> None:
    """Report a backend that the type of task does not have."""
    known = BACKENDS[task.type]
    if task.backend is None or task.backend in known:
        return
    path = ("experiment", "task", "backend")
    if task.backend == "torchrun":
        message = "torchrun is a launcher: it belongs under experiment.runner.backend; allowed: "
        message += ", ".join(known)
    else:
        near = get_close_matches(task.backend, known, 1)
        others = [kind for kind, names in BACKENDS.items() if task.backend in names]
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else f" (it is one of {' and '.join(others)})"
            if others
            else ""
        )
        message = f"{task.backend} is no backend of {task.type} tasks{hint}; allowed: {', '.join(known)}"
    findings.error("config/value", path, message, task.backend)


def read_task(
    data: Mapping[str, Any], task: Task | None, kind: str | None, runner: Runner | None, findings: Findings
) -> dict[str, Any]:
    """Return the fields of `Experiment` that come from the task's own section; faults are reported.

    `task` is None when the `experiment` section is broken; `kind` is the type of task all the same, if known.
    """
    if kind is None or not _has(data, kind, findings):
        return {}
    tree = data[kind]
    wrapper = next((name for name in _WRAPPERS if isinstance(tree, Mapping) and name in tree), None)
    if wrapper is not None:
        return {"external": _read_external(tree, (kind, wrapper), findings)}
    readers: dict[str, Callable[[], dict[str, Any]]] = {
        "train": lambda: _read_train(tree, task, runner, findings),
        "serve": lambda: _read_serve(tree, task, runner, findings, _envs(data)),
        "inference": lambda: {"inference": _read_inference(tree, findings, _envs(data))},
        "compress": lambda: {"compress": _read_compress(tree, findings)},
        "rl": lambda: {"rl": _read_rl(tree, findings)},
    }
    return readers[kind]()


def _envs(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the environment variables that a file sets for all processes."""
    experiment = data.get("experiment")
    envs = experiment.get("envs") if isinstance(experiment, Mapping) else None
    return envs if isinstance(envs, Mapping) else {}


def _has(data: Mapping[str, Any], task: str, findings: Findings) -> bool:
    """Whether the file holds the section its task needs."""
    if data.get(task) is not None:
        return data[task] is not MISSING
    message = f"there is no `{task}` section; name its file in defaults (- {task}: NAME) or write it here"
    findings.error("config/required", (task,), message)
    return False


def _read_section(model: Any, tree: Any, kind: str, findings: Findings) -> Any:
    if not isinstance(tree, Mapping):
        findings.error("config/value", (kind,), f"must be a mapping ({show(tree)} given)")
        return None
    return read_model(model, tree, (kind,), findings)


# Models are imported by those who read one: a file has one section, and they take as long as all else.


def _read_compress(tree: Any, findings: Findings) -> Any:
    from flagscale_config.compression import Compression

    return _read_section(Compression, tree, "compress", findings)


def _read_rl(tree: Any, findings: Findings) -> Any:
    from flagscale_config.verl import read_rl

    return read_rl(tree, findings)


def _read_external(tree: Mapping[str, Any], path: tuple[str, str], findings: Findings) -> External | None:
    from flagscale_config.external import External

    for key in tree:
        if key != path[1]:
            message = (
                f"does not go with {path[1]}, which wraps a whole program; move it below {path[1]}.arguments"
            )
            findings.error("config/unknown-key", (path[0], key), message)
    content = tree[path[1]]
    if not isinstance(content, Mapping):
        findings.error("config/value", path, f"must be a mapping ({show(content)} given)")
        return None
    return read_model(External, content, path, findings)


def is_native(task: Task | None) -> bool:
    """Whether FlagScale's own trainer is meant, not Megatron's."""
    if task is None or task.backend == "megatron":
        return False
    script = PurePath(task.entrypoint or "").stem
    return task.backend is not None or script.startswith(_NATIVE_SCRIPTS)


def _read_train(tree: Any, task: Task | None, runner: Runner | None, findings: Findings) -> dict[str, Any]:
    if not is_native(task):
        from flagscale_config.megatron import read_train

        return {"train": read_train(tree, runner, findings, task)}
    from flagscale_config.native_training import NativeTraining

    native = _read_section(NativeTraining, tree, "train", findings)
    if native is not None:
        _check_steps(native, findings)
    return {"native_train": native}


def _check_steps(native: NativeTraining, findings: Findings) -> None:
    """Refuse settings that a processor step does not have."""
    from flagscale_config.native_training import STEPS

    for name in ("preprocessor", "postprocessor"):
        processor = getattr(native.data, name)
        for index, step in enumerate(processor.steps if processor is not None else ()):
            allowed = STEPS[step.registry_name]
            for key in step.config.model_fields_set - set(allowed) if step.config is not None else ():
                path = ("train", "data", name, "steps", index, "config", key)
                what = ", ".join(allowed) or "none"
                message = f"is no setting of {step.registry_name}; it has: {what}"
                findings.error("config/unknown-key", path, message)


def _read_inference(tree: Any, findings: Findings, envs: Mapping[str, Any]) -> Inference | None:
    from flagscale_config.inference import Inference, InferenceFile

    section = _read_section(InferenceFile, tree, "inference", findings)
    content = tree.get("llm") if isinstance(tree, Mapping) else None
    model = _read_llm(content, findings, envs) if isinstance(content, Mapping) else None
    if section is None:
        return None
    if section.llm is None and section.engine is None:
        message = "needs llm (a language model) or engine (a pipeline), and generate"
        findings.error("config/required", ("inference",), message)
    if section.llm is not None and section.engine is not None:
        findings.error("config/conflict", ("inference", "engine"), "does not go with llm; keep one")
    fields = {name: getattr(section, name) for name in ("engine", "generate", "logging")}
    return Inference(llm=model, **fields)


def _read_llm(tree: Mapping[str, Any], findings: Findings, envs: Mapping[str, Any]) -> LanguageModel | None:
    """Return the language model: FlagScale's own keys, and all others as vLLM's options."""
    from flagscale_config.inference import OWN_LLM_KEYS, LanguageModel

    path = ("inference", "llm")
    own = {key: value for key, value in tree.items() if key in OWN_LLM_KEYS}
    rest = {key: value for key, value in tree.items() if key not in OWN_LLM_KEYS}
    options = typed_options(rest, "vllm", path, findings, own=sorted(OWN_LLM_KEYS))
    check_vllm_options({path: rest}, findings, envs)
    if tree.get("model") is None:
        findings.error("config/required", path, "model is required: the name or path of the model")
    return read_model(LanguageModel, {**own, "options": options}, path, findings)


def _read_serve(
    tree: Any, task: Task | None, runner: Runner | None, findings: Findings, envs: Mapping[str, Any]
) -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not {"engine", "generate"} & set(tree):
        is_parted = runner is not None and runner.deploy.prefill_decode_disaggregation
        return {"serve": read_serve(tree, findings, task, envs, is_parted=is_parted)}
    from flagscale_config.policy_server import PolicyServer

    return {"policy_server": read_model(PolicyServer, tree, ("serve",), findings)}
