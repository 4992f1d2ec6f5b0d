"""The shipped tables: several versions of an engine in one file, and which of them is meant."""

import json
from importlib.resources import files

import pytest

from flagscale_config import ConfigError, check, load, option_table, render, render_engine
from flagscale_config.cli import main
from flagscale_config.options import ENGINES, known_versions
from flagscale_config.translation import effective_options, translate
from flagscale_config.versions import choose, using

SERVE = "experiment: {{exp_name: s, exp_dir: out, task: {{type: serve}}}}\nserve: [{{serve_id: m, {item}}}]\n"


def errors(source: str, **versions: str) -> list[str]:
    return [str(p) for p in check(source, versions=versions) if p.severity == "error"]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_version_of_every_table_is_whole(engine):
    for version in known_versions(engine):
        table = option_table(engine, version)
        assert table.version == version
        for name, option in table.options.items():
            assert name == option.name
            assert table.find(name) == (option, False)
            assert option.kind in {"true", "false", "pair", "value", "list", "json", "append", "optional"}
            assert option.type in {"str", "int", "float", "bool", "expr", "tuple", "size", "toggle"}
            assert all(flag.startswith("-") for flag in option.flags)
            assert (option.negative is not None) == (option.kind == "pair")
            if option.default is not None and option.choices and option.kind == "value":
                assert option.default in option.choices
    helped = [option for option in option_table(engine).options.values() if option.help]
    assert len(helped) > 0.9 * len(option_table(engine).options)


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (None, "0.19.2"),
        ("0.19.2", "0.19.2"),
        ("0.19", "0.19.2"),
        ("0.18.0", "0.18.2"),
        ("0.18", "0.18.2"),
        ("v0.18.2rc1", "0.18.2"),
        ("0.25.1+cpu", "0.19.2"),
        ("0.17.1+fl", "0.17.1+fl"),
        ("0.30+fl", "0.17.1+fl"),
        ("0.1", "0.17.1"),
        ("nonsense", "0.19.2"),
    ],
)
def test_the_nearest_version_not_newer_is_chosen(asked, chosen):
    assert choose(("0.17.1", "0.18.2", "0.19.2", "0.17.1+fl"), asked) == chosen


def test_an_option_of_another_version_says_so(project):
    project({"s.yaml": SERVE.format(item="engine_args: {calculate_kv_scales: true}").encode()})
    assert errors("s.yaml", vllm="0.27.1") == []
    (line,) = errors("s.yaml", vllm="0.33")
    assert line.endswith("unknown option of vllm 0.33.0: removed in vllm 0.28.0")
    project({"s.yaml": SERVE.format(item="engine_args: {cohere_format: cmd4}").encode()})
    (line,) = errors("s.yaml", vllm="0.25")
    assert "unknown option of vllm 0.25.1: new in vllm 0.27.1 (this is 0.25.1)" in line
    assert errors("s.yaml", vllm="0.33.0") == []
    project({"s.yaml": SERVE.format(item="engine_args: {max_long_partial_prefills: 3}").encode()})
    assert load("s.yaml", versions={"vllm": "0.25"}).serve[0].engine_args == {"max_long_partial_prefills": 3}


def test_a_value_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="must be one of"):
        render_engine("megatron", {"optimizer": "soap"}, version="0.17.1")
    assert render_engine("megatron", {"optimizer": "soap"}, version="0.19.2") == ("--optimizer", "soap")


def test_options_of_megatron_lm_fl_hold_with_that_version(tiny):
    overrides = ["+train.model.max_ngram_size=3", "+train.model.engram_seed=8"]
    found = check(tiny, overrides, versions={"megatron": "0.19.2"})
    assert sum("only megatron 0.17.1+fl has it" in str(problem) for problem in found) == 2
    fork = {"megatron": "0.17.1+fl"}
    assert check(tiny, overrides, versions=fork) == ()
    assert load(tiny, overrides, versions=fork).train.options["engram_seed"] == 8


def test_an_option_of_the_fork_says_how_to_ask_for_it(tiny):
    (problem,) = check(tiny, ["+train.model.engram_seed=8"], versions={"megatron": "0.19.2"})
    assert problem.message.endswith("flagscale-config check --engine megatron=0.17.1+fl")


