"""Speculative decoding: twins of vLLM's `SpeculativeConfig`.

What the draft model's own files decide is left to vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale_config.arithmetic.vllm.options import VllmCheck, VllmOptions

__all__ = ["CHECKS"]

_CONFIG = "speculative_config"
_SHORT = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
_WITHOUT_MODEL = ("ngram", "ngram_gpu", "suffix", "extract_hidden_states", "mtp", "dspark")
_NOT_ASYNC = ("ngram", "suffix", "custom_class", "medusa", "mlp_speculator")


def _settings(options: VllmOptions) -> Mapping[str, Any]:
    """Return what is asked for, short options included; empty where nothing is speculated."""
    found = {key.replace("-", "_"): value for key, value in options.part(_CONFIG).items()}
    short = {key: options[name] for name, key in _SHORT.items() if options[name] is not None}
    return {**short, **found}


def _method(settings: Mapping[str, Any]) -> str | None:
    """Return the method; vLLM guesses it from the model where it is not named."""
    method = settings.get("method")
    if method is not None:
        return str(method).strip("[]")
    return "ngram" if settings.get("model") in ("ngram", "[ngram]") else None


def _check_twice(options: VllmOptions) -> None:
    for name, key in _SHORT.items():
        if options[name] is not None and key in options.part(_CONFIG):
            options.error(name, f"is in {_CONFIG} as {key} too; keep one")


def _check_drafts(options: VllmOptions) -> None:
    """Check who drafts, and how many tokens."""
    settings, name = _settings(options), options.blame(_CONFIG, *_SHORT)
    if not settings:
        return
    count, method, model = settings.get("num_speculative_tokens"), _method(settings), settings.get("model")
    if isinstance(count, int) and count < 1:
        options.error(name, f"num_speculative_tokens must be at least 1 ({count} given)")
    if count is None and method in {"ngram", "ngram_gpu"}:
        options.error(name, f"{method} needs num_speculative_tokens")
    is_own = method in _WITHOUT_MODEL or str(method).endswith("_mtp")
    if count is not None and model is None and not is_own:
        options.error(
            name, f"needs model, which drafts, or a method without one: {', '.join(_WITHOUT_MODEL)}"
        )
    draft_tp = settings.get("draft_tensor_parallel_size")
    if draft_tp not in (None, 1, options.tp) and model is not None and method not in _NOT_ASYNC:
        message = (
            f"draft_tensor_parallel_size must be 1 or tensor_parallel_size {options.tp} ({draft_tp} given)"
        )
        options.error(name, message)
    if settings.get("tensor_parallel_size") is not None:
        options.error(name, "has no tensor_parallel_size; use draft_tensor_parallel_size")


def _check_lookup(options: VllmOptions) -> None:
    settings = _settings(options)
    low, high = settings.get("prompt_lookup_min"), settings.get("prompt_lookup_max")
    is_ngram = _method(settings) in {"ngram", "ngram_gpu"}
    if is_ngram and isinstance(low, int) and isinstance(high, int) and low > high:
        options.error(_CONFIG, f"prompt_lookup_min {low} is more than prompt_lookup_max {high}")
    for key, value in (("prompt_lookup_min", low), ("prompt_lookup_max", high)):
        if isinstance(value, int) and value < 1:
            options.error(_CONFIG, f"{key} must be at least 1 ({value} given)")


def _check_synthetic(options: VllmOptions) -> None:
    """Check acceptance rates that are made up, for measuring."""
    settings = _settings(options)
    rates, length = settings.get("synthetic_acceptance_rates"), settings.get("synthetic_acceptance_length")
    count = settings.get("num_speculative_tokens")
    if settings.get("rejection_sample_method") != "synthetic":
        if rates is not None or length is not None:
            options.error(_CONFIG, "synthetic acceptance needs rejection_sample_method synthetic")
        return
    if (rates is None) == (length is None):
        options.error(
            _CONFIG, "synthetic needs one of synthetic_acceptance_rates and synthetic_acceptance_length"
        )
    elif not isinstance(count, int):
        return
    elif rates is not None and not _are_rates(rates, count):
        options.error(_CONFIG, f"synthetic_acceptance_rates must be {count} numbers from 1 down to 0")
    elif isinstance(length, (int, float)) and not 1 <= length <= count + 1:
        options.error(
            _CONFIG, f"synthetic_acceptance_length must be between 1 and {count + 1} ({length} given)"
        )


def _are_rates(rates: Any, count: int) -> bool:
    """Whether these are `count` probabilities, none larger than the one before."""
    if not isinstance(rates, (list, tuple)) or not all(isinstance(rate, (int, float)) for rate in rates):
        return False
    is_falling = list(rates) == sorted(rates, reverse=True)
    return len(rates) == count and all(0 <= rate <= 1 for rate in rates) and is_falling


def _check_together(options: VllmOptions) -> None:
    """Check speculation against the rest."""
    settings = _settings(options)
    count, method = settings.get("num_speculative_tokens"), _method(settings)
    name = "per_request_spec_decode_metrics"
    if not settings:
        if options[name] not in {None, "none"}:
            options.error(name, f"needs {_CONFIG}")
        return
    if options["async_scheduling"] and method in _NOT_ASYNC:
        options.error("async_scheduling", f"does not go with speculation by {method}")
    if options["async_scheduling"] and settings.get("disable_padded_drafter_batch"):
        options.error("async_scheduling", "does not go with disable_padded_drafter_batch")
    tokens, seqs = options.number("max_num_batched_tokens"), options.given.get("max_num_seqs")
    if options["enable_lora"] and isinstance(count, int) and tokens and seqs and tokens < seqs * (count + 1):
        message = f"{tokens} is less than max_num_seqs {seqs} x {count + 1} tokens each: raise it"
        options.error("max_num_batched_tokens", message)
    if settings.get("use_heterogeneous_vocab") and method not in {None, "draft_model"}:
        options.error(_CONFIG, "use_heterogeneous_vocab needs method draft_model")


CHECKS: tuple[VllmCheck, ...] = (
    _check_twice,
    _check_drafts,
    _check_lookup,
    _check_synthetic,
    _check_together,
)
