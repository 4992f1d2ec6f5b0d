"""Does it fit? Weights, keys and values, and working memory per device, before minutes are spent on a start.

Weights are exact: the safetensors headers say how many bytes of each number format there are, and the engine
loads them as its `dtype` says. Keys and values per token follow from the architecture
(`flagscale_config.models`). Working memory is an estimate (see `_working_bytes`), on the safe side.

The split over devices is the engines' own: tensor parallelism divides matrices and the heads of keys and
values (but not below one head for each device, and never the compressed vector of latent attention), the
pipeline divides layers, data parallelism divides nothing but the experts.

On a CPU, all ranks of all instances share the memory of their host. vLLM does not see to it: each of its
workers takes the bytes that it is told for keys and values, and else a part of the whole memory of the NUMA
node of its first core, as if it were alone (vLLM 0.32, `v1/worker/cpu_worker.py`). A plan tells it the bytes
and lets it run on every core, so that node is the same for all ranks; nobody says how much memory one node
has, so on a host with several this estimate, which counts all of them, is too kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from flagscale_serve.engines import Layout
from flagscale_serve.model import Model
from flagscale_serve.placing import Berth
from flagscale_serve.service import Instance

if TYPE_CHECKING:
    from flagscale_config.models import ModelFacts
    from flagscale_hw import Device, Machine

__all__ = ["Fit", "Tenant", "devices_words", "fit", "fit_together", "words_of"]

_GIB, _MIB = 1 << 30, 1 << 20
_SHARES = {"vllm": 0.92, "sglang": 0.88}
"""Part of a device that an engine takes when it is not told; what others take grows with the need."""
_RUNTIME_BYTES = 1536 << 20
"""Context of the driver, communication buffers and captured graphs on an accelerator."""
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_QUANTISED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.56}
"""Bytes per parameter when an engine quantises while it loads; 4 bits with a scale for each 64."""
_BATCHED_TOKENS = 8192
_SEQUENCES = 256
_STEP = 1024
"""Lengths are suggested in multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one device of an instance has to hold. Bytes; None is not known."""

    instance: str
    devices: int
    memory: int | None
    """Of the smallest device; where the chip is the CPU itself, the share of each rank."""
    budget: int | None
    """What the engine may take of it."""
    weights: int
    working: int
    """Activations, logits and the runtime, estimated."""
    kv_per_token: float | None
    room: int | None
    """For keys and values."""
    kv_tokens: int | None
    """Tokens that the room holds, over all sequences of one copy of the model."""
    max_model_len: int | None
    """Longest sequence that is asked for."""
    verdict: str
    """`fits`, `short` (a sequence of full length does not), `too big` (the weights do not), `unknown`."""
    advice: tuple[str, ...] = ()
    """The nearest settings that fit, as options."""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Render as plain JSON."""
        return asdict(self)


def fit(
    instance: Instance,
    model: Model,
    layout: Layout,
    machine: Machine,
    *,
    devices: Sequence[Device] = (),
    told: Mapping[str, Any] | None = None,
) -> Fit:
    """Compare what an instance needs with what its devices have.

    Args:
        instance: what is asked.
        model: what its directory says.
        layout: how it is spread.
        machine: where it runs. On a CPU its memory is what the ranks of this instance have together: that of
            every host it spans, without what other instances hold there.
        devices: those it gets; the machine's own memory counts where there are none.
        told: options that the engine is started with, over those of the instance.
    """
    facts = None if model.is_gguf else _facts(model)
    asked = _Asked(instance, model, facts, machine, devices, tuple((told or {}).items()))
    found = _estimate(asked, layout)
    if found.verdict not in ("short", "too big"):
        return found
    advice = tuple(_advice(asked, layout, found))
    found = replace(found, advice=advice)
    return replace(found, warnings=(words_of(found),)) if found.verdict == "short" else found


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """An instance and its places, for `fit_together`."""

    instance: Instance
    model: Model
    layout: Layout
    berths: tuple[Berth, ...]
    cache: Any = None
    """What each rank is told to set aside for keys and values, as bytes or `4G`; None: nothing."""

    def fit(self, taken: Mapping[str, int]) -> Fit:
        """Compare it with what it has; `taken`: host -> bytes that others hold there, which count on CPUs."""
        machine = self.berths[0].machine
        if machine.chip == "cpu" and machine.memory_bytes:
            # Its ranks are spread evenly over its hosts: the fullest of them decides.
            free = min(one.machine.memory_bytes - taken.get(one.host, 0) for one in self.berths)
            machine = replace(machine, memory_bytes=max(1, free) * len(self.berths))
        told = {} if self.cache is None else {"kv_cache_memory_bytes": self.cache}
        return fit(self.instance, self.model, self.layout, machine, devices=self.berths[0].devices, told=told)

    @property
    def held(self) -> Counter[str]:
        """Bytes that it surely holds on each host that is a CPU."""
        counts = {one.host: one.count for one in self.berths if one.machine.chip == "cpu"}
        if not counts:  # spares accelerators, whose memory nobody shares, a second estimate
            return Counter()
        alone = self.fit({})
        each = alone.weights + (max(0, alone.room or 0) if self.cache is not None else 0)
        return Counter({host: each * count for host, count in counts.items()})


