"""Models in numbers: counts equal those of published checkpoints and of the engines' classes, exactly."""

import argparse
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flagscale_config import ConfigError, models
from flagscale_config.models import ModelFacts, cli, published

# Parameters, and those a token meets where they are fewer: the tensors of the publisher's model classes
# (transformers, flash-linear-attention), counted on the meta device.
COUNTS = {
    "qwen2.5-0.5b": (494_032_768, None),
    "qwen2.5-1.5b": (1_543_714_304, None),
    "qwen2.5-3b": (3_085_938_688, None),
    "qwen2.5-7b": (7_615_616_512, None),
    "qwen2.5-14b": (14_770_033_664, None),
    "qwen2.5-32b": (32_763_876_352, None),
    "qwen2.5-72b": (72_706_203_648, None),
    "qwq-32b": (32_763_876_352, None),
    "qwen3-0.6b": (596_049_920, None),
    "qwen3-1.7b": (1_720_574_976, None),
    "qwen3-4b": (4_022_468_096, None),
    "qwen3-8b": (8_190_735_360, None),
    "qwen3-14b": (14_768_307_200, None),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-32b": (32_762_123_264, None),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),
    "qwen3-next-80b-a3b": (79_674_391_296, None),
    "qwen2.5-vl-3b": (3_754_622_976, None),
    "qwen2.5-vl-7b": (8_292_166_656, None),
    "qwen2.5-vl-32b": (33_452_718_336, None),
    "qwen2.5-vl-72b": (73_410_777_344, None),
    "qwen3-vl-4b": (4_437_815_808, None),
    "qwen3-vl-8b": (8_767_123_696, None),
    "qwen3-vl-32b": (33_357_390_064, None),
    "qwen3-omni-30b-a3b": (31_719_205_488, None),
    "llama2-7b": (6_738_415_616, None),
    "llama2-13b": (13_015_864_320, None),
    "llama2-70b": (68_976_648_192, None),
    "llama3-8b": (8_030_261_248, None),
    "llama3-70b": (70_553_706_496, None),
    "llama3.1-8b": (8_030_261_248, None),
    "llama3.1-70b": (70_553_706_496, None),
    "llama3.1-405b": (405_853_388_800, None),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (140_630_071_296, 39_161_468_928),
    "moonlight-16b-a3b": (15_960_108_544, 2_914_774_528),
    "deepseek-v3-671b": (671_026_404_352, 37_552_282_624),
    "deepseek-r1-671b": (671_026_404_352, 37_552_282_624),
    "kimi-k2-1t": (1_026_408_209_408, 32_861_477_888),
    "grok2-270b": (269_515_497_472, 114_896_674_816),
    "ernie4.5-300b-a47b": (299_484_160_000, 47_926_583_296),
    "llava1.5-7b": (7_063_427_072, None),
    "llava1.5-13b": (13_351_494_656, None),
    "llava-onevision-0.5b": (893_675_552, None),
    "llava-onevision-7b": (8_029_890_080, None),
    "llava-onevision-72b": (73_181_570_592, None),
    "aquila2-7b": (7_295_537_152, None),
    "aquila2-34b": (33_693_554_688, None),
    "aquila2-70b": (70_090_891_264, None),
    "rwkv7-0.1b": (191_034_624, None),
    "rwkv7-0.4b": (450_767_872, None),
    "rwkv7-1.5b": (1_527_404_544, None),
    "rwkv7-2.9b": (2_947_735_040, None),
    "rwkv7-7.2b": (7_199_141_888, None),
    "flagscale-qwen2.5-10b": (10_241_871_872, None),
    "flagscale-qwen3-10b": (10_262_575_104, None),
    "flagscale-deepseek-11b-a2b": (9_477_761_024, 1_951_606_784),
    "flagscale-deepseek-16b-a3b": (15_911_087_616, 2_865_753_600),
    "flagscale-llava-onevision-1.5b": (1_945_595_424, None),
    "flagscale-aquila-1.8b": (1_624_229_888, None),
    "flagscale-aquila-3b": (3_085_807_616, None),
}
MTP = {
    "deepseek-v3-671b": 11_610_067_968,
    "deepseek-r1-671b": 11_610_067_968,
    "flagscale-deepseek-16b-a3b": 593_242_624,
}
# Floating-point operations per token in NVIDIA's published throughput tables: TFLOP/s over tokens/s.
WORK = {
    ("llama3-8b", 8192): 51.47e9,
    ("llama3-70b", 8192): 449.2e9,
    ("llama3.1-405b", 8192): 2524.0e9,
    ("deepseek-v3-671b", 4096): 260.6e9,
    ("qwen3-30b-a3b", 4096): 23.08e9,
    ("qwen3-235b-a22b", 4096): 148.33e9,
    ("kimi-k2-1t", 4096): 205.5e9,
}
# Bytes of 16-bit keys and values per token.
CACHE = {
    "deepseek-v3-671b": 70_272,
    "kimi-k2-1t": 70_272,
    "qwen2.5-72b": 327_680,
    "qwen3-8b": 147_456,
    "qwen2.5-vl-32b": 262_144,
    "qwen3-omni-30b-a3b": 98_304,
    "grok2-270b": 262_144,
    "qwen3-next-80b-a3b": 24_576,
    "rwkv7-7.2b": 0,
}
# Beside the checkout; an installed copy of these tests may lie less deep than that.
SHARED = Path(*Path(__file__).parts[:-5], "shared/fixtures/models")
GPT = [name for name in COUNTS if not name.startswith(("rwkv", "grok", "qwen3-next"))]


