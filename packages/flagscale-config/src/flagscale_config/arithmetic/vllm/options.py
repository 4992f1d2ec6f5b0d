"""The options of one vLLM as its checks see them, and the numbers of the model where they are known."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from flagscale_config.arithmetic.options import EngineOptions
from flagscale_config.errors import ConfigError
from flagscale_config.findings import Findings
from flagscale_config.places import Path

__all__ = ["ModelNumbers", "VllmCheck", "VllmOptions"]

_UNITS = {letter: 10**power for letter, power in zip("kmgt", (3, 6, 9, 12), strict=True)}
_UNITS |= {letter.upper(): 2 ** (10 * index) for index, letter in enumerate("kmgt", 1)}
# The spellings that vLLM looks for, in its order: `ModelArchConfigConvertorBase`.
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
_SCALED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})


class ModelNumbers:
    """What vLLM reads from a model's `config.json`; None for what is not there."""

    def __init__(self, config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None) -> None:
        outer = config.get("thinker_config", config)
        self._config = config
        self._text: Mapping[str, Any] = outer.get("text_config") or outer
        self._tokenizer = tokenizer or {}

    def _first(self, names: Sequence[str]) -> int | None:
        found = (self._text.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), None)

    @property
    def heads(self) -> int | None:
        """Attention heads."""
        return self._first(("num_attention_heads",))

    @property
    def kv_heads(self) -> int | None:
        """Heads of keys and values."""
        return self._first(_KV_HEADS) or self.heads

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return bool(self._first(_EXPERTS)) or "block_configs" in self._text

    @property
    def is_latent(self) -> bool:
        """Whether its attention is multi-head latent attention."""
        return self._text.get("kv_lora_rank") is not None

    @property
    def is_multimodal(self) -> bool:
        """Whether it takes more than text."""
        return any(name.endswith(("vision_config", "audio_config")) for name in self._config) or (
            "thinker_config" in self._config
        )

    @property
    def max_length(self) -> float | None:
        """Tokens at most, as vLLM derives them; None where the model does not say it."""
        lengths = [self._text[name] for name in _LENGTHS if isinstance(self._text.get(name), int)]
        if not lengths:
            return None
        limit: float = min(*lengths, self._tokenizer.get("model_max_length", float("inf")), float("inf"))
        scaling = self._text.get("rope_parameters") or self._text.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        return limit if kind in _SCALED else limit * float(scaling.get("factor") or 1)


class VllmOptions(EngineOptions):
    """The options of one vLLM: what is not given has vLLM's default."""

    def __init__(
        self,
        given: Mapping[str, Any],
        places: Mapping[str, Path],
        findings: Findings,
        envs: Mapping[str, Any],
    ) -> None:
        super().__init__(given, findings, "vllm")
        self.places = places
        self._envs = envs

    def path(self, name: str) -> Path:
        """Return where an option stands in the file; the options as a whole when it is a default."""
        return self.places.get(name, self.places[""])

    def env(self, name: str) -> bool:
        """Whether a switch among the environment variables is on."""
        value = self._envs.get(name, os.environ.get(name))
        return str(value).lower() in {"1", "true"}

    def number(self, name: str) -> int | None:
        """Return a size as a number (`8k` is 8000, `8K` is 8192); None for `auto`, -1 and none."""
        value = self[name]
        if isinstance(value, str):
            found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", value)
            value = int(float(found[1]) * _UNITS.get(found[2], 1)) if found else None
        return value if isinstance(value, int) and value >= 0 else None

    def part(self, name: str) -> Mapping[str, Any]:
        """Return a JSON option as a mapping; empty where it is none."""
        value = self[name]
        return value if isinstance(value, Mapping) else {}

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return int(self["tensor_parallel_size"])

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return int(self["pipeline_parallel_size"])

    @property
    def pcp(self) -> int:
        """Parts into which prompts are cut."""
        return int(self["prefill_context_parallel_size"] or 1)

    @property
    def dcp(self) -> int:
        """Parts into which the cache is cut while decoding."""
        return int(self["decode_context_parallel_size"] or 1)

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return int(self["data_parallel_size"])

    @property
    def is_external(self) -> bool:
        """Whether the load is balanced outside: asked for, or a rank is given."""
        return bool(self["data_parallel_external_lb"]) or self["data_parallel_rank"] is not None

    @property
    def max_length(self) -> int | None:
        """Tokens of a sequence at most, where it is known."""
        given = self.number("max_model_len")
        if given is not None or self.model is None or self.model.max_length is None:
            return given
        return int(self.model.max_length)

    @cached_property
    def model(self) -> ModelNumbers | None:
        """The model's numbers: of the `config.json` at its path, or of a published model.

        None for a model still to be given: vLLM's own default is never what a file means.
        """
        name = self["hf_config_path"] or (self["model"] if "model" in self.places else None)
        if not isinstance(name, str) or self["hf_overrides"] or self["config_format"] not in {"auto", "hf"}:
            return None
        folder = FilePath(name)
        try:
            if (folder / "config.json").is_file():
                tokenizer = folder / "tokenizer_config.json"
                found = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else None
                return ModelNumbers(json.loads((folder / "config.json").read_text(encoding="utf-8")), found)
            return None if folder.exists() else _published(name)
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def _published(name: str) -> ModelNumbers | None:
    """Return the numbers of a published model by its repository; lengths are left to its own files."""
    if "/" not in name or name.startswith((".", "/")):
        return None
    from flagscale_config.models import published

    try:
        facts = published(name)
    except (ConfigError, KeyError):
        return None
    attention = facts.attention
    experts = facts.experts.num_experts if facts.experts is not None else 0
    config: dict[str, Any] = {
        "num_attention_heads": getattr(attention, "num_heads", None),
        "num_key_value_heads": getattr(attention, "num_kv_heads", None),
        "num_experts": experts,
        "kv_lora_rank": getattr(attention, "kv_rank", None),
    }
    if facts.vision is not None or facts.audio is not None:
        config["vision_config"] = {}
    return ModelNumbers(config)


VllmCheck = Callable[[VllmOptions], None]
