"""Our verdicts are Megatron's: the same options go through its parser, its checks and its process groups."""

import argparse
import contextlib
import io
import itertools
import json
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flagscale_config import load, option_table, render_megatron
from flagscale_config.errors import ConfigError

pytestmark = pytest.mark.megatron

BASE = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "train_iters": 10,
    "lr": 1e-3,
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 100,
    "transformer_impl": "local",
    "no_rope_fusion": True,
    "no_persist_layer_norm": True,
    "no_gradient_accumulation_fusion": True,
}


@pytest.fixture(scope="module")
def megatron():
    """Import Megatron once, quietly, and pretend to a Hopper device where it asks for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.training import arguments
    patch = pytest.MonkeyPatch()
    patch.setattr(arguments, "get_device_arch_version", lambda: 9)
    patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    yield arguments
    patch.undo()


def own_parser(arguments):
    """Return Megatron's parser; building it warns about Python 3.14."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments.add_megatron_arguments(parser)
    return parser


def parsed(arguments, words, world_size=1):
    """Return what Megatron's own parser makes of a command line."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["train", *words])
    patch.setenv("WORLD_SIZE", str(world_size))
    patch.setenv("RANK", "0")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return arguments.parse_args()
    finally:
        patch.undo()


def refusal_of_megatron(arguments, options, world_size):
    """Return why Megatron refuses the options on so many processes, None when it does not."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.core.utils import divide
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            args = parsed(arguments, render_megatron(options), world_size)
            arguments.validate_args(args)
            _check_layers(arguments.core_transformer_config_from_args(args))
            size = args.micro_batch_size
            ConstantNumMicroBatchesCalculator(args.global_batch_size, size, args.data_parallel_size, False, 0)
            divide(args.ffn_hidden_size, args.tensor_model_parallel_size)
            divide(args.num_attention_heads, args.num_query_groups if args.group_query_attention else 1)
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
            parallel_state.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
            )
        except (AssertionError, ValueError, RuntimeError, SystemExit) as error:
            return str(error) or type(error).__name__
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
    return None


