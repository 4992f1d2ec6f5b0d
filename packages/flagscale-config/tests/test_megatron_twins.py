"""Our verdicts are Megatron's: the same options go through its parser, its checks and its process groups."""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import sys
import types
import warnings
from pathlib import Path

import pytest
import yaml
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


HERE = Path(__file__).parent / "megatron"


@pytest.fixture(scope="module")
def megatron():
    """Import Megatron once, quietly, and pretend to a Hopper device and a current Transformer Engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core import model_parallel_config
        from megatron.core.optimizer import optimizer_config
        from megatron.core.transformer import transformer_config
        from megatron.training import argument_utils, arguments
    patch = pytest.MonkeyPatch()
    patch.setattr(arguments, "get_device_arch_version", lambda: 9)
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (arguments, transformer_config, model_parallel_config, optimizer_config):
        patch.setattr(module, "is_te_min_version", lambda *args, **kwargs: True, raising=False)
    optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
    optimizers.FusedAdam = _FusedAdam
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    patch.setitem(sys.modules, optimizers.__name__, optimizers)
    # It parses the source of 13 classes for each parser it builds.
    factory = argument_utils.ArgumentGroupFactory
    patch.setattr(factory, "_get_field_docstrings", functools.cache(factory._get_field_docstrings))
    yield arguments
    patch.undo()


class _FusedAdam:
    def __init__(self, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad):
        """Take what Megatron looks for."""


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


# A TypeError is how it refuses `spec` left out.
REFUSALS = (AssertionError, ValueError, RuntimeError, NotImplementedError, TypeError, SystemExit)


def refusal_of_megatron(arguments, options, world_size, fired=None):
    """Return why Megatron refuses the options on so many processes, None when it does not.

    The assertion that fired is added to `fired`.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    # Torch's FSDP refuses the value that tensor parallelism asks for.
    is_fsdp = options.get("use_torch_fsdp2") or options.get("use_megatron_fsdp")
    patch = pytest.MonkeyPatch()
    patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8" if is_fsdp else "1")
    patch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    patch.setattr(sys, "excepthook", sys.excepthook)  # torch wraps it anew each time
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            args = parsed(arguments, render_megatron(options), world_size)
            arguments.validate_args(args)
            config = arguments.core_transformer_config_from_args(args)
            _check_layers(config)
            _build(args, config)
            if world_size > 1 or changes_groups(options):
                _start(args, world_size)
        except REFUSALS as error:
            if fired is not None:
                fired |= _places_of(error)
            return str(error) or type(error).__name__
        finally:
            patch.undo()
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
    return None


def changes_groups(options):
    """Whether anything but the one process alone says what the process groups are."""
    return any(name.endswith("parallel_size") or "sharp" in name or "instances" in name for name in options)


def _places_of(error):
    """Return the lines of Megatron through which an error went."""
    places, trace = set(), error.__traceback__
    while trace is not None:
        places.add((Path(trace.tb_frame.f_code.co_filename).name, trace.tb_lineno))
        trace = trace.tb_next
    return places


def _build(args, config):
    """Make what the trainer makes of its arguments before the first step, on no device."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.utils import divide

    def fields(kind):
        return {
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(kind)
            if hasattr(args, field.name)
        }

    _build_num_microbatches_calculator(
        0,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
        args.step_batch_size_schedule,
    )
    OptimizerConfig(**fields(OptimizerConfig))
    if not args.use_torch_fsdp2:
        DistributedDataParallelConfig(**fields(DistributedDataParallelConfig))
    divide(args.ffn_hidden_size, args.tensor_model_parallel_size)
    divide(args.padded_vocab_size or 0, args.tensor_model_parallel_size)
    divide(args.num_attention_heads, args.num_query_groups if args.group_query_attention else 1)
    if config.num_moe_experts:
        divide(config.moe_ffn_hidden_size, config.expert_tensor_parallel_size)
        divide(config.moe_shared_expert_intermediate_size or 0, config.tensor_model_parallel_size)
        _check_expert_layers(config)
        if config.moe_router_load_balancing_type in ("sinkhorn", ["sinkhorn"]):
            router = types.SimpleNamespace(config=config, topk=config.moe_router_topk, training=False)
            TopKRouter.sinkhorn_load_balancing(router, torch.zeros(2, config.num_moe_experts))
        topk_routing_with_score_function(
            torch.zeros(2, config.num_moe_experts),
            config.moe_router_topk,
            config.moe_router_pre_softmax,
            config.moe_router_num_groups,
            config.moe_router_group_topk,
            score_function=config.moe_router_score_function,
        )


def _check_expert_layers(config):
    """Let the model's builder read which layers have experts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs

    get_gpt_decoder_layer_specs(dataclasses.replace(config, qk_layernorm=False), use_transformer_engine=False)