def test_every_model_has_an_oracle():
    assert set(models.names()) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_of_the_published_classes(name):
    total, active = COUNTS[name]
    assert published(name).num_parameters == total
    if active is not None or published(name).experts is None:
        assert published(name).num_active_parameters == (active or total)
    assert published(name).num_mtp_parameters == MTP.get(name, 0) or name == "qwen3-next-80b-a3b"


@pytest.mark.parametrize(("name", "seq_len"), WORK)
def test_work_is_that_of_published_tables(name, seq_len):
    assert published(name).flops_per_token(seq_len) == pytest.approx(WORK[name, seq_len], rel=2e-4)


def test_a_forward_pass_is_a_third_of_a_step_without_further_predictions():
    facts = published("qwen3-8b")
    assert facts.flops_per_token(4096) == 3 * facts.forward_flops_per_token(4096)
    deepseek = published("deepseek-v3-671b")
    # The published table's row without multi-token prediction.
    assert 3 * deepseek.forward_flops_per_token(4096) == pytest.approx(250.5e9, rel=1e-3)


@pytest.mark.parametrize("name", CACHE)
def test_cache_sizes(name):
    assert published(name).kv_cache_bytes_per_token() == CACHE[name]
    assert published(name).kv_cache_bytes_per_token(1) == CACHE[name] / 2


def test_recurrent_state_does_not_grow():
    assert published("qwen3-8b").state_bytes_per_sequence() == 0
    # 32 layers, 64 heads of 64 x 64 values and two last inputs of width 4096, in 32 bits.
    assert published("rwkv7-7.2b").state_bytes_per_sequence() == 32 * (64 * 64 * 64 + 2 * 4096) * 4
    # 36 linear layers: 32 matrices of 128 x 128 and three columns of 8192 under the convolution.
    expected = 36 * (32 * 128 * 128 + 3 * 8192) * 2
    assert published("qwen3-next-80b-a3b").state_bytes_per_sequence(2) == expected
    assert published("rwkv7-0.1b").forward_flops_per_token(1) == published(
        "rwkv7-0.1b"
    ).forward_flops_per_token(9)


