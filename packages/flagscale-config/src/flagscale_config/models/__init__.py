"""Models in numbers: the published ones, exact parameter counts, floating-point work, cache sizes.

from flagscale_config import models

models.published("qwen3-0.6b").num_parameters            # 596049920
models.ModelFacts.from_hugging_face(config)               # from a config.json
models.num_parameters(experiment.train.options)           # from Megatron options
models.match(experiment)                                  # which published model a config is
"""

from __future__ import annotations

from flagscale_config.models.catalogue import names, published
from flagscale_config.models.facts import ModelFacts
from flagscale_config.models.matching import Difference, Match, facts_of, match
from flagscale_config.models.megatron import (
    ffn_size_by_multiple,
    flops_per_token,
    kv_cache_bytes_per_token,
    num_active_parameters,
    num_parameters,
)
from flagscale_config.models.parts import (
    Audio,
    DeltaNet,
    Experts,
    GroupedAttention,
    LatentAttention,
    Rwkv7,
    Vision,
)

__all__ = [
    "Audio",
    "DeltaNet",
    "Difference",
    "Experts",
    "GroupedAttention",
    "LatentAttention",
    "Match",
    "ModelFacts",
    "Rwkv7",
    "Vision",
    "facts_of",
    "ffn_size_by_multiple",
    "flops_per_token",
    "kv_cache_bytes_per_token",
    "match",
    "names",
    "num_active_parameters",
    "num_parameters",
    "published",
]
