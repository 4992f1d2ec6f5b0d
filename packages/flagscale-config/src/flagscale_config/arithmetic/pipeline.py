"""How layers are divided into pipeline stages: even, uneven, virtual, or drawn by hand.

Twins of Megatron's `validate_args`, `TransformerConfig` and `PipelineParallelLayerLayout`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flagscale_config.arithmetic.options import Check, Options, Rule, clashes, divisors, listed

__all__ = ["CHECKS", "is_interleaved", "stages_of_layout", "virtual_stages"]

_SPLITS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_FIRST, _LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
_LAYOUT = "pipeline_model_parallel_layout"
_PER_CHUNK, _CHUNKS = "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"
_MAX_LAYOUT = 100_000
_REPEATED = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))


def _stage_layers(options: Options) -> int:
    """Return the layers to divide, the embedding and the loss counted where they count as layers."""
    return int(options["num_layers"]) + sum(bool(options[name]) for name in _SPLITS)


def _check_stages(options: Options) -> None:
    if not options.has("num_layers") or options["hybrid_layer_pattern"] or options["hybrid_override_pattern"]:
        return
    if options.has(_LAYOUT):
        _check_layout(options)
        return
    first, last = options[_FIRST], options[_LAST]
    if first is None and last is None:
        layers, pp = _stage_layers(options), options.pp
        if layers % pp:
            message = f"{layers} layers cannot form {pp} equal stages; use one of {listed(divisors(layers))}"
            uneven = f", or {_FIRST} / {_LAST} for uneven ones"
            options.error(options.blame("pipeline_model_parallel_size", "num_layers"), message + uneven)
            return
    elif not _check_uneven(options, first, last):
        return
    _check_virtual(options)


def _check_uneven(options: Options, first: int | None, last: int | None) -> bool:
    """Check stages of which the first or last is given; the middle must divide evenly."""
    name = _FIRST if first is not None else _LAST
    if any(size is not None and size < 1 for size in (first, last)):
        options.error(name, "must be at least 1")
        return False
    if options.has(_PER_CHUNK):
        options.error(_PER_CHUNK, f"does not go with uneven stages; use {_CHUNKS}")
        return False
    for split in _SPLITS:
        if options[split]:
            options.error(split, f"does not go with {name}; the sizes of its stages are given there")
            return False
    rest = options["num_layers"] - (first or 0) - (last or 0)
    stages = options.pp - (first is not None) - (last is not None)
    if rest < 0 or stages < 0 or bool(rest) != bool(stages):
        options.error(name, f"leaves {rest} layers for {stages} middle stages")
        return False
    if stages and rest % stages:
        options.error(name, f"leaves {rest} layers, which {stages} middle stages cannot share equally")
        return False
    return True


def _virtual_stages(options: Options) -> int | None:
    """Return the model chunks per stage; None when stages are not interleaved or the numbers do not fit."""
    per_chunk = options[_PER_CHUNK]
    if per_chunk is None:
        chunks = options[_CHUNKS]
        return None if chunks == 1 else chunks
    per_stage = _stage_layers(options) // options.pp
    if per_chunk < 1 or per_stage % per_chunk:
        allowed = listed(divisors(per_stage))
        message = f"{per_chunk} does not divide the {per_stage} layers of a stage; use one of {allowed}"
        options.error(_PER_CHUNK, message)
        return None
    chunks = per_stage // per_chunk
    return None if chunks == 1 else chunks


def _check_virtual(options: Options) -> None:
    given = [name for name in (_PER_CHUNK, _CHUNKS) if options.has(name)]
    if len(given) == 2:
        options.error(given[0], f"does not go with {given[1]}; give one of them")
        return
    chunks = _virtual_stages(options) if given else None
    if chunks is None or not _check_interleaving(options, given[0]):
        return
    first, last = options[_FIRST], options[_LAST]
    middle = options.pp - (first is not None) - (last is not None)
    rest = _stage_layers(options) - (first or 0) - (last or 0)
    sizes = [size for size in (first, last, rest // middle if middle else None) if size is not None]
    wrong = next((size for size in sizes if size % chunks), None)
    if wrong is not None:
        allowed = listed(divisors(wrong))
        message = f"{chunks} chunks do not divide the {wrong} layers of a stage; use one of {allowed}"
        options.error(given[0], message)


def _check_interleaving(options: Options, name: str) -> bool:
    """Check that there are enough stages to interleave."""
    need = 3 if options["no_overlap_p2p_communication"] else 2
    if options.pp >= need:
        return True
    message = f"interleaved stages need pipeline_model_parallel_size of at least {need} ({options.pp} given)"
    options.error(name, message)
    return False


def stages_of_layout(layout: str) -> list[str]:
    """Return the stages that a `pipeline_model_parallel_layout` draws, one letter per layer.

    The letters are Megatron's: `E` embedding, `t` transformer layer, `m` MTP layer, `L` loss; `x*3` repeats,
    `(tt|)*29` repeats a group, commas are for the eye.

    Raises:
        ValueError: a letter is not one of these, or the repetitions are beyond all measure.
    """
    text = layout.replace(",", "")
    for pattern in _REPEATED:
        counts = [len(found[1]) * int(found[2]) for found in pattern.finditer(text) if len(found[2]) < 9]
        if sum(counts) > _MAX_LAYOUT or len(pattern.findall(text)) != len(counts):
            raise ValueError(f"repeats to more than {_MAX_LAYOUT} layers")
        text = pattern.sub(lambda found: found[1] * int(found[2]), text)
    odd = sorted(set(text) - set("EtmL|"))
    if odd:
        raise ValueError(f"{odd[0]!r} is no layer; the letters are E, t, m and L, stages are divided by |")
    return text.split("|")


def _check_layout(options: Options) -> None:
    """Check a layout drawn by hand: its stages, its letters and their order."""
    others = [name for name in (_PER_CHUNK, _CHUNKS, _FIRST, _LAST, *_SPLITS) if options.given.get(name)]
    for name in others:
        options.error(name, f"does not go with {_LAYOUT}, which says it all")
    try:
        stages = stages_of_layout(options[_LAYOUT])
    except ValueError as error:
        options.error(_LAYOUT, str(error))
        return
    pp = options.pp
    if len(stages) % pp:
        message = f"{len(stages)} stages are not a multiple of pipeline_model_parallel_size {pp}"
        options.error(_LAYOUT, message)
        return
    wrong = _faults(stages, options) + _faults_of_mtp(stages, pp, options["mtp_num_layers"])
    if wrong:
        options.error(_LAYOUT, "; ".join(wrong))
    elif len(stages) > pp:
        _check_interleaving(options, _LAYOUT)


def _faults(stages: list[str], options: Options) -> list[str]:
    """Return what is wrong with the embedding, the layers and the loss."""
    order, layers = "".join(stages), options["num_layers"]
    wrong = []
    if not order.startswith("E") or order.count("E") != 1:
        wrong.append("must start with E, the one embedding")
    if not order.endswith("L") or order.count("L") != 1:
        wrong.append("must end with L, the one loss")
    if order.count("t") != layers:
        wrong.append(f"has {order.count('t')} transformer layers of {layers}")
    return wrong


def _faults_of_mtp(stages: list[str], pp: int, wanted: int | None) -> list[str]:
    """Return what is wrong with the layers of multi-token prediction."""
    order, wrong = "".join(stages), []
    found = order.count("m")
    if found != (wanted or 0):
        wrong.append(f"has {found} MTP layers of {wanted or 0}")
    if found and "t" in order[order.index("m") :]:
        wrong.append("MTP layers stand after all transformer layers")
    if any("m" in stage for stage in stages[:-pp]):
        wrong.append("MTP layers stand in the last chunk of a process")
    if any(0 < stage.count("m") < found for stage in stages[-pp:]):
        wrong.append("all MTP layers stand in one stage")
    return wrong


def virtual_stages(given: Mapping[str, Any]) -> int | None:
    """Return the model chunks per pipeline stage of checked options, None when stages are not interleaved."""
    pp = given.get("pipeline_model_parallel_size", 1)
    if given.get(_LAYOUT) is not None:
        chunks = len(stages_of_layout(given[_LAYOUT])) // pp
        return chunks if chunks > 1 else None
    per_chunk = given.get(_PER_CHUNK)
    if per_chunk is None:
        number: int | None = given.get(_CHUNKS)
        return number
    layers = given["num_layers"] + sum(bool(given.get(name)) for name in _SPLITS)
    return int(layers // pp // per_chunk)


_PATTERN = "hybrid_layer_pattern"

CHECKS: tuple[Check, ...] = (
    _check_stages,
    *clashes(_PATTERN, "hybrid_override_pattern", _PER_CHUNK, _CHUNKS, _LAYOUT, *_SPLITS),
    Rule(
        "defer_embedding_wgrad_compute",
        lambda o: o["defer_embedding_wgrad_compute"] and o.pp == 1,
        "needs pipeline_model_parallel_size of more than 1",
    ),
    Rule(
        "defer_embedding_wgrad_compute",
        lambda o: o["defer_embedding_wgrad_compute"] and o["no_gradient_accumulation_fusion"],
        "does not go with no_gradient_accumulation_fusion",
    ),
    Rule(
        "wgrad_deferral_limit",
        lambda o: o["defer_embedding_wgrad_compute"] and o["wgrad_deferral_limit"] < 0,
        "must be at least 0 ({wgrad_deferral_limit} given)",
    ),
    Rule(
        "overlap_p2p_communication_warmup_flush",
        lambda o: (
            o["overlap_p2p_communication_warmup_flush"]
            and (o["no_overlap_p2p_communication"] or not is_interleaved(o))
        ),
        "needs interleaved stages with overlapping communication",
    ),
    Rule(
        "inference_batch_times_seqlen_threshold",
        lambda o: o["inference_batch_times_seqlen_threshold"] > -1 and o.pp == 1,
        "needs pipeline_model_parallel_size of more than 1",
    ),
)


def is_interleaved(options: Options) -> bool:
    """Whether stages are interleaved; what cannot be computed has been reported."""
    try:
        return (virtual_stages({**options.given, "num_layers": options["num_layers"] or 0}) or 1) > 1
    except (ValueError, ZeroDivisionError):
        return True