def test_every_fourth_layer_of_a_hybrid_is_ordinary_attention():
    counts = [
        replace(published("qwen3-next-80b-a3b"), num_layers=layers).num_parameters for layers in range(1, 6)
    ]
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert steps[0] == steps[1] == steps[3] != steps[2]


def test_facts_say_where_they_come_from():
    for name in models.names():
        facts = published(name)
        assert all((facts.source, facts.family, facts.architecture))
        assert (facts.hf_repo is None) == name.startswith("flagscale-")
        assert (facts.license is None) == name.startswith("flagscale-")
        assert json.loads(json.dumps(facts.to_dict()))["num_parameters"] == facts.num_parameters


def test_a_model_is_found_by_its_repository_and_a_mistyped_one_named():
    assert published("Qwen/Qwen3-0.6B").name == "qwen3-0.6b"
    with pytest.raises(ConfigError, match=r"qwen3-06b: no such model; did you mean qwen3-0\.6b"):
        published("qwen3-06b")
    with pytest.raises(ConfigError, match="lists them"):
        published("zzz")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the survey's files lie beside some checkouts only")
def test_numbers_are_those_of_the_survey():
    files = {path.stem: json.loads(path.read_text()) for path in SHARED.glob("*.json")}
    assert set(files) == set(models.names())
    for name, file in files.items():
        facts, text, counts = published(name), file["text"], file["params"]
        assert facts.hidden_size == text["hidden_size"]
        assert facts.num_layers == text["num_hidden_layers"]
        assert facts.vocab_size == text["vocab_size"]
        assert facts.norm_eps == text["norm_eps"]
        assert facts.is_tied == text["tie_word_embeddings"]
        assert facts.max_positions == text["max_position_embeddings"]
        assert facts.rope_theta == text.get("rope", {}).get("theta")
        assert facts.num_language_parameters == counts.get("language_model", facts.num_language_parameters)
        thinker = counts.get("by_part", {}).get("thinker")
        total = thinker or counts.get("formula_total") or counts["meta_device_total"]
        assert facts.num_parameters == total
        assert facts.num_active_parameters == counts.get("formula_active", facts.num_active_parameters)


# --- Megatron options -------------------------------------------------------------------------------------


def test_gpt2s_shape_counts_biases_and_positions():
    gpt2 = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "padded_vocab_size": 50257,
    }
    assert models.num_parameters(gpt2) == 124_439_808


@pytest.mark.parametrize("name", GPT)
def test_megatron_options_and_back(name):
    facts = published(name)
    options = facts.to_megatron()
    again = ModelFacts.from_megatron(options)
    assert again.num_parameters == facts.num_language_parameters
    assert models.num_parameters(options) == facts.num_language_parameters + facts.num_mtp_parameters
    assert models.kv_cache_bytes_per_token(options) == facts.kv_cache_bytes_per_token()
    assert models.flops_per_token({**options, "seq_length": 4096}) == facts.flops_per_token(4096)
    if facts.vision is None:
        assert models.num_active_parameters(options) == facts.num_active_parameters


@pytest.mark.parametrize("name", ["rwkv7-7.2b", "grok2-270b", "qwen3-next-80b-a3b"])
def test_what_gptmodel_cannot_be_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: Megatron's GPTModel cannot be this model"):
        published(name).to_megatron()


def test_a_vocabulary_is_padded_as_megatron_pads_it():
    options = published("qwen3-8b").to_megatron()
    del options["padded_vocab_size"]
    for tensor_parallel, rows in ((1, 151_936), (2, 152_064), (8, 152_576)):
        sizes = {"vocab_size": 151_936, "tensor_model_parallel_size": tensor_parallel}
        assert ModelFacts.from_megatron({**options, **sizes}).vocab_size == rows
    assert models.num_parameters(options, 151_936) == COUNTS["qwen3-8b"][0]