def _check_layers(config):
    """Count the layers Megatron would build in each stage; some splits it builds wrongly, silently."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    chunks = config.virtual_pipeline_model_parallel_size
    stages = itertools.product(range(config.pipeline_model_parallel_size), range(chunks or 1))
    built = [get_num_layers_to_build(config, chunk if chunks else None, stage) for stage, chunk in stages]
    if sum(max(0, number) for number in built) != config.num_layers:
        raise ValueError(f"{config.num_layers} layers become {built}")


@pytest.fixture
def refusal_of_ours(tmp_path, monkeypatch):
    """Return a function that says why we refuse the options, None when we do not."""
    monkeypatch.chdir(tmp_path)

    def refusal(options, world_size):
        experiment = {"exp_name": "a", "task": {"type": "train", "backend": "megatron"}}
        experiment["runner"] = {"nnodes": 1, "nproc_per_node": world_size}
        Path("e.yaml").write_text(json.dumps({"experiment": experiment, "train": {"model": options}}))
        try:
            load("e.yaml")
        except ConfigError as error:
            return str(error)
        return None

    return refusal


PP = "pipeline_model_parallel_size"
TP = "tensor_model_parallel_size"
CP = "context_parallel_size"
EP = "expert_model_parallel_size"
FIRST = "decoder_first_pipeline_num_layers"
LAST = "decoder_last_pipeline_num_layers"
PER_CHUNK = "num_layers_per_virtual_pipeline_stage"
CHUNKS = "num_virtual_stages_per_pipeline_rank"
GQA = {"group_query_attention": True}

# (options, processes): the verdict is Megatron's, ours must agree.
CASES = [
    ({}, 1),
    ({TP: 2}, 2),
    ({TP: 2}, 3),
    ({TP: 3}, 3),
    ({TP: 8}, 8),
    ({PP: 2}, 2),
    ({PP: 3}, 3),
    ({PP: 8}, 8),
    ({CP: 2}, 2),
    ({CP: 2, "seq_length": 126}, 2),
    ({CP: 4, "seq_length": 124}, 4),
    ({"hidden_size": 66}, 1),
    ({"hidden_size": 66, "kv_channels": 16}, 1),
    ({**GQA, "num_query_groups": 2}, 1),
    ({**GQA, "num_query_groups": 3}, 1),
    ({**GQA, "num_query_groups": 1, TP: 2}, 2),
    ({**GQA, "num_query_groups": 2, TP: 4}, 4),
    ({**GQA, "num_query_groups": 3, "num_attention_heads": 12, "hidden_size": 96, TP: 2}, 2),
    ({**GQA, "num_query_groups": 6, "num_attention_heads": 12, "hidden_size": 96, TP: 4}, 4),
    ({"num_query_groups": 3}, 1),
    ({"ffn_hidden_size": 101, TP: 2}, 2),
    ({"ffn_hidden_size": 102, TP: 2}, 2),
    ({"seq_length": 256}, 1),
    ({"seq_length": 64}, 1),
    ({"global_batch_size": 7}, 2),
    ({"global_batch_size": 6, "micro_batch_size": 3}, 2),
    ({"global_batch_size": 8, "micro_batch_size": 3}, 2),
    ({"global_batch_size": None}, 2),
    ({"eval_global_batch_size": 3}, 2),
    ({"eval_global_batch_size": 4}, 2),
    ({"eval_micro_batch_size": 3}, 1),
    ({EP: 2}, 2),
    ({EP: 2, "num_experts": 4}, 2),
    ({EP: 2, "num_experts": 5}, 2),
    ({EP: 4, "num_experts": 8, TP: 2, "sequence_parallel": True}, 4),
    ({EP: 2, "num_experts": 8, TP: 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}, 4),
    ({FIRST: 3, PP: 2}, 2),
    ({FIRST: 3, PP: 3}, 3),
    ({FIRST: 2, LAST: 2, PP: 3}, 3),
    ({FIRST: 2, LAST: 2, PP: 2}, 2),
    ({FIRST: 4, LAST: 4, PP: 2}, 2),
    ({FIRST: 0, PP: 2}, 2),
    ({FIRST: 9, PP: 2}, 2),
    ({FIRST: 2, PP: 2, PER_CHUNK: 1}, 2),
    ({FIRST: 2, PP: 4, CHUNKS: 2}, 4),
    ({FIRST: 3, PP: 2, CHUNKS: 2}, 2),
    ({FIRST: 2, LAST: 3, PP: 3, CHUNKS: 2}, 3),
    ({PER_CHUNK: 1, PP: 2}, 2),
    ({PER_CHUNK: 2, PP: 2}, 2),
    ({PER_CHUNK: 3, PP: 2}, 2),
    ({PER_CHUNK: 4, PP: 2}, 2),
    ({PER_CHUNK: 1}, 1),
    ({PER_CHUNK: 8}, 1),
    ({CHUNKS: 2, PP: 2}, 2),
    ({CHUNKS: 3, PP: 2}, 2),
    ({CHUNKS: 1, PP: 2}, 2),
    ({CHUNKS: 2, PER_CHUNK: 2, PP: 2}, 2),
    ({CHUNKS: 2, PP: 2, "no_overlap_p2p_communication": True}, 2),
    ({CHUNKS: 2, PP: 4, "no_overlap_p2p_communication": True}, 4),
    ({"account_for_embedding_in_pipeline_split": True, FIRST: 2, PP: 2}, 2),
    ({"account_for_embedding_in_pipeline_split": True, PP: 3}, 3),
    ({"account_for_embedding_in_pipeline_split": True, PP: 2}, 2),
    ({"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True, PP: 2}, 2),
    ({"train_samples": 100}, 1),
    ({"train_iters": None, "train_samples": 100}, 1),
    ({"train_iters": None, "train_samples": 100, "lr_warmup_iters": 2}, 1),
    ({"train_iters": None, "train_samples": 100, "lr_decay_samples": 50}, 1),
    ({"train_iters": None, "train_samples": 100, "lr_decay_iters": 50}, 1),
    ({"lr_decay_samples": 50}, 1),
    ({"lr_warmup_samples": 5}, 1),
    ({"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}, 1),
    ({"lr_warmup_fraction": 0.1}, 1),
    ({"min_lr": 1.0}, 1),
    ({"min_lr": 1e-3}, 1),
    ({"weight_decay_incr_style": "cosine"}, 1),
    ({"weight_decay_incr_style": "cosine", "start_weight_decay": 0.0, "end_weight_decay": 0.1}, 1),
    ({"start_weight_decay": 0.1}, 1),
    ({"save": "/s"}, 1),
    ({"save": "/s", "save_interval": 10}, 1),
    ({"save": "/s", "save_interval": 10, "save_retain_interval": 25}, 1),
    ({"save": "/s", "save_interval": 10, "save_retain_interval": 20}, 1),
    ({"ckpt_format": "torch_dcp"}, 1),
    ({"ckpt_format": "fsdp_dtensor"}, 1),
    ({"ckpt_format": "torch"}, 1),
    ({"fp16": True, "bf16": True}, 1),
    ({"bf16": True}, 1),
    ({"fp32_residual_connection": True}, 1),
    ({"fp32_residual_connection": True, "bf16": True}, 1),
    ({"recompute_granularity": "full"}, 1),
    ({"recompute_granularity": "full", "recompute_method": "uniform"}, 1),
    ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 1),
    ({"recompute_granularity": "selective"}, 1),
    ({"recompute_granularity": "selective", "recompute_method": "uniform"}, 1),
    ({"recompute_granularity": "selective", "recompute_num_layers": 1}, 1),
    (
        {
            "distribute_saved_activations": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        1,
    ),
    ({"data_path": ["x"]}, 1),
    ({"data_path": ["x"], "mock_data": False}, 1),
    ({"data_path": ["x"], "train_data_path": ["y"], "mock_data": False}, 1),
    ({"overlap_param_gather": True}, 1),
    ({"overlap_param_gather": True, "use_distributed_optimizer": True}, 1),
    ({"overlap_param_gather": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True}, 1),
    ({"overlap_param_gather": True, "overlap_grad_reduce": True}, 1),
    ({"tp_comm_overlap": True}, 1),
    ({"tp_comm_overlap": True, TP: 2}, 2),
    ({"sequence_parallel": True}, 1),
    ({"sequence_parallel": True, TP: 2}, 2),
    ({"position_embedding_type": "mrope"}, 1),
    ({"position_embedding_type": "mrope", "mrope_section": [4, 2, 2]}, 1),
    ({"num_layers": None}, 1),
    ({"hidden_size": None}, 1),
    ({"num_attention_heads": None}, 1),
    ({"max_position_embeddings": None}, 1),
    ({"seq_length": None}, 1),
    ({"micro_batch_size": None}, 1),
    ({"micro_batch_size": 0}, 1),
    ({"global_batch_size": 0}, 1),
]


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("changes", "world_size"), CASES, ids=lambda item: str(item)[:70])
def test_the_verdict_is_megatrons(changes, world_size, megatron, refusal_of_ours):
    options = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    theirs = refusal_of_megatron(megatron, options, world_size)
    ours = refusal_of_ours(options, world_size)
    assert (ours is None) == (theirs is None), f"Megatron: {theirs}\nours: {ours}"


def test_both_verdicts_occur(megatron, refusal_of_ours):
    refused = [changes for changes, size in CASES if refusal_of_ours({**BASE, **_given(changes)}, size)]
    assert len(CASES) * 0.3 < len(refused) < len(CASES) * 0.8


def _given(changes):
    return {key: value for key, value in changes.items() if value is not None}


SIZES = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layout_has_megatrons_verdict(data, megatron, refusal_of_ours):
    tp, pp, cp = (data.draw(SIZES) for _ in range(3))
    more, layers = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 12))
    heads = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    world_size = tp * pp * cp * more + data.draw(st.sampled_from([0, 0, 0, 1]))
    changes = {
        TP: tp,
        PP: pp,
        CP: cp,
        "num_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": heads * 16,
        "group_query_attention": True,
        "num_query_groups": data.draw(st.sampled_from([1, 2, 3, 4, heads])),
        "micro_batch_size": data.draw(st.integers(1, 3)),
        "global_batch_size": data.draw(st.sampled_from([4, 6, 8, 12, 24])),
        "seq_length": data.draw(st.sampled_from([64, 96, 120, 128])),
    }
    for name in (FIRST, LAST, PER_CHUNK, CHUNKS):
        value = data.draw(st.sampled_from([None, None, None, 1, 2, 3]))
        if value is not None:
            changes[name] = value
    # On fewer stages than are given by hand Megatron counts backwards, and now and then the sum is right.
    assume(pp >= (FIRST in changes) + (LAST in changes))
    options = {**BASE, **changes}
    theirs = refusal_of_megatron(megatron, options, world_size)
    ours = refusal_of_ours(options, world_size)
    assert (ours is None) == (theirs is None), f"Megatron: {theirs}\nours: {ours}"


def _example(option):
    """Return a value an option would take."""
    if option.is_switch:
        return [True, False] if option.kind == "pair" else [True]
    one = {
        "int": [0, 7, -1],
        "float": [1e-5, 0.1 + 0.2, 3.0, -1.5],
        "str": ["a b", "x=y", "-x"],
        "bool": ["x"],
    }
    if option.name == "window_size":
        return ["(128, 0)"]
    values = list(option.choices) or one.get(option.type, ["1"])
    if option.kind == "list":
        count = option.nargs if isinstance(option.nargs, int) else 2
        return [tuple(itertools.islice(itertools.cycle(v for v in values if v != "-x"), count))]
    return values


def test_the_table_is_megatrons_parser(megatron):
    """The shipped table was made from the installed version, and nothing of it is missing."""
    parser = own_parser(megatron)
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    table = option_table("megatron")
    ours = {flag for option in table.options.values() for flag in option.flags}
    ours |= {option.negative for option in table.options.values() if option.negative}
    assert ours == flags


def test_every_option_reads_back_as_it_was_given(megatron):
    parser = own_parser(megatron)
    count = 0
    for option in option_table("megatron").options.values():
        if option.name == "cuda_graph_modules" or option.name.startswith("cuda_graph_scope"):
            continue  # their parser turns words into enumeration members
        for value in _example(option):
            words = render_megatron({option.name: value})
            back = getattr(parser.parse_args(words), option.attribute)
            wanted = not value if option.kind == "false" else value
            if option.type == "expr" or isinstance(back, tuple):
                back, wanted = str(getattr(back, "name", back)), str(getattr(wanted, "name", wanted))
            elif isinstance(back, list):
                back = tuple(back)
            elif option.type == "bool":
                back, wanted = str(back), str(bool(wanted))
            assert back == wanted, (option.name, words)
            count += 1
    assert count > 1000


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_options_together_read_back(data, megatron):
    parser = own_parser(megatron)
    plain = [o for o in option_table("megatron").options.values() if o.type not in {"expr", "bool"}]
    chosen = data.draw(st.lists(st.sampled_from(plain), max_size=20, unique_by=lambda o: o.attribute))
    options = {option.name: data.draw(st.sampled_from(_example(option))) for option in chosen}
    args = parser.parse_args(render_megatron(options))
    for option in chosen:
        back = getattr(args, option.attribute)
        value = options[option.name]
        wanted = not value if option.kind == "false" else value
        assert (tuple(back) if isinstance(back, list) else back) == wanted