def test_adapters_are_options_of_every_version(tiny):
    words = ["+train.model.peft_type=lora", "+train.system.checkpoint.pretrained_checkpoint=base"]
    for version in known_versions("megatron"):
        assert check(tiny, words, versions={"megatron": version}) == ()
        option, _ = option_table("megatron", version).find("lora-dim")
        assert option.is_added is not version.endswith("+fl")
    for word, said in (
        ("+train.model.lora_dim=0", "must be at least 1 (0 given)"),
        ("+train.model.lora_dropout=1.0", "must be at least 0.0 and less than 1.0"),
        (
            "+train.model.lora_target_modules=[q_proj,w1]",
            "w1: no such layer; use some of down_proj, gate_proj",
        ),
        ("+train.model.lora_target_modules=[q_a_proj]", "q_a_proj: no such layer"),
        ("+train.model.finetune=true", "name the model's weights by pretrained_checkpoint"),
        (
            "+train.model.use_transformer_engine_op_fuser=true",
            "computes past the layers that adapters are on",
        ),
        ("+train.model.lora_in_init_method=kaimig", "did you mean kaiming?"),
    ):
        (problem,) = check(tiny, [*words, word])
        assert said in problem.message
    experts = [*words, "+train.model.num_experts=4", "+train.model.lora_target_modules=[gate_proj,up_proj]"]
    assert check(tiny, experts) == ()
    for word, said in (
        ("+train.model.moe_shared_expert_intermediate_size=32", "peft has no names for adapters of experts"),
        ("+train.model.moe_layer_freq=2", "peft has no names for adapters of experts"),
        ("train.model.lora_target_modules=[gate_proj]", "gate_proj and up_proj of experts are one weight"),
        ("+train.system.expert_tensor_parallel_size=2", "experts with adapters are not divided (2 here)"),
    ):
        found = check(tiny, [*experts, word])
        assert any(said in problem.message for problem in found), word
    (problem,) = check(tiny, words[:1])
    assert "lora needs pretrained_checkpoint" in problem.message
    (problem,) = check(tiny, ["+train.model.lora_dim=8"])
    assert "has no effect without peft_type: lora" in problem.message


def test_chats_are_refused_what_they_contradict(tiny):
    for word, said in (
        ("+train.data.sft_tokenizer_prompt_format=qwen", "rendered by the tokenizer's own template"),
        ("+train.data.reset_attention_mask=false", "always keeps chats apart"),
    ):
        assert any(said in line.message for line in check(tiny, ["+train.data.sft=true", word]))


def test_versions_asked_for_hold_for_every_table(project):
    text = "experiment: {exp_name: s, exp_dir: out, task: {type: serve}}\nserve: [{serve_id: m}]\n"
    project({"s.yaml": (text + "node_specific: {a: {engram_seed: 8}}\n").encode()})
    assert any("only megatron 0.17.1+fl" in line for line in errors("s.yaml", megatron="0.19.2"))
    assert errors("s.yaml", megatron="0.17.1+fl") == []
    with using({"vllm": "0.25"}):
        assert option_table("vllm").version == "0.25.1"
        with using({"megatron": "0.18"}):
            assert (option_table("vllm").version, option_table("megatron").version) == ("0.25.1", "0.18.2")
    assert option_table("vllm").version != "0.25.1"


def test_the_command_line_asks_for_versions(project, capsys):
    project({"s.yaml": SERVE.format(item="engine_args: {calculate_kv_scales: true}").encode()})
    assert main(["check", "s.yaml", "--engine", "vllm=0.27"]) == 0
    assert main(["check", "s.yaml", "--engine", "vllm=0.33", "--engine", "sglang=0.5.23"]) == 2
    assert main(["explain", "s.yaml", "calculate_kv_scales", "--engine", "vllm=0.25.1"]) == 0
    assert "vllm 0.25.1" in capsys.readouterr().out
    for asked, words in (
        ("vllm=0.1", "no options of vllm 0.1 are known; known versions: 0.25.1"),
        ("vllm=9", "no options of vllm 9 are known"),
        ("vllm", "names no version; known versions"),
        ("vlm=0.25", "no engine 'vlm'; known: llama_cpp"),
    ):
        assert main(["check", "s.yaml", "--engine", asked]) == 2
        assert words in capsys.readouterr().err


def test_bounds_and_keys_are_those_of_the_version(project):
    project({"s.yaml": SERVE.format(item="engine_args: {gpu_memory_utilization: 1.5}").encode()})
    (line,) = errors("s.yaml", vllm="0.32")
    assert line.endswith("must be more than 0 and at most 1 (1.5 given)")
    project(
        {
            "s.yaml": SERVE.format(
                item="engine_args: {eplb_config: {enable_migration_batching: true}}"
            ).encode()
        }
    )
    assert errors("s.yaml", vllm="0.33") == []
    (line,) = errors("s.yaml", vllm="0.25")
    assert "has no key enable_migration_batching" in line


def test_what_replaces_an_option_is_named():
    table = option_table("megatron", "0.19.2")
    assert table.elsewhere("muon_use_nesterov") == "removed in megatron 0.18.2; use muon_nesterov"
    assert table.elsewhere("nothing_like_it") == ""
    gone = table.others["muon_use_nesterov"]
    assert (gone.since, gone.removed, gone.renamed_to) == (None, "0.18.2", "muon_nesterov")