def test_what_is_missing_is_named():
    options = published("llama2-7b").to_megatron()
    with pytest.raises(ConfigError, match="seq_length is needed"):
        models.flops_per_token(options)
    del options["padded_vocab_size"]
    with pytest.raises(ConfigError, match="the size of the vocabulary is needed"):
        models.num_parameters(options)
    with pytest.raises(ConfigError, match="hidden_size is needed"):
        models.num_parameters({"num_layers": 1}, 10)
    with pytest.raises(ConfigError, match=r"hybrid models are not known \(hybrid_layer_pattern is set\)"):
        models.num_parameters({**options, "hybrid_layer_pattern": "M*"}, 10)


@pytest.mark.parametrize(
    ("pattern", "dense"),
    [
        (1, ()),
        ("2", (1, 3)),
        ("([0]+[1]*3)", (0,)),
        ("[1,0]*2", (1, 3)),
        ((0, 0, 1, 1), (0, 1)),
        ("2*[0, 1]", (0, 2)),
    ],
)
def test_layer_patterns(pattern, dense):
    options = {**published("mixtral-8x7b").to_megatron(), "num_layers": 4, "moe_layer_freq": pattern}
    experts = ModelFacts.from_megatron(options).experts
    assert experts.dense_layers == dense


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[0]+[1]*26", "describes 27 layers; num_layers is 4"),
        ("open('x')", "neither a number nor a list"),
        ("[1]*10**9", "neither a number nor a list"),
        ("[1]*1000000000", "neither a number nor a list"),
        ("[", "neither a number nor a list"),
        ("0", "neither a number nor a list"),
        ("-1", "neither a number nor a list"),
        ("('a',)", "neither a number nor a list"),
    ],
)
def test_bad_layer_patterns(pattern, message):
    options = {**published("mixtral-8x7b").to_megatron(), "num_layers": 4, "moe_layer_freq": pattern}
    with pytest.raises(ConfigError, match=message):
        models.num_parameters(options)


def test_flagscales_feed_forward_rule():
    # Aquila's sizes in FlagScale's examples: 7B, 34B, 70B, 1.8B, 3B.
    for arguments, width in (
        ((4096, 256), 11_008),
        ((6144, 4096, 1.3), 24_576),
        ((8192, 4096, 1.3), 28_672),
        ((2048, 128), 5_504),
        ((2048, 128, 2), 11_008),
    ):
        assert models.ffn_size_by_multiple(*arguments) == width
    options = {**published("aquila2-7b").to_megatron(), "multiple_of": 256}
    del options["ffn_hidden_size"]
    assert models.match(options).models == ("aquila2-7b",)
    # A width that is given wins.
    assert models.num_parameters({**options, "ffn_hidden_size": 128}) < models.num_parameters(options)


# --- match ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPT)
def test_every_model_is_recognised(name):
    found = models.match(published(name).to_megatron())
    assert found.is_equal
    assert name in found.models


def test_flagscales_llama2_7b_has_the_feed_forward_layer_of_70b():
    options = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 28672,
        "num_attention_heads": 32,
        "group_query_attention": False,
        "num_query_groups": 8,
        "norm_epsilon": 1e-5,
        "use_rotary_position_embeddings": True,
        "no_position_embedding": True,
        "swiglu": True,
        "multiple_of": 256,
        "normalization": "RMSNorm",
        "untie_embeddings_and_output_weights": True,
        "disable_bias_linear": True,
        "vocab_size": 32000,
    }
    found = models.match(options)
    assert found.models == ("llama2-7b",)
    assert [(each.option, each.given, each.published) for each in found.differences] == [
        ("ffn_hidden_size", 28672, 11008)
    ]
    assert "28672 (published: 11008; 28672 is llama2-70b's)" in str(found)
    assert found.num_parameters == COUNTS["llama2-7b"][0] + 32 * 3 * 4096 * (28672 - 11008)  # 13.7 billion


def test_twins_are_all_named():
    assert models.match(published("qwq-32b").to_megatron()).models == ("qwen2.5-32b", "qwq-32b")