def fit_together(tenants: Sequence[Tenant]) -> list[Fit]:
    """Compare the instances of one service with what they have; those on CPUs share the memory of a host."""
    held = [one.held for one in tenants]
    everybody = sum(held, Counter[str]())
    return [one.fit(everybody - mine) for one, mine in zip(tenants, held, strict=True)]


def words_of(found: Fit) -> str:
    """Say what does not fit, with the numbers and what would."""
    cure = f"use {' or '.join(found.advice)}" if found.advice else "use more or larger devices"
    if found.verdict == "too big":
        return (
            f"{found.instance}: weights: {_gib(found.weights)} on {devices_words(found.devices)}, of which "
            f"the engine may take {_gib(found.budget)} ({_gib(found.memory)} in all): they do not fit: {cure}"
        )
    return (
        f"{found.instance}: max_model_len: {found.max_model_len}: the {_gib(max(0, found.room or 0))} that "
        f"{_gib(found.weights)} of weights and {_gib(found.working)} of working memory leave on a device "
        f"hold keys and values of {found.kv_tokens} tokens: {cure}"
    )


def devices_words(count: int) -> str:
    """Say which devices a number belongs to."""
    return "the device" if count == 1 else f"each of {count} devices"


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / _GIB:.1f} GiB"


@dataclass(frozen=True)
class _Asked:
    """Everything that an estimate looks at, beside the layout."""

    instance: Instance
    model: Model
    facts: ModelFacts | None
    machine: Machine
    devices: Sequence[Device]
    changes: tuple[tuple[str, Any], ...] = ()

    def option(self, *names: str) -> Any:
        settled = {**self.instance.settled, **dict(self.changes)}
        return next((settled[name] for name in names if settled.get(name) is not None), None)

    @property
    def is_cpu(self) -> bool:
        return self.machine.chip == "cpu"

    def memory(self, layout: Layout) -> int | None:
        if self.is_cpu:
            memory = self.machine.memory_bytes
            return memory // layout.devices if memory else None
        known = [one.memory_total_bytes for one in self.devices or self.machine.visible]
        sizes = [size for size in known if size]
        return min(sizes) if sizes and len(sizes) == len(known) else None

    @property
    def share(self) -> float:
        if self.is_cpu:
            return 1.0
        given = self.option("gpu_memory_utilization", "mem_fraction_static")
        return float(given) if given is not None else _SHARES.get(self.instance.engine, 1.0)

    @property
    def element_bytes(self) -> float:
        """Bytes of a number in weights and activations as the engine loads them."""
        given = str(self.option("dtype") or "auto").removeprefix("torch.")
        if given == "auto":
            told = str(self.model.config.get("dtype") or self.model.config.get("torch_dtype") or "bfloat16")
            given = told.removeprefix("torch.")
            if given == "float32" and self.instance.engine in _SHARES and not self.is_cpu:
                return 2  # vLLM and SGLang take 16 bits unless float32 is asked for
        return _DTYPE_BYTES.get(given, 2)

    @property
    def cache_bytes(self) -> float:
        """Bytes of a number in keys and values."""
        kind = str(self.option("kv_cache_dtype", "cache_type_k") or "auto")
        if "4bit" in kind or "int4" in kind or kind.startswith(("nvfp4", "q4")):
            return 0.5
        if "8" in kind:
            return 1
        return _DTYPE_BYTES.get(kind, self.element_bytes)

    @property
    def max_model_len(self) -> int | None:
        given = self.option("max_model_len", "context_length", "ctx_size")
        if given in ("auto", -1, "-1") or (given is None and self.is_cpu):
            return None  # the engine takes what fits
        if given is not None:
            return _size(given)
        if self.facts is not None:
            return self.facts.max_positions
        return None


