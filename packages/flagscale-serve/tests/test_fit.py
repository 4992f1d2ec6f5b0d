"""Whether a model fits its devices: the published numbers as oracle, and the nearest layout that fits."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from flagscale_hw import Machine, Node, Target
from flagscale_hw.machine import Problem
from flagscale_hw.testing import Faults, fake_host, faked_host
from flagscale_serve import Fit, Instance, InvalidModel, Service, fit, plan
from flagscale_serve.engines import Layout
from flagscale_serve.fit import words_of
from flagscale_serve.model import Model, read_gguf_model, read_model

GIB = 1 << 30
NVIDIA = fake_host("nvidia", 8)
# Qwen3-8B as published: 36 layers, 8 groups of 128, 8 190 735 360 parameters.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NUM_PARAMETERS = 8_190_735_360
INSTANCE = Instance(name="a", model="/m", served_names=("a",), engine="vllm")


def model_of(config=QWEN3_8B, bytes_of=None, **more) -> Model:
    bytes_of = {"BF16": 2 * NUM_PARAMETERS} if bytes_of is None else bytes_of
    return Model(
        path=Path("/m"),
        architecture="Qwen3ForCausalLM",
        has_chat_template=True,
        num_weight_bytes=sum(bytes_of.values()),
        head_dim=128,
        config=config,
        bytes_of=bytes_of,
        **more,
    )


def fitted(options=None, *, model=None, layout=None, memory_gib=80, machine=NVIDIA, engine="vllm"):
    instance = Instance(name="a", model="/m", served_names=("a",), engine=engine, options=options or {})
    layout = layout or Layout()
    devices = tuple(
        replace(device, memory_total_bytes=memory_gib * GIB) for device in machine.visible[: layout.devices]
    )
    machine = replace(machine, devices=devices + machine.devices[len(devices) :])
    return fit(instance, model or model_of(), layout, machine, devices=devices)


def test_the_numbers_of_a_published_model():
    found = fitted({"max_model_len": 32768, "gpu_memory_utilization": 0.9})
    assert found.weights == 2 * NUM_PARAMETERS
    assert found.kv_per_token == 2 * 36 * 8 * 128 * 2
    assert found.budget == int(0.9 * 80 * GIB)
    assert found.room == found.budget - found.weights - found.working
    assert found.kv_tokens == found.room // int(found.kv_per_token)
    assert found.verdict == "fits"
    assert found.warnings == ()
    # Context, graphs, activations of 8192 tokens and logits: a few GiB, never next to nothing.
    assert 1.5 * GIB < found.working < 5 * GIB


@pytest.mark.parametrize(
    ("tensor", "pipeline", "kv_part"), [(2, 1, 1 / 2), (8, 1, 1 / 8), (16, 1, 1 / 8), (2, 2, 1 / 4)]
)
def test_devices_divide_weights_and_the_heads_of_keys_and_values(tensor, pipeline, kv_part):
    found = fitted(layout=Layout(tensor=tensor, pipeline=pipeline))
    assert found.weights == 2 * NUM_PARAMETERS // (tensor * pipeline)
    assert found.kv_per_token == 2 * 36 * 8 * 128 * 2 * kv_part


def test_copies_divide_nothing_but_experts():
    assert fitted(layout=Layout(data=4)).weights == 2 * NUM_PARAMETERS
    config = {
        **QWEN3_8B,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    model = model_of(config, {"BF16": 60 * GIB})
    alone, four = fitted(model=model), fitted(model=model, layout=Layout(data=4))
    assert alone.weights == 60 * GIB
    assert 60 * GIB / 4 < four.weights < 60 * GIB / 2


@pytest.mark.parametrize(
    ("options", "bytes_of", "expected"),
    [
        ({}, {"F32": 400}, 200),  # vLLM serves 16 bits unless it is told otherwise
        ({"dtype": "float32"}, {"F32": 400}, 400),
        ({"dtype": "float32"}, {"BF16": 400}, 800),
        ({"dtype": "half"}, {"F32": 400, "F8_E4M3": 50}, 250),
    ],
)
def test_weights_take_the_format_in_which_they_are_loaded(options, bytes_of, expected):
    model = model_of({**QWEN3_8B, "torch_dtype": "float32"}, bytes_of)
    assert fitted(options, model=model).weights == expected


def test_quantising_while_loading_keeps_the_embeddings():
    found = fitted({"quantization": "fp8"})
    embeddings = 2 * 151936 * 4096
    assert found.weights == embeddings * 2 + (NUM_PARAMETERS - embeddings)
    already = model_of({**QWEN3_8B, "quantization_config": {}}, {"F8_E4M3": NUM_PARAMETERS})
    assert fitted({"quantization": "fp8"}, model=already).weights == NUM_PARAMETERS


def test_too_short_is_a_warning_with_the_nearest_settings():
    found = fitted({"gpu_memory_utilization": 0.9, "max_model_len": 40960}, memory_gib=24)
    assert found.verdict == "short"
    (warning,) = found.warnings
    assert f"hold keys and values of {found.kv_tokens} tokens" in warning
    assert "max_model_len: 40960" in warning
    shorter, *others = found.advice
    length = int(shorter.removeprefix("max_model_len="))
    assert length % 1024 == 0
    assert fitted({"gpu_memory_utilization": 0.9, "max_model_len": length}, memory_gib=24).verdict == "fits"
    assert "tensor_parallel_size=2" in others
    two = fitted(
        {"gpu_memory_utilization": 0.9, "max_model_len": 40960}, memory_gib=24, layout=Layout(tensor=2)
    )
    assert two.verdict == "fits"


def test_too_big_names_what_would_fit():
    found = fitted(memory_gib=12)
    assert found.verdict == "too big"
    assert found.advice[0] == "tensor_parallel_size=4"
    assert "quantization=fp8" in found.advice
    huge = fitted(model=model_of(bytes_of={"BF16": 1000 * GIB}))
    assert huge.advice[0] == "tensor_parallel_size=8 with pipeline_parallel_size=2 (16 devices)"


def test_latent_attention_is_not_divided():
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "torch_dtype": "bfloat16",
    }
    model = model_of(config, {"F8_E4M3": 671 * 10**9})
    assert fitted(model=model, layout=Layout(tensor=8)).kv_per_token == 61 * (512 + 64) * 2


def test_what_is_not_known_is_no_obstacle():
    strange = model_of({"architectures": ["NobodyKnows"]}, {"BF16": GIB})
    found = fitted(model=strange)
    assert (found.verdict, found.kv_per_token, found.weights) == ("unknown", None, GIB)
    blind = replace(NVIDIA, devices=tuple(replace(one, memory_total_bytes=None) for one in NVIDIA.devices))
    assert fit(INSTANCE, model_of(), Layout(), blind).verdict == "unknown"


# --- on a CPU -----------------------------------------------------------------------------------------------


def cpu_of(memory_gib: int) -> Machine:
    return replace(fake_host("cpu"), memory_bytes=memory_gib * GIB)


def on_cpu(memory_gib, *asked, nodes=(), env=None):
    """Plan one vLLM instance for each (GiB of weights, options), and return how each fits."""
    instances = [
        Instance(name=f"i{number}", model=f"/{gib}", served_names=("m",), engine="vllm", options=options)
        for number, (gib, options) in enumerate(asked)
    ]
    models = {f"/{gib}": model_of(bytes_of={"BF16": gib * GIB}) for gib, _ in asked}
    service = Service(name="s", cwd="/w", instances=tuple(instances), env=env or {})
    made = plan(service, cpu_of(memory_gib), nodes=nodes, models=models)
    return [Fit(**one["fit"]) for one in made.facts["instances"]], made.facts["warnings"]


def test_ranks_on_one_cpu_share_its_memory():
    alone = fit(INSTANCE, model_of(), Layout(), cpu_of(64))
    four = fit(INSTANCE, model_of(), Layout(tensor=4), cpu_of(64))
    assert (alone.memory, four.memory) == (64 * GIB, 16 * GIB)
    assert four.room == 16 * GIB - 2 * NUM_PARAMETERS // 4
    assert fit(INSTANCE, model_of(), Layout(tensor=2), cpu_of(0)).verdict == "unknown"


def test_on_a_cpu_the_room_is_what_the_engine_is_told():
    (found,), _ = on_cpu(64, (10, {"tensor_parallel_size": 2}))
    assert (found.memory, found.room) == (32 * GIB, 64 * GIB // 8 // 2)
    (found,), _ = on_cpu(64, (10, {"kv_cache_memory_bytes": "3G"}))
    assert found.room == 3 * GIB
    (found,), _ = on_cpu(64, (10, {"kv_cache_memory_bytes": "3G"}), env={"VLLM_CPU_KVCACHE_SPACE": "5"})
    assert found.room == 5 * GIB
    (found,), _ = on_cpu(64, (60, {"kv_cache_memory_bytes": "30G"}))
    assert found.room == 4 * GIB


def test_a_context_that_the_cache_on_a_cpu_is_too_short_for_names_the_size():
    (found,), (warning,) = on_cpu(32, (10, {"max_model_len": 40000}))
    assert found.verdict == "short"
    shorter, larger = found.advice
    assert f"use {shorter} or {larger}" in warning
    for said in (shorter, larger):
        name, _, value = said.partition("=")
        assert on_cpu(32, (10, {"max_model_len": 40000, name: int(value)}))[0][0].verdict == "fits"


def test_instances_on_one_cpu_share_its_memory():
    (one, two), _ = on_cpu(32, (20, {}), (6, {}))
    assert (one.verdict, two.verdict) == ("fits", "fits")
    cache = 32 * GIB // 8 // 2
    assert (one.memory, two.memory) == (26 * GIB - cache, 12 * GIB - cache)
    (one, two), _ = on_cpu(32, (20, {}), (16, {}))
    assert (one.verdict, two.verdict) == ("too big", "too big")
    (one, two), _ = on_cpu(32, (20, {}), (40, {}))
    assert (one.verdict, two.verdict) == ("too big", "too big")
    assert "i1: weights: 40.0 GiB on the device" in words_of(two)


def test_an_instance_shares_only_the_hosts_that_it_has():
    nodes = [Node(target=Target(name=name), machine=cpu_of(32), slots=1) for name in "abc"]
    (wide, narrow), _ = on_cpu(32, (40, {"tensor_parallel_size": 2}), (8, {}), nodes=nodes)
    assert (wide.memory, narrow.memory) == (32 * GIB, 32 * GIB)
    (wide, narrow), _ = on_cpu(32, (40, {"tensor_parallel_size": 2}), (8, {}), nodes=nodes[:2])
    cache = 32 * GIB // 8 // 2
    assert (wide.memory, narrow.memory) == (24 * GIB - cache, 12 * GIB - cache)


# --- in the command line -----------------------------------------------------------------------------------


def write_model(folder: Path, num_bytes: int) -> None:
    """Write a model of a size without taking the room: the file has a hole where the weights would be."""
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}}
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)


def test_plan_prints_the_numbers_and_refuses_what_cannot_fit(shell, model_dir):
    with faked_host("nvidia", 8):
        write_model(model_dir, 2 * NUM_PARAMETERS)
        done = shell("plan", model_dir)
        assert done.returncode == 0, done.stderr
        assert "weights 15.26 GiB" in done.stdout
        assert "sequences of 40960\n  fits" in done.stdout
        write_model(model_dir, 200 * GIB)
        done = shell("plan", model_dir)
        assert done.returncode == 2
        assert "weights: 200.0 GiB on the device" in done.stderr
        assert "use tensor_parallel_size=4" in done.stderr
        assert "too big" in done.stdout
        assert shell("run", model_dir).returncode == 2
    assert shell.engine_pids() == []


def test_a_tool_that_was_cut_off_is_a_warning_and_no_silence(shell, model_dir, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_HW_TIMEOUT", "0.5")
    write_model(model_dir, 2 * NUM_PARAMETERS)
    with faked_host("nvidia", 8, faults=Faults(hang=True)):
        done = shell("plan", model_dir)
    assert "warning: nvidia: nvidia-smi: no answer within 0.5 s; it was killed: on a busy host" in done.stdout
    assert "on the device: not known, of which the engine may take not known" in done.stdout


def test_what_hosts_could_not_be_asked_is_said_with_their_names():
    late = replace(NVIDIA, problems=(Problem(where="nvidia", text="no answer"),))
    nodes = [
        Node(target=Target(name=name), machine=machine)
        for name, machine in (("a", late), ("b", NVIDIA), ("c", late))
    ]
    instance = Instance(name="i", model="/m", served_names=("m",), engine="vllm")
    service = Service(
        name="s", cwd="/w", instances=(replace(instance, options={"tensor_parallel_size": 24}),)
    )
    assert "a, c: nvidia: no answer" in plan(service, late, nodes=nodes).facts["warnings"]
    one = plan(replace(service, instances=(instance,)), late)
    assert one.facts["warnings"] == ["nvidia: no answer"]


def test_the_facts_are_in_the_plan(shell, model_dir):
    with faked_host("nvidia", 8):
        write_model(model_dir, 2 * NUM_PARAMETERS)
        (one,) = json.loads(shell("plan", model_dir, "--json").stdout)["facts"]["instances"]
    assert one["fit"]["verdict"] == "fits"
    assert one["fit"]["weights"] == 2 * NUM_PARAMETERS


# --- GGUF --------------------------------------------------------------------------------------------------


def write_gguf(path: Path, *, num_bytes: int = 4096, **more: object) -> bytes:
    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    values: dict[str, bytes] = {"general.architecture": struct.pack("<I", 8) + text("qwen3")}
    numbers = {"block_count": 36, "embedding_length": 4096, "attention.head_count": 32}
    numbers |= {"attention.head_count_kv": 8, "attention.key_length": 128, "attention.value_length": 128}
    values |= {f"qwen3.{key}": struct.pack("<II", 4, number) for key, number in numbers.items()}
    values["tokenizer.ggml.tokens"] = struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    values["tokenizer.chat_template"] = struct.pack("<I", 8) + text("{{ x }}")
    body = b"".join(text(key) + value for key, value in values.items())
    body += text("w") + struct.pack("<IQIQ", 1, 8, 0, 0)
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, len(values)) + body
    path.write_bytes(data + b"\0" * num_bytes)
    return data


def test_a_gguf_file_tells_its_own_numbers(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    model = read_gguf_model(path)
    assert (model.architecture, model.has_chat_template, model.is_gguf) == ("qwen3", True, True)
    assert model.num_weight_bytes == path.stat().st_size
    instance = Instance(name="a", model=str(path), served_names=("a",), engine="llama_cpp")
    found = fit(instance, model, Layout(), NVIDIA, devices=NVIDIA.visible[:1])
    assert found.kv_per_token == 36 * 8 * 256 * 2


def test_a_broken_gguf_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    data = write_gguf(path)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(InvalidModel):
            read_gguf_model(path)
    path.write_bytes(data)  # the header promises a tensor that is not there
    with pytest.raises(InvalidModel, match="behind that"):
        read_gguf_model(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\xff" * 64)
    with pytest.raises(InvalidModel, match="damaged"):
        read_gguf_model(path)


def test_a_directory_is_no_gguf_file(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(InvalidModel, match=r"a directory: llama.cpp serves one GGUF file \(.*m.gguf\)"):
        read_gguf_model(tmp_path)


def test_a_gguf_file_is_a_target(shell, tmp_path):
    """Its server is the program llama-server; here the stand-in for every engine."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    missing = shell("plan", path)
    assert missing.returncode == 3
    assert "no `llama-server` that answers is on the PATH" in missing.stderr
    assert "llama-server --model" in missing.stdout


def test_the_model_directory_is_read_once_for_all_of_this(model_dir):
    assert read_model(model_dir).bytes_of == {"F32": 8}