def test_renamed_options_exist():
    raw = json.loads(files("flagscale_config").joinpath("data", "renamed.json").read_text(encoding="utf-8"))
    for engine, names in raw.items():
        for old, new in names.items():
            assert new in option_table(engine, known_versions(engine)[0]).options or new in option_table(
                engine
            )
            assert old not in option_table(engine).options


def test_unknown_engines_have_no_table():
    for call in (option_table, known_versions):
        with pytest.raises(KeyError):
            call("tgi")


# --- engines of their own ---


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        (
            "sglang",
            "{tp: 8, attention-backend: triton, page_size: 16, disable_radix_cache: true}",
            ("--attention-backend", "triton", "--disable-radix-cache", "--page-size", "16", "--tp-size", "8"),
        ),
        (
            "llama_cpp",
            "{n_gpu_layers: 64, threads: -1, flash_attn: on, mmap: x}",
            None,
        ),
        (
            "llama_cpp",
            "{n_gpu_layers: 64, threads: -1, flash_attn: on, kv_offload: false, no_perf: true}",
            ("--flash-attn", "on", "--gpu-layers", "64", "--no-kv-offload", "--no-perf", "--threads", "-1"),
        ),
        ("transformers", "{device: cpu, compile: false}", ("--no-compile", "--device", "cpu")),
    ],
)
def test_each_engine_has_its_own_vocabulary(engine, options, words, project):
    item = f"engine: {engine}, engine_args_specific: {{{engine}: {options}}}"
    project({"s.yaml": SERVE.format(item=item).encode()})
    if words is None:
        (line,) = errors("s.yaml")
        assert f"mmap: unknown option of {engine}" in line
    else:
        assert errors("s.yaml") == []
        assert render(load("s.yaml")) == words


def test_vllm_names_are_said_in_the_words_of_each_engine():
    options = {
        "model": "/m",
        "max_model_len": "32k",
        "max_num_seqs": 8,
        "served_model_name": ("a", "b"),
        "seed": 1,
        "enable_prefix_caching": False,
    }
    assert translate("sglang", options).options == {
        "model_path": "/m",
        "context_length": 32000,
        "max_running_requests": 8,
        "served_model_name": "a",
        "random_seed": 1,
        "disable_radix_cache": True,
    }
    assert translate("llama_cpp", options).options == {
        "model": "/m",
        "ctx_size": 32000,
        "parallel": 8,
        "alias": "a,b",
        "seed": 1,
        "cache_prompt": False,
    }
    assert translate("vllm", options).options == options
    found = translate("transformers", options)
    assert found.options == {"default_seed": 1}
    assert "max_model_len" in found.untranslated


@pytest.mark.parametrize("engine", ["sglang", "llama_cpp", "transformers"])
def test_translations_name_real_options(engine):
    raw = json.loads(files("flagscale_config").joinpath("data", "translation.json").read_text("utf-8"))
    for name, pair in raw[engine].items():
        known = any(name in option_table("vllm", version) for version in known_versions("vllm"))
        assert known or name == "rope_theta", name
        for target in pair["to"] if isinstance(pair["to"], list) else [pair["to"]]:
            option = option_table(engine).options[target]
            for value in pair.get("values", {}).values():
                assert value is None or option.coerce(value) == value


def test_what_is_said_for_the_engine_wins():
    found = effective_options("sglang", {"max_model_len": 10, "seed": 1}, {"context-length": 20})
    assert found.options == {"context_length": 20, "random_seed": 1}
    found = effective_options("vllm", {"enforce_eager": True}, {"no_enforce_eager": True})
    assert found.options == {"enforce_eager": False}


def test_a_value_without_a_counterpart_is_named():
    assert translate("llama_cpp", {"quantization": "awq"}).untranslated == {"quantization": "awq"}
    assert translate("sglang", {"quantization": "no-such"}).untranslated == {"quantization": "no-such"}
    assert translate("sglang", {"attention_config": {"a": 1}}).untranslated == {"attention_config": {"a": 1}}


# --- one function for a whole experiment ---


def test_an_instance_is_rendered_with_its_model_first(project):
    item = "engine_args: {model: /m, max_model_len: 8}, extra_args: [--x]"
    item += ", engine_args_specific: {vllm: {max_model_len: 9}}"
    project({"s.yaml": SERVE.format(item=item).encode()})
    experiment = load("s.yaml")
    assert render(experiment) == ("/m", "--max-model-len", "9", "--x")
    assert render(experiment, "m") == render(experiment)
    with pytest.raises(ConfigError, match="no instance 'n'; known: m"):
        render(experiment, "n")
    with pytest.raises(ConfigError, match="transformers has no counterpart; say it under"):
        render(experiment, engine="transformers")


def test_training_is_rendered_as_megatron_words(tiny):
    words = render(load(tiny, ["+train.extra_args=[--foo]"]))
    assert words[-1] == "--foo"
    assert words[words.index("--num-layers") + 1] == "2"