def _size(value: Any) -> int | None:
    """Read `32k` as the engines do."""
    text = str(value)
    powers = {"k": 1000, "m": 1000**2, "g": 1000**3, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        return int(float(text[:-1]) * powers[text[-1]]) if text[-1:] in powers else int(float(text))
    except (ValueError, OverflowError):
        return None


def _facts(model: Model) -> ModelFacts | None:
    from flagscale_config import ConfigError
    from flagscale_config.models import ModelFacts

    try:
        return ModelFacts.from_hugging_face(model.config)
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError):
        return None  # an architecture that nobody has described yet: its weights are still counted


def _estimate(asked: _Asked, layout: Layout) -> Fit:
    weights = _weights_bytes(asked, layout)
    working = 0 if asked.is_cpu else _working_bytes(asked, layout)
    per_token = _kv_per_token(asked, layout)
    memory = asked.memory(layout)
    budget = None if memory is None else int(memory * asked.share)
    room = None if budget is None else budget - weights - working
    fixed = _size(asked.option("kv_cache_memory_bytes") or "")
    if fixed is not None:
        # A CPU has no other memory than that: vLLM ends at once where the cache does not fit.
        room = min(fixed, room) if asked.is_cpu and room is not None else fixed
    length = asked.max_model_len
    tokens = None if room is None or not per_token else max(0, int(room / per_token))
    if budget is None:
        verdict = "unknown"
    elif weights > budget:
        verdict = "too big"
    elif tokens is not None and length is not None and tokens < length:
        verdict = "short"
    else:
        verdict = "fits" if tokens is not None else "unknown"
    return Fit(
        instance=asked.instance.name,
        devices=layout.devices,
        memory=memory,
        budget=budget,
        weights=weights,
        working=working,
        kv_per_token=per_token,
        room=room,
        kv_tokens=tokens,
        max_model_len=length,
        verdict=verdict,
    )


def _weights_bytes(asked: _Asked, layout: Layout) -> int:
    """Return the bytes of weights on one device."""
    model, facts = asked.model, asked.facts
    if model.bytes_of:
        elements = sum(size / _FLOATS[kind] for kind, size in model.bytes_of.items() if kind in _FLOATS)
        packed = sum(size for kind, size in model.bytes_of.items() if kind not in _FLOATS)
    elif model.num_weight_bytes or facts is None:
        elements, packed = 0.0, model.num_weight_bytes
    else:
        elements, packed = float(facts.num_parameters), 0
    whole = elements * asked.element_bytes + packed
    smaller = _QUANTISED_BYTES.get(str(asked.option("quantization")))
    if smaller is not None and elements and "quantization_config" not in model.config:
        kept = min(elements, facts.num_embedding_parameters if facts is not None else 0)
        whole = packed + kept * asked.element_bytes + (elements - kept) * smaller
    spread = _experts_part(facts)
    model_parallel = layout.tensor * layout.pipeline
    mine = whole * (1 - spread) / model_parallel + whole * spread / (model_parallel * layout.data)
    return max(0, int(mine - float(asked.option("cpu_offload_gb") or 0) * _GIB))


def _experts_part(facts: ModelFacts | None) -> float:
    """Return the part of all parameters that are experts, which data parallelism divides too."""
    if facts is None or facts.experts is None:
        return 0.0
    layers = facts.num_layers - len(facts.experts.dense_layers)
    each = facts.experts.matrices(facts.hidden_size, is_gated=facts.is_gated, active=False)
    return min(1.0, layers * each / facts.num_parameters)


