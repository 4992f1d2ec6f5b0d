"""Cross-field checks: the numbers in the message, the nearest values that work, the right place.

That Megatron itself refuses the same cases is proven by `test_megatron_twins.py`.
"""

import re
from pathlib import Path

import pytest

from flagscale_config import arithmetic, check, load, option_table
from flagscale_config.arithmetic import divisors, nearest_multiples, padded_vocab_size
from flagscale_config.arithmetic.patterns import layer_pattern

INVALID = [
    (["+train.system.tensor_model_parallel_size=3", "train.model.num_attention_heads=6"],
     "train.system.tensor_model_parallel_size",
     "2 processes are not a multiple of tensor 3 x pipeline 1 x context 1 = 3; use 3 processes"),
    (["+train.system.tensor_model_parallel_size=8", "+experiment.runner.nproc_per_node=8"],
     "train.system.tensor_model_parallel_size",
     "4 attention heads cannot be shared by 8; use one of 1, 2, 4"),
    (["train.model.hidden_size=66"], "train.model.hidden_size",
     "66 is not a multiple of 4 heads; use 64 or 68, or set kv_channels"),
    (["+train.model.group_query_attention=true", "+train.model.num_query_groups=3"],
     "train.model.num_query_groups", "4 attention heads cannot form 3 groups; use one of 1, 2, 4"),
    (["+train.model.group_query_attention=true", "+train.model.num_query_groups=3",
      "train.model.num_attention_heads=12", "train.model.hidden_size=96",
      "+train.system.tensor_model_parallel_size=2"],
     "train.model.num_query_groups",
     ("3 query groups are neither multiple nor divisor of tensor_model_parallel_size 2; use 2 or 4, "
      "or tensor parallelism 1, 3")),
    (["+train.model.ffn_hidden_size=101", "+train.system.tensor_model_parallel_size=2"],
     "train.model.ffn_hidden_size",
     "101 is not a multiple of tensor_model_parallel_size 2; use 100 or 102"),
    (["train.model.seq_length=256"], "train.model.seq_length",
     "256 is more than max_position_embeddings 128; shorten it or raise that"),
    (["+train.system.context_parallel_size=2", "train.model.seq_length=126"], "train.model.seq_length",
     "126 is not a multiple of 2 x context_parallel_size 2; use 124 or 128"),
    (["train.model.global_batch_size=7"], "train.model.global_batch_size",
     "7 is not a multiple of micro batch 1 x data parallel 2 = 2; use 6 or 8"),
    (["train.model.micro_batch_size=3", "train.model.global_batch_size=8"], "train.model.global_batch_size",
     "8 is not a multiple of micro batch 3 x data parallel 2 = 6; use 6 or 12, or micro batch 1, 2, 4"),
    (["+train.system.pipeline_model_parallel_size=2", "train.model.num_layers=5"],
     "train.system.pipeline_model_parallel_size",
     ("5 layers cannot form 2 equal stages; use one of 1, 5, or decoder_first_pipeline_num_layers / "
      "decoder_last_pipeline_num_layers for uneven ones")),
    (["+train.system.expert_model_parallel_size=2"], "train.system.expert_model_parallel_size",
     "is 2, but the model has no experts; set num_experts or 1"),
    (["+train.system.expert_model_parallel_size=2", "+train.model.num_experts=9"],
     "train.system.expert_model_parallel_size", "9 experts cannot be shared by 2; use one of 1, 3, 9"),
    (["+train.system.num_layers_per_virtual_pipeline_stage=1"],
     "train.system.num_layers_per_virtual_pipeline_stage",
     "interleaved stages need pipeline_model_parallel_size of at least 2 (1 given)"),
    (["+train.system.num_layers_per_virtual_pipeline_stage=3", "train.model.num_layers=8",
      "+train.system.pipeline_model_parallel_size=2"],
     "train.system.num_layers_per_virtual_pipeline_stage",
     "3 does not divide the 4 layers of a stage; use one of 1, 2, 4"),
    (["+train.system.num_virtual_stages_per_pipeline_rank=3", "train.model.num_layers=8",
      "+train.system.pipeline_model_parallel_size=2"],
     "train.system.num_virtual_stages_per_pipeline_rank",
     "3 chunks do not divide the 4 layers of a stage; use one of 1, 2, 4"),
    (["+train.system.decoder_first_pipeline_num_layers=3", "train.model.num_layers=8",
      "+train.system.pipeline_model_parallel_size=3", "experiment.runner.nproc_per_node=3",
      "train.model.global_batch_size=1"],
     "train.system.decoder_first_pipeline_num_layers",
     "leaves 5 layers, which 2 middle stages cannot share equally"),
    (["+train.model.train_samples=10"], "train.model.train_samples",
     "does not go with train_iters; give one of them"),
    (["+train.model.lr_warmup_samples=10"], "train.model.lr_warmup_samples",
     "does not go with train_iters; use lr_warmup_iters"),
    (["train.model.train_iters=20", "+train.model.lr_warmup_iters=20"], "train.model.lr_warmup_iters",
     "20 is not less than train_iters 20; lower it or raise that"),
    (["train.model.train_iters=20", "+train.model.lr_warmup_iters=7", "+train.model.lr_decay_iters=6"],
     "train.model.lr_warmup_iters", "7 is not less than lr_decay_iters 6; lower it or raise that"),
    (["+train.model.lr_warmup_iters=1", "+train.model.lr_warmup_fraction=0.1"],
     "train.model.lr_warmup_iters", "does not go with lr_warmup_fraction; give one of them"),
    (["+train.model.min_lr=1"], "train.model.min_lr", "1.0 is more than lr 0.001; lower it"),
    (["+train.system.save=/s", "~train.system.checkpoint.save_interval"], "train.system.save",
     "needs save_interval, the number of steps between checkpoints"),
    (["+train.system.fp16=true", "+train.system.bf16=true"], "train.system.fp16",
     "does not go with bf16; keep one"),
    (["+train.system.recompute_granularity=full"], "train.system.recompute_granularity",
     "full needs recompute_method"),
    (["+train.data.mock_data=true"], "train.data.data_path",
     "more than one source of data; give one of data_path, train/valid/test_data_path, mock_data"),
    (["+train.system.overlap_param_gather=true", "+train.system.overlap_grad_reduce=true"],
     "train.system.overlap_param_gather", "needs use_distributed_optimizer"),
    (["+train.system.ckpt_format=torch_dcp"], "train.system.ckpt_format",
     "torch_dcp needs use_torch_fsdp2; use torch_dist"),
    (["train.model.micro_batch_size=0"], "train.model.micro_batch_size", "must be at least 1 (0 given)"),
    (["~train.model.seq_length"], "train", "seq_length is required; set it in train.model"),
    (["~train.model.micro_batch_size"], "train",
     "micro_batch_size is required; set train.system.micro_batch_size"),
]  # fmt: skip