def test_only_padding_is_no_difference_but_another_vocabulary_is():
    options = published("llama3-8b").to_megatron()
    del options["padded_vocab_size"]
    assert models.match(options).num_parameters is None
    assert models.match({**options, "vocab_size": 128_256, "tensor_model_parallel_size": 8}).is_equal
    found = models.match({**options, "vocab_size": 151_851})
    assert [difference.option for difference in found.differences] == ["padded_vocab_size"]


def test_the_nearest_model_is_of_the_right_size():
    options = published("qwen2.5-32b").to_megatron() | {"add_qkv_bias": False, "rotary_base": 10_000}
    found = models.match(options)
    assert found.models == ("qwen2.5-32b",)
    assert {each.option for each in found.differences} == {"add_qkv_bias", "rotary_base"}
    assert "with 2 differences" in str(found)


def test_an_experiment_is_matched(project):
    from flagscale_config import load

    lines = "".join(
        f"  {key}: {json.dumps(value)}\n" for key, value in published("qwen3-8b").to_megatron().items()
    )
    sizes = "  micro_batch_size: 1\n  seq_length: 8\n  max_position_embeddings: 8\n"
    project(
        {
            "conf/a.yaml": "defaults: [{train: a}]\nexperiment: {exp_name: a, task: {type: train}}\n",
            "conf/train/a.yaml": f"model:\n{lines}{sizes}",
            "conf/s.yaml": "experiment: {exp_name: s, task: {type: serve}}\nserve: [{serve_id: a}]\n",
        }
    )
    assert models.match(load("conf/a.yaml")).models == ("qwen3-8b",)
    with pytest.raises(ConfigError, match="trains nothing"):
        models.match(load("conf/s.yaml"))


UNFINISHED = {
    "conf/u.yaml": "defaults: [{train: u}]\nexperiment: {exp_name: u, exp_dir: '???', task: {type: train}}\n",
    "conf/train/u.yaml": (
        "system: {disable-bias-linear: true, no_such_option: 1, micro_batch_size: many}\n"
        "model: {num_layers: 32, hidden_size: 4096, num_attention_heads: 32, ffn_hidden_size: 28672,\n"
        "  swiglu: true, multiple_of: 256, normalization: RMSNorm, norm_epsilon: 1e-5,\n"
        "  untie_embeddings_and_output_weights: true, position_embedding_type: rope}\n"
        "data: {data_path: '???', tokenizer: {vocab_size: 32000}}\n"
    ),
    "conf/r.yaml": (
        "defaults: [{train: r}]\n"
        "experiment: {exp_name: r, task: {type: train, entrypoint: flagscale/train/train_rwkv.py}}\n"
    ),
    "conf/train/r.yaml": "model: {num_layers: 24, hidden_size: 1024, num_attention_heads: 8}\n",
    "conf/s.yaml": "experiment: {exp_name: s, task: {type: serve}}\nserve: [{serve_id: a}]\n",
}