def _working_bytes(asked: _Asked, layout: Layout) -> int:
    """Estimate what a step needs beside weights and cache: an upper bound of our own, not a measurement.

    Six vectors of the hidden size and three of the feed-forward width are alive for each token of a step, and
    32-bit logits with as much again for sampling for each sequence.
    """
    facts = asked.facts
    if facts is None:
        return _RUNTIME_BYTES
    tokens = _size(asked.option("max_num_batched_tokens", "chunked_prefill_size") or "") or _BATCHED_TOKENS
    sequences = _size(asked.option("max_num_seqs", "max_running_requests") or "") or _SEQUENCES
    width = facts.ffn_size
    if facts.experts is not None:
        width = max(width, facts.experts.experts_per_token * facts.experts.ffn_size)
    each = (6 * facts.hidden_size + 3 * width / layout.tensor) * asked.element_bytes
    logits = sequences * (facts.vocab_size or 0) * 4 * 2
    return int(max(0, tokens) * each + logits) + _RUNTIME_BYTES


def _kv_per_token(asked: _Asked, layout: Layout) -> float | None:
    """Return the bytes of keys and values of one token on one device; 0 without attention."""
    if asked.model.is_gguf:
        whole = _gguf_kv(asked.model.config)
        return None if whole is None else whole * asked.cache_bytes / layout.devices
    facts = asked.facts
    if facts is None:
        return None
    whole = facts.kv_cache_bytes_per_token(asked.cache_bytes) / layout.pipeline
    groups = getattr(facts.attention, "num_kv_heads", 1)  # latent attention has one vector for all heads
    return whole / min(layout.tensor, groups)


def _gguf_kv(found: Mapping[str, Any]) -> float | None:
    arch = found.get("general.architecture")
    keys = ("block_count", "embedding_length", "attention.head_count")
    told: list[Any] = [found.get(f"{arch}.{key}") for key in keys]
    told.append(found.get(f"{arch}.attention.head_count_kv", told[-1]))
    if not all(isinstance(one, int) and one > 0 for one in told):
        return None
    layers, width, heads, groups = told
    head = found.get(f"{arch}.attention.key_length", width // heads)
    value = found.get(f"{arch}.attention.value_length", head)
    return float(layers * groups * (head + value))


def _advice(asked: _Asked, layout: Layout, found: Fit) -> Iterator[str]:
    """Yield the nearest settings that fit: less length, then more devices, then smaller numbers."""
    is_short = found.verdict == "short"
    if is_short and found.kv_tokens and found.kv_tokens >= _STEP:
        yield f"max_model_len={found.kv_tokens // _STEP * _STEP}"
    if asked.is_cpu and is_short and asked.option("kv_cache_memory_bytes") is not None:
        cache = -int(-(found.max_model_len or 0) * (found.kv_per_token or 0) // _MIB) * _MIB
        if cache <= (found.budget or 0) - found.weights:
            yield f"kv_cache_memory_bytes={cache}"
    if asked.is_cpu or asked.model.is_gguf:
        return
    able = (wider for wider in _wider(asked, layout) if _estimate(asked, wider).verdict == "fits")
    if (wider := next(able, None)) is not None:
        more = f" with pipeline_parallel_size={wider.pipeline} ({wider.devices} devices)"
        yield f"tensor_parallel_size={wider.tensor}{more if wider.pipeline > layout.pipeline else ''}"
    key, value = ("kv_cache_dtype", "fp8") if is_short else ("quantization", "fp8")
    smaller = _estimate(replace(asked, changes=(*asked.changes, (key, value))), layout)
    if smaller.verdict != found.verdict:
        yield f"{key}={value}"


def _wider(asked: _Asked, layout: Layout) -> Iterator[Layout]:
    """Yield layouts with more devices, the nearest first: on this host, then over several like it."""
    here = len(asked.machine.visible) or 1
    heads = getattr(asked.facts.attention, "num_heads", 0) if asked.facts is not None else 0
    tensor = layout.tensor * 2
    while tensor * layout.pipeline * layout.data <= here:
        if not heads or heads % tensor == 0:
            yield replace(layout, tensor=tensor)
        tensor *= 2
    widest = max(size for size in (1, 2, 4, 8, 16) if size <= here and (not heads or heads % size == 0))
    for hosts in (2, 4, 8):
        yield replace(layout, tensor=max(widest, layout.tensor), pipeline=hosts)
