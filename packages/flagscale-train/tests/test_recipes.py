"""Every recipe is the published model, renders for Megatron, and fits the cards that it names."""

import functools
import re
import warnings
from importlib.resources import files
from pathlib import Path

import pytest

from flagscale_config import load, models, render_megatron
from flagscale_hw.testing import fake_host
from flagscale_train.errors import InvalidInput
from flagscale_train.plan import plan

FOLDER = Path(str(files("flagscale_train.recipes")))
NAMES = sorted(f"{path.parent.parent.name}/{path.stem}" for path in FOLDER.glob("*/conf/*.yaml"))
RECIPES = [name for name in NAMES if name != "qwen3/tiny"]
# Parameters of the publisher's class; of the language model where it also sees.
PARAMETERS = {
    "aquila/34b": ("aquila2-34b", 33_693_554_688),
    "aquila/70b": ("aquila2-70b", 70_090_891_264),
    "aquila/7b": ("aquila2-7b", 7_295_537_152),
    "deepseek_v3/16b_a3b": ("moonlight-16b-a3b", 15_960_108_544),
    "deepseek_v3/671b": ("deepseek-v3-671b", 671_026_404_352 + 11_610_067_968),
    "llama2/13b": ("llama2-13b", 13_015_864_320),
    "llama2/70b": ("llama2-70b", 68_976_648_192),
    "llama2/7b": ("llama2-7b", 6_738_415_616),
    "llama3/70b": ("llama3-70b", 70_553_706_496),
    "llama3/8b": ("llama3-8b", 8_030_261_248),
    "llama3_1/405b": ("llama3.1-405b", 405_853_388_800),
    "llama3_1/70b": ("llama3.1-70b", 70_553_706_496),
    "llama3_1/8b": ("llama3.1-8b", 8_030_261_248),
    "llava1_5/13b": ("llava1.5-13b", 13_016_519_680),
    "llava1_5/7b": ("llava1.5-7b", 6_738_939_904),
    "llava_onevision/0_5b": ("llava-onevision-0.5b", 494_090_112),
    "llava_onevision/72b": ("llava-onevision-72b", 72_707_252_224),
    "llava_onevision/7b": ("llava-onevision-7b", 7_615_157_760),
    "mixtral/8x22b": ("mixtral-8x22b", 140_630_071_296),
    "mixtral/8x7b": ("mixtral-8x7b", 46_702_792_704),
    "qwen2_5/0_5b": ("qwen2.5-0.5b", 494_032_768),
    "qwen2_5/14b": ("qwen2.5-14b", 14_770_033_664),
    "qwen2_5/1_5b": ("qwen2.5-1.5b", 1_543_714_304),
    "qwen2_5/32b": ("qwen2.5-32b", 32_763_876_352),
    "qwen2_5/3b": ("qwen2.5-3b", 3_085_938_688),
    "qwen2_5/72b": ("qwen2.5-72b", 72_706_203_648),
    "qwen2_5/7b": ("qwen2.5-7b", 7_615_616_512),
    "qwen2_5_vl/32b": ("qwen2.5-vl-32b", 32_763_876_352),
    "qwen2_5_vl/3b": ("qwen2.5-vl-3b", 3_085_938_688),
    "qwen2_5_vl/72b": ("qwen2.5-vl-72b", 72_706_203_648),
    "qwen2_5_vl/7b": ("qwen2.5-vl-7b", 7_615_616_512),
    "qwen3/0_6b": ("qwen3-0.6b", 596_049_920),
    "qwen3/0_6b_lora": ("qwen3-0.6b", 596_049_920),
    "qwen3/0_6b_sft": ("qwen3-0.6b", 596_049_920),
    "qwen3/14b": ("qwen3-14b", 14_768_307_200),
    "qwen3/1_7b": ("qwen3-1.7b", 1_720_574_976),
    "qwen3/235b_a22b": ("qwen3-235b-a22b", 235_093_634_560),
    "qwen3/30b_a3b": ("qwen3-30b-a3b", 30_532_122_624),
    "qwen3/32b": ("qwen3-32b", 32_762_123_264),
    "qwen3/4b": ("qwen3-4b", 4_022_468_096),
    "qwen3/8b": ("qwen3-8b", 8_190_735_360),
    "qwq/32b": ("qwq-32b", 32_763_876_352),
    "rwkv/0_1b": ("rwkv7-0.1b", 191_034_624),
    "rwkv/0_4b": ("rwkv7-0.4b", 450_767_872),
    "rwkv/1_5b": ("rwkv7-1.5b", 1_527_404_544),
    "rwkv/2_9b": ("rwkv7-2.9b", 2_947_735_040),
    "rwkv/7b": ("rwkv7-7.2b", 7_199_141_888),
}
SCRIPTED = ("llava", "qwen2_5_vl", "rwkv")
"""Families that FlagScale's own scripts train: the recipes hold their numbers, the runner refuses them."""
GIB = 1 << 30
CARD_GIB = 79.1
"""What a card of 80 GB has for programs."""
RESERVE_GIB = 4
"""For the runtime, communication and the gaps of the allocator."""


