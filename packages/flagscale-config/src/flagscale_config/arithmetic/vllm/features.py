"""The server and what it reports.

Twins of `validate_parsed_serve_args` and of vLLM's smaller configurations.
"""

from __future__ import annotations

from flagscale_config.arithmetic.options import Rule, needs
from flagscale_config.arithmetic.vllm.options import VllmCheck, VllmOptions

__all__ = ["CHECKS"]

_ROLES = {"kv": ("kv_producer", "kv_consumer", "kv_both"), "ec": ("ec_producer", "ec_consumer", "ec_both")}


def _check_transfer(options: VllmOptions) -> None:
    """Check connectors between instances."""
    for kind, roles in _ROLES.items():
        name, part = f"{kind}_transfer_config", options.part(f"{kind}_transfer_config")
        role = part.get(f"{kind}_role")
        if role is not None and role not in roles:
            options.error(name, f"{kind}_role must be one of {', '.join(roles)} ({role} given)")
        elif part.get(f"{kind}_connector") is not None and role is None:
            options.error(name, f"{kind}_connector needs {kind}_role, one of {', '.join(roles)}")


def _check_structured(options: VllmOptions) -> None:
    name, part = "structured_outputs_config", options.part("structured_outputs_config")
    backend = part.get("backend", "auto")
    if part.get("disable_any_whitespace") and backend not in ("xgrammar", "guidance"):
        options.error(name, f"disable_any_whitespace needs backend xgrammar or guidance ({backend} given)")
    if part.get("disable_additional_properties") and backend != "guidance":
        options.error(name, f"disable_additional_properties needs backend guidance ({backend} given)")


def _check_profiler(options: VllmOptions) -> None:
    name, part = "profiler_config", options.part("profiler_config")
    kind, folder = part.get("profiler"), part.get("torch_profiler_dir")
    if kind == "torch" and not folder:
        options.error(name, "torch needs torch_profiler_dir")
    if kind != "torch" and folder:
        options.error(name, "torch_profiler_dir needs profiler torch")
    if kind == "proton" and not part.get("proton_profiler_dir"):
        options.error(name, "proton needs proton_profiler_dir")


CHECKS: tuple[VllmCheck, ...] = (
    _check_transfer,
    _check_structured,
    _check_profiler,
    *needs("enable_auto_tool_choice", "tool_call_parser"),
    *needs("enable_log_outputs", "enable_log_requests"),
    *needs("collect_detailed_traces", "otlp_traces_endpoint"),
    Rule(
        "enable_per_request_metrics",
        lambda o: o["enable_per_request_metrics"] and o["disable_log_stats"],
        "does not go with disable_log_stats",
    ),
    Rule(
        "sse_keep_alive_interval",
        lambda o: (o["sse_keep_alive_interval"] or 0) < 0,
        "must be 0 or more ({sse_keep_alive_interval} given)",
    ),
)