def test_a_file_is_matched_though_it_is_unfinished_and_wrong(project):
    project(UNFINISHED)
    found = models.match("conf/u.yaml")
    assert [difference.option for difference in found.differences] == ["ffn_hidden_size"]
    assert models.match("conf/u.yaml", ["train.model.ffn_hidden_size=11008"]).models == ("llama2-7b",)
    with pytest.raises(ConfigError, match="trains nothing"):
        models.match("conf/s.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        models.match("conf/missing.yaml")


def test_an_rwkv_file_is_no_gpt(project):
    project(UNFINISHED)
    assert models.match("conf/r.yaml").models == ("rwkv7-0.4b",)
    facts = models.facts_of("conf/r.yaml", 65_536)
    assert facts.num_parameters == COUNTS["rwkv7-0.4b"][0]
    # A width of which no model was released has the low ranks of FlagScale's rule.
    odd = models.match("conf/r.yaml", ["train.model.hidden_size=1280"])
    assert [difference.option for difference in odd.differences] == ["hidden_size", "ffn_hidden_size"]


def run_models(*words):
    """Run the verb `models` with what the command line would parse."""
    name, rest = (words[0] if words else None), list(words[1:])
    is_json = "--json" in rest
    rest = [word for word in rest if word != "--json"]
    return cli.run(argparse.Namespace(name=name, rest=rest, json=is_json))


def test_the_verb_lists_shows_and_matches(project, capsys):
    project(UNFINISHED)
    assert run_models() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(models.names())
    assert any(
        re.match(r"qwen3-0\.6b +596,049,920 +596,049,920 +112\.0 KiB +Qwen/Qwen3-0\.6B", line)
        for line in lines
    )
    assert run_models("deepseek-v3-671b") == 0
    shown = capsys.readouterr().out
    assert "num_mtp_parameters: 11,610,067,968" in shown
    assert "experts.dense_layers: 0, 1, 2" in shown
    assert run_models("Qwen/Qwen3-0.6B", "--json") == 0
    assert json.loads(capsys.readouterr().out)["attention"]["head_dim"] == 128
    assert run_models("match", "conf/u.yaml") == 0
    assert capsys.readouterr().out.startswith(
        "conf/u.yaml: nearest is llama2-7b, with 1 difference; 13,684,183,040"
    )
    assert run_models("match", "conf/u.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["differences"][0]["also"] == ["llama2-70b"]
    with pytest.raises(ConfigError, match="a file is needed"):
        run_models("match")


# --- real Megatron ----------------------------------------------------------------------------------------


def shortened(name, num_layers, pattern="1"):
    """Return the options of a model of few layers; Megatron takes minutes to build thousands of experts."""
    options = {**published(name).to_megatron(), "num_layers": num_layers}
    return {**options, "moe_layer_freq": pattern}


@pytest.mark.megatron
def test_counts_are_megatrons():
    import subprocess
    import sys

    tiny = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "padded_vocab_size": 256}
    shapes = {
        "gpt2": {**tiny, "max_position_embeddings": 32},
        "gated with biases": {
            **tiny,
            "ffn_hidden_size": 160,
            "swiglu": True,
            "qk_layernorm": True,
            "position_embedding_type": "rope",
        },
        "expert biases": {**tiny, "num_experts": 4, "moe_router_topk": 2, "position_embedding_type": "rope"},
        "shared gate": {
            **shortened("mixtral-8x7b", 2),
            "moe_shared_expert_intermediate_size": 96,
            "moe_shared_expert_gate": True,
        },
        "no latent norm": {**shortened("moonlight-16b-a3b", 3, "[0]+[1]*2"), "qk_layernorm": False},
        "mixtral": shortened("mixtral-8x7b", 2),
        "qwen3-30b-a3b": shortened("qwen3-30b-a3b", 2),
        "moonlight": shortened("moonlight-16b-a3b", 3, "[0]+[1]*2"),
        "deepseek-v3": shortened("deepseek-v3-671b", 5, "[0]*3+[1]*2"),
    }
    whole = ("qwen3-0.6b", "qwen2.5-7b", "llama3-8b", "flagscale-deepseek-16b-a3b")
    jobs = [*shapes.values(), *(published(name).to_megatron() for name in whole)]
    jobs = [{**options, "seq_length": 4096} for options in jobs]
    script = Path(__file__).with_name("megatron_sizes.py")
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [each["parameters"] for each in found] == [models.num_parameters(options) for options in jobs]
    for options, each in zip(jobs, found, strict=True):
        # Megatron's own count leaves out the router and takes each latent norm for a product.
        is_plain = "num_experts" not in options and "multi_latent_attention" not in options
        expected = pytest.approx(each["flops"] / (8 * 4096), rel=1e-12 if is_plain else 4e-3)
        assert models.flops_per_token(options) == expected
