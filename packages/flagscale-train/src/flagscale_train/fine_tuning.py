"""What fine-tuning asks of a plan: chats (`sft`) and low-rank adapters (`peft_type: lora`).

Contradictions between options are flagscale-config's, keeping chats apart is a matter of `documents.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["conflicts", "defaults"]

_FEED_FORWARD = ("linear_fc1", "linear_fc2")


def defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that fine-tuning asks for.

    Args:
        options: the user's and the chip's, by canonical name.
    """
    chosen: dict[str, Any] = {}
    if options.get("sft"):
        # Sequences hold unlike numbers of answers; the mean over all tokens depends on no batch or layout.
        chosen["calculate_per_token_loss"] = True
    if options.get("peft_type") == "lora":
        chosen |= {
            "lora_dim": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "lora_dropout_position": "pre",
            "lora_in_init_method": "kaiming",
            "lora_out_init_method": "zero",
            "lora_target_modules": (
                *_attention(options),
                *(() if options.get("num_experts") else _FEED_FORWARD),
            ),
        }
    return chosen


def _attention(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the projections of the kind of attention that the model has."""
    if not options.get("multi_latent_attention"):
        return ("linear_qkv", "linear_proj")
    query = ("linear_q_down_proj", "linear_q_up_proj") if options.get("q_lora_rank") else ("linear_q_proj",)
    return (*query, "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")


def conflicts(options: Mapping[str, Any]) -> list[str]:
    """Say what cannot be done, each as one sentence."""
    if not options.get("sft"):
        return []
    paths = options.get("data_path") or ()
    words = paths.split() if isinstance(paths, str) else [str(path) for path in paths]
    if len(words) > 1 and len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        return ["data_path: weights: files of chats are taken whole with sft: leave the weights out"]
    return []


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
