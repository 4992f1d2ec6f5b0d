"""Fine-tuning: chats (`sft`) and low-rank adapters (`peft_type: lora`), as flagscale-train does both."""

from __future__ import annotations

from flagscale_config.arithmetic.experts import is_mixed
from flagscale_config.arithmetic.options import Check, Options, Rule

__all__ = ["CHECKS"]

_FEED_FORWARD = {"linear_fc1", "linear_fc2", "gate_proj", "up_proj", "down_proj"}
_ATTENTION = {"linear_qkv", "linear_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
_LATENT_ATTENTION = {
    "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
}  # fmt: skip
_WHOLE_QUERY = {"linear_q_proj", "q_proj"}
_QUERY_OF_A_RANK = {"linear_q_down_proj", "linear_q_up_proj", "q_a_proj", "q_b_proj"}


def _targets(options: Options) -> set[str]:
    """Return what an adapter may be put on, by Megatron's names and by Hugging Face's."""
    if not options["multi_latent_attention"]:
        return _ATTENTION | _FEED_FORWARD
    return _LATENT_ATTENTION | _FEED_FORWARD | (_QUERY_OF_A_RANK if options["q_lora_rank"] else _WHOLE_QUERY)


def _is_lora(options: Options) -> bool:
    return bool(options["peft_type"] == "lora")


def _check_adapters(options: Options) -> None:
    given = [name for name in options.given if name.startswith("lora_") and options.given[name] is not None]
    if not _is_lora(options):
        for name in given:
            options.error(name, "has no effect without peft_type: lora; set that or remove this")
        return
    targets = options.values("lora_target_modules")
    known = _targets(options)
    unknown = [name for name in targets if name not in known]
    if unknown:
        options.error(
            "lora_target_modules",
            f"{', '.join(map(str, unknown))}: no such layer; use some of {', '.join(sorted(known))}",
        )
    if options["num_experts"] and _FEED_FORWARD & set(targets):
        _check_adapters_of_experts(options, set(targets))


def _check_adapters_of_experts(options: Options, targets: set[str]) -> None:
    """Refuse what no adapter of experts could do, or what peft could not load."""
    if is_mixed(options) or options["moe_shared_expert_intermediate_size"]:
        options.error(
            "lora_target_modules",
            "peft has no names for adapters of experts beside those of dense or shared layers; name layers "
            "of attention alone",
        )
    if len({"gate_proj", "up_proj"} & targets) == 1:
        options.error(
            "lora_target_modules", "gate_proj and up_proj of experts are one weight; name both or none"
        )
    if options.etp > 1:
        options.error(
            "expert_tensor_parallel_size",
            f"experts with adapters are not divided ({options.etp} here); set it to 1, or name layers of "
            "attention alone in lora_target_modules",
        )


CHECKS: tuple[Check, ...] = (
    _check_adapters,
    Rule(
        "peft_type",
        lambda o: (
            _is_lora(o)
            and not o["pretrained_checkpoint"]
            and "pretrained_checkpoint" not in o.findings.excused
        ),
        "lora needs pretrained_checkpoint, the weights it adapts; make them with flagscale-convert run",
    ),
    Rule(
        "finetune",
        lambda o: _is_lora(o) and o["finetune"],
        "does not go with peft_type: lora, whose load is the adapters' own; name the model's weights by "
        "pretrained_checkpoint",
    ),
    Rule(
        "peft_type",
        lambda o: _is_lora(o) and (o["use_torch_fsdp2"] or o["use_megatron_fsdp"]),
        "lora does not go with FSDP; use use_distributed_optimizer",
    ),
    *(
        Rule(
            name,
            lambda o, name=name: _is_lora(o) and o[name],  # type: ignore[misc]
            "does not go with peft_type: lora; it computes past the layers that adapters are on; remove it",
        )
        for name in ("use_transformer_engine_op_fuser", "moe_single_grouped_weight")
    ),
    Rule("sft", lambda o: o["sft"] and o["mtp_num_layers"], "does not go with mtp_num_layers; remove that"),
    Rule(
        "sft",
        lambda o: o["sft"] and o["mock_data"],
        "does not go with mock_data; give data_path, a file of chats",
    ),
    Rule("sft", lambda o: o["sft"] and o["fim_data"], "does not go with fim_data; keep one"),
    Rule(
        "tokenizer_type",
        lambda o: o["sft"] and o.has("tokenizer_type") and o["tokenizer_type"] != "HuggingFaceTokenizer",
        "sft renders chats by the tokenizer's own template; use HuggingFaceTokenizer with the folder "
        "of a chat model as tokenizer_model",
    ),
    Rule(
        "sft_tokenizer_prompt_format",
        lambda o: o["sft"] and "sft_tokenizer_prompt_format" in o.given,
        "has no effect; chats are rendered by the tokenizer's own template; remove it",
    ),
    *(
        Rule(
            name,
            lambda o, name=name: o["sft"] and o.given.get(name) is False,  # type: ignore[misc]
            "does not go with sft, which always keeps chats apart; remove it",
        )
        for name in ("reset_position_ids", "reset_attention_mask")
    ),
)