VALID = [
    ["experiment.runner.nproc_per_node=4", "+train.system.pipeline_model_parallel_size=2"],
    ["+train.system.tensor_model_parallel_size=2", "+train.system.sequence_parallel=true"],
    ["+train.system.tensor_model_parallel_size=2", "+train.model.group_query_attention=true",
     "+train.model.num_query_groups=1"],
    ["train.model.hidden_size=66", "+train.model.kv_channels=16"],
    ["+train.system.context_parallel_size=2"],
    ["+train.system.expert_model_parallel_size=2", "+train.model.num_experts=4"],
    ["+train.system.pipeline_model_parallel_size=2", "train.model.num_layers=5",
     "+train.system.decoder_first_pipeline_num_layers=2"],
    ["experiment.runner.nproc_per_node=null", "train.model.global_batch_size=7"],
    ["+train.system.pipeline_model_parallel_size=2", "train.model.num_layers=8",
     "+train.system.num_layers_per_virtual_pipeline_stage=2"],
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "message"), INVALID, ids=lambda item: str(item)[:60])
def test_contradictions_are_explained(overrides, key, message, tiny):
    found = [(problem.key, problem.message) for problem in check(tiny, _forced(overrides))]
    assert (key, message) in found


@pytest.mark.parametrize("overrides", VALID, ids=lambda item: str(item)[:60])
def test_what_megatron_accepts_is_accepted(overrides, tiny):
    assert check(tiny, _forced(overrides)) == ()