@functools.cache
def recipe(name):
    family, stem = name.split("/")
    given = ["train.data.data_path=/data/text", "train.data.tokenizer.tokenizer_model=/tokenizer"]
    if name.endswith(("_sft", "_lora")):
        given.append("train.system.checkpoint.pretrained_checkpoint=/weights")
    return load(FOLDER / family / "conf" / f"{stem}.yaml", given)


def test_every_recipe_has_an_oracle():
    assert sorted(PARAMETERS) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_published_model(name):
    model, parameters = PARAMETERS[name]
    found = models.match(recipe(name))
    assert found.is_equal, str(found)
    assert model in found.models
    assert found.num_parameters == parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_renders(name):
    train = recipe(name).train
    words = render_megatron(train.options)
    assert words[words.index("--num-layers") + 1] == str(train.options["num_layers"])
    assert {"--bf16", "--use-distributed-optimizer"} <= {*words, *(("--bf16",) if "tiny" in name else ())}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_no_mistake_and_nothing_without_effect(name):
    problems = recipe(name).problems()
    assert [str(each) for each in problems if "entrypoint" not in str(each)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_plans_on_one_host_or_says_why_not(name):
    experiment = recipe(name)
    if experiment.runner.nnodes not in (None, 1):
        return  # the hosts are the user's
    host = fake_host("nvidia", 8)
    if name.startswith(SCRIPTED):
        assert experiment.train.script is not None
        with pytest.raises(InvalidInput, match="flagscale-train trains GPT models, this script"):
            plan(experiment, host, python="python")
    else:
        assert experiment.train.script is None
        assert len(plan(experiment, host, python="python").processes) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_cards(name):
    family, stem = name.split("/")
    text = (FOLDER / family / "conf" / f"{stem}.yaml").read_text(encoding="utf-8")
    nodes, cards = re.search(r"(?:(\d+) x )?(\d+) GPUs of 80 GB|one 80 GB GPU()", text).group(1, 2)
    world = int(nodes or 1) * int(cards or 1)
    experiment = recipe(name)
    if experiment.runner.world_size is not None:
        assert experiment.runner.world_size == world
    assert needed_gib(experiment, world) + RESERVE_GIB < CARD_GIB


def needed_gib(experiment, world):
    """Estimate the memory of the fullest process: weights, gradients, optimizer, activations."""
    options = experiment.train.options
    parallel = experiment.train.parallelism
    stages = parallel.pipeline_model_parallel_size
    facts = models.facts_of(experiment)
    sizes = stage_sizes(options, facts.num_layers, stages)
    return max(
        (states(facts, parallel, layers, stage, world) + activations(facts, options, parallel, layers, stage))
        / GIB
        for stage, layers in enumerate(sizes)
    )


def stage_sizes(options, layers, stages):
    """Return the layers of each pipeline stage."""
    first = options.get("decoder_first_pipeline_num_layers") or 0
    last = options.get("decoder_last_pipeline_num_layers") or 0
    middle = stages - bool(first) - bool(last)
    sizes = [(layers - first - last) // middle] * middle if middle else []
    sizes = [first] * bool(first) + sizes + [last] * bool(last)
    assert sum(sizes) == layers
    return sizes


def states(facts, parallel, layers, stage, world):
    """Bytes of 16-bit weights, 32-bit gradients and the process's part of 32-bit weights and two moments."""
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    etp = parallel.expert_tensor_parallel_size or tp
    stages = parallel.pipeline_model_parallel_size
    is_last = stage == stages - 1
    count = layers + facts.num_mtp_layers * is_last
    routed = 0
    dense = facts.num_language_parameters - facts.num_embedding_parameters
    if facts.experts is not None:
        each = (
            (3 if facts.is_gated else 2)
            * facts.hidden_size
            * facts.experts.ffn_size
            * facts.experts.num_experts
        )
        num_moe = facts.num_layers - len(facts.experts.dense_layers)
        dense -= each * num_moe
        routed = each * min(count, num_moe) / (ep * etp)
    mine = dense / facts.num_layers * count / tp
    ends = (stage == 0) + is_last * (stages > 1 or not facts.is_tied)
    mine += ends * facts.vocab_size * facts.hidden_size / tp
    data = world // (tp * stages)
    expert_data = world // (etp * ep * stages)
    return mine * (6 + 12 / data) + routed * (6 + 12 / expert_data)


def activations(facts, options, parallel, layers, stage):
    """Bytes kept for the backward pass: flash attention, no dropout (arXiv 2205.05198, adapted)."""
    tokens = options["seq_length"] * options["micro_batch_size"] / parallel.context_parallel_size
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    per_layer = layer_bytes(facts)
    waiting = min(stages - stage, stages)
    if options.get("recompute_granularity") == "full":
        kept = 2 * facts.hidden_size * layers * waiting + per_layer
    else:
        kept = per_layer * layers * waiting
    logits = 6 * facts.vocab_size * (1 + facts.num_mtp_layers) if stage == stages - 1 else 0
    return (kept + logits) * tokens / tp


def layer_bytes(facts):
    """Bytes per token of one layer: inputs of the norms, attention, feed-forward layer or experts."""
    hidden, attention = facts.hidden_size, facts.attention
    if isinstance(attention, models.LatentAttention):
        core = 2 * ((attention.q_rank or 0) + attention.kv_rank + attention.rope_dim)
        heads = attention.num_heads
        core += 2 * heads * (2 * (attention.nope_dim + attention.rope_dim) + 2 * attention.v_dim) + 4 * heads
    elif isinstance(attention, models.Rwkv7):
        core = 2 * 12 * hidden
    else:
        core = 2 * (2 * attention.query_width + 2 * attention.kv_width) + 4 * attention.num_heads
    experts = facts.experts
    if experts is None:
        return 8 * hidden + core + 6 * facts.ffn_size
    # Twice the tokens of each expert going out and coming back; a fifth more where routing is not even.
    routed = experts.experts_per_token * 1.2 * (6 * hidden + 6 * experts.ffn_size)
    return 8 * hidden + core + routed + 6 * experts.shared_size + 4 * experts.num_experts


@pytest.fixture(scope="module")
def arguments():
    """Import Megatron's arguments once, and pretend to a Hopper device and a current Transformer Engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from megatron.core import model_parallel_config
        from megatron.core.optimizer import optimizer_config
        from megatron.core.transformer import transformer_config
        from megatron.training import arguments
    patch = pytest.MonkeyPatch()
    patch.setattr(arguments, "get_device_arch_version", lambda: 9)
    patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (arguments, transformer_config, model_parallel_config, optimizer_config):
        patch.setattr(module, "is_te_min_version", lambda *_args, **_kwargs: True, raising=False)
    patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    patch.setenv("RANK", "0")
    yield arguments
    patch.undo()


@pytest.mark.megatron
@pytest.mark.parametrize("name", NAMES)
def test_megatron_accepts_a_recipe(name, arguments, monkeypatch, capsys):
    experiment = recipe(name)
    from flagscale_train.worker import lora

    train, world = experiment.train, experiment.runner.world_size or 8
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr("sys.argv", ["train", *render_megatron(train.options)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = arguments.validate_args(arguments.parse_args(lora.add_arguments))
        args.apply_rope_fusion = False  # needs Transformer Engine itself
        config = arguments.core_transformer_config_from_args(args)
    assert config.num_layers == train.options["num_layers"]
    assert args.world_size == world
    assert args.data_parallel_size == world // train.parallelism.model_size