def _start(args, world_size):
    """Form the process groups, of which this process is the only one that exists."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        use_sharp=args.use_sharp,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        sharp_enabled_group=args.sharp_enabled_group,
        gtp_remat_size=args.gtp_weight_remat_size,
        expert_gtp_remat_size=args.expert_gtp_weight_remat_size,
        create_gloo_process_groups=False,
    )


def _check_layers(config):
    """Count the layers Megatron would build in each stage; some splits it builds wrongly, silently."""
    if config.pipeline_model_parallel_layout is not None or config.is_hybrid_model:
        return
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
ETP = "expert_tensor_parallel_size"
FIRST = "decoder_first_pipeline_num_layers"
LAST = "decoder_last_pipeline_num_layers"
PER_CHUNK = "num_layers_per_virtual_pipeline_stage"
CHUNKS = "num_virtual_stages_per_pipeline_rank"

SHORT = {"tp": TP, "pp": PP, "cp": CP, "ep": EP, "etp": ETP}
CASES = [
    ({SHORT.get(key, key): value for key, value in changes.items()}, processes)
    for changes, processes in yaml.safe_load((HERE / "cases.yaml").read_text())
]
FIRED = set()


def test_there_are_enough_cases():
    assert len(CASES) >= 300


@pytest.mark.parametrize(("changes", "world_size"), CASES, ids=lambda item: str(item)[:70])
def test_the_verdict_is_megatrons(changes, world_size, megatron, refusal_of_ours):
    options = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    theirs = refusal_of_megatron(megatron, options, world_size, FIRED)
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
    if data.draw(st.booleans()):
        changes |= {"num_experts": data.draw(st.sampled_from([2, 3, 4, 8])), "disable_bias_linear": True}
        changes |= {EP: data.draw(SIZES), ETP: data.draw(SIZES), "moe_ffn_hidden_size": 48}
    # On fewer stages than are given by hand Megatron counts backwards, and now and then the sum is right.
    assume(pp >= (FIRST in changes) + (LAST in changes))
    options = {**BASE, **changes}
    theirs = refusal_of_megatron(megatron, options, world_size)
    ours = refusal_of_ours(options, world_size)
    assert (ours is None) == (theirs is None), f"Megatron: {theirs}\nours: {ours}"


PATTERNS = ("moe_layer_freq", "linear_attention_freq", "no_rope_freq")


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
    if option.type == "tuple":
        return ["(128, 0)", (128, 0)]
    if option.name in PATTERNS:
        return ["[1, 0, 1]", [1, 0, 1], "([0] * 1 + [1] * 2)", 2]
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
    real = [option for option in table.options.values() if not option.is_added]
    ours = {flag for option in real for flag in option.flags}
    ours |= {option.negative for option in real if option.negative}
    assert ours == flags


def test_every_option_reads_back_as_it_was_given(megatron):
    parser = own_parser(megatron)
    count = 0
    for option in option_table("megatron").options.values():
        if (
            option.is_added
            or option.name == "cuda_graph_modules"
            or option.name.startswith("cuda_graph_scope")
        ):
            continue  # their parser turns words into enumeration members
        for value in _example(option):
            words = render_megatron({option.name: value})
            back = getattr(parser.parse_args(words), option.attribute)
            wanted = not value if option.kind == "false" else value
            if option.name in PATTERNS:
                wanted = eval(value) if isinstance(value, str) else value
            elif option.type == "expr" or isinstance(back, tuple):
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
    plain = [
        o
        for o in option_table("megatron").options.values()
        if not o.is_added and o.type not in {"expr", "bool", "tuple"}
    ]
    chosen = data.draw(st.lists(st.sampled_from(plain), max_size=20, unique_by=lambda o: o.attribute))
    options = {option.name: data.draw(st.sampled_from(_example(option))) for option in chosen}
    args = parser.parse_args(render_megatron(options))
    for option in chosen:
        back = getattr(args, option.attribute)
        value = options[option.name]
        wanted = not value if option.kind == "false" else value
        assert (tuple(back) if isinstance(back, list) else back) == wanted