def _forced(overrides: list[str]) -> list[str]:
    """Let an override hold whether or not the file has the key."""
    return ["++" + text.lstrip("+") if not text.startswith("~") else text for text in overrides]


def test_all_contradictions_come_at_once(tiny):
    found = check(
        tiny, ["train.model.seq_length=256", "++train.model.min_lr=1", "train.model.global_batch_size=7"]
    )
    assert len(found) == 3


def test_a_path_still_to_be_given_does_not_hide_contradictions(tiny):
    found = check(tiny, ["train.data.data_path=???", "train.model.global_batch_size=7"])
    assert [problem.code for problem in found] == ["config/required", "config/arithmetic"]
    (only,) = check(tiny, ["train.model.micro_batch_size=???", "train.model.global_batch_size=7"])
    assert only.code == "config/required"


def test_switches_without_effect_are_noted(tiny):
    found = check(tiny, ["++train.model.num_query_groups=2", "++train.system.sequence_parallel=true"])
    assert [problem.severity for problem in found] == ["note", "note"]
    assert load(tiny, ["++train.system.sequence_parallel=true"]).train.parallelism.sequence_parallel is True


def test_parallelism_is_read_from_the_options(tiny):
    sizes = ["++experiment.runner.nproc_per_node=8", "++train.system.tensor_model_parallel_size=2"]
    sizes += ["++train.system.pipeline_model_parallel_size=2", "++train.system.context_parallel_size=2"]
    parallelism = load(tiny, sizes).train.parallelism
    assert parallelism.model_size == 8
    assert parallelism.expert_model_parallel_size == 1
    assert parallelism.virtual_pipeline_stages is None
    pipeline = ["++train.system.pipeline_model_parallel_size=2", "train.model.num_layers=8"]
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        assert (
            load(tiny, [*pipeline, f"++train.system.{name}=2"]).train.parallelism.virtual_pipeline_stages == 2
        )


@pytest.mark.parametrize("number", [1, 2, 12, 97, 360, 4096])
def test_divisors_are_all_and_only_divisors(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_nearest_multiples_surround_the_number():
    assert nearest_multiples(512, 12) == "504 or 516"
    assert nearest_multiples(5, 12) == "12"


def test_every_option_that_a_check_asks_for_is_megatrons():
    folder = Path(arithmetic.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    asked = set(re.findall(r"\b(?:o|options)\[\"(\w+)\"\]", text))
    asked |= set(re.findall(r"Rule\(\s*\"(\w+)\"", text))
    assert len(asked) > 100
    assert {name for name in asked if name not in option_table("megatron")} <= {"no_x"}


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [((151936, 128, 1), 151936), ((151936, 128, 8), 152576), ((32000, 64, 2), 32000), ((1, 128, 4), 512)],
)
def test_a_vocabulary_is_filled_up(sizes, rows):
    assert padded_vocab_size(*sizes) == rows


@pytest.mark.parametrize(
    ("text", "layers"),
    [("2", 2), ("[0,1]", [0, 1]), ("([0]*3+[1]*2)*2", [0, 0, 0, 1, 1] * 2), ("2*[1]", [1, 1])],
)
def test_layer_patterns_are_read(text, layers):
    assert layer_pattern(text) == layers


@pytest.mark.parametrize(
    "text", ["", "x", "[x]", "[1]*10**9", "__import__('os')", "[1]*99999999", "(" * 9999, "-1"]
)
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError, match="is neither a number nor a list"):
        layer_pattern(text)
