"""Our verdicts are vLLM's: the same options go through its parser, its checks and its configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale_config import check

CASES = [
    (model, options)
    for model, cases in yaml.safe_load(
        Path(__file__).with_name("vllm").joinpath("cases.yaml").read_text()
    ).items()
    for options in cases
]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 128}
SIZES |= {"max_position_embeddings": 256, "intermediate_size": 128, "dtype": "bfloat16"}
MODELS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 2,
    },
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "latent": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


class Vllm:
    """vLLM's own checks in a process of their own."""

    def __init__(self):
        python = os.environ.get("FLAGSCALE_TEST_VLLM_PYTHON", sys.executable)
        ask = "import importlib.metadata as m; print(m.version('vllm'))"
        asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
        self.version = asked.stdout.strip().partition("+")[0]
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("vllm_verdict.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def refusal(self, model, options):
        self.process.stdin.write(json.dumps(["--model", str(model), *words_of(options)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def words_of(options):
    """Return a command line, plainly: what we refuse to render must reach vLLM too."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


@pytest.fixture(scope="module")
def vllm():
    running = Vllm()
    yield running
    running.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of each model: its `config.json` alone."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(SIZES | config))
    return folder


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Return a function that says why we refuse options, None when we do not."""
    monkeypatch.chdir(tmp_path)

    def refusal(model, options, version="0.32"):
        experiment = {"exp_name": "a", "task": {"type": "serve"}}
        item = {"serve_id": "a", "engine": "vllm", "engine_args": {"model": str(model), **options}}
        Path("s.yaml").write_text(json.dumps({"experiment": experiment, "serve": [item]}))
        found = check("s.yaml", versions={"vllm": version})
        return "; ".join(str(problem) for problem in found if problem.severity == "error") or None

    return refusal


@pytest.mark.vllm
@pytest.mark.parametrize(("model", "options"), CASES, ids=lambda item: str(item)[:70])
def test_the_verdict_is_vllms(model, options, vllm, models, ours):
    theirs = vllm.refusal(models / model, options)
    found = ours(models / model, options, vllm.version)
    assert (found is None) == (theirs is None), f"vLLM: {theirs}\nours: {found}"


def test_both_verdicts_occur(models, ours):
    assert len(CASES) >= 150
    refused = [options for model, options in CASES if ours(models / model, options)]
    assert len(CASES) * 0.3 < len(refused) < len(CASES) * 0.8


SIZE = st.sampled_from([1, 1, 2, 3, 4, 8])
LAYOUT = st.fixed_dictionaries(
    {"tensor_parallel_size": SIZE},
    optional={
        "pipeline_parallel_size": SIZE,
        "data_parallel_size": SIZE,
        "decode_context_parallel_size": SIZE,
        "nnodes": st.sampled_from([1, 2, 3]),
        "node_rank": st.sampled_from([0, 0, 1, 2]),
        "enable_expert_parallel": st.booleans(),
        "enable_eplb": st.booleans(),
        "distributed_executor_backend": st.sampled_from(["mp", "uni"]),
        "data_parallel_size_local": SIZE,
        "data_parallel_rank": st.sampled_from([0, 1, 3]),
        "data_parallel_start_rank": st.sampled_from([0, 1, 3]),
        "data_parallel_hybrid_lb": st.booleans(),
        "data_parallel_external_lb": st.booleans(),
        "max_num_seqs": st.sampled_from([1, 8, 64]),
        "max_num_batched_tokens": st.sampled_from([4, 32, 512]),
        "max_model_len": st.sampled_from([16, 64, 512]),
        "enable_chunked_prefill": st.booleans(),
    },
)


@pytest.mark.vllm
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=st.sampled_from(["llama", "experts"]), options=LAYOUT)
def test_any_layout_has_vllms_verdict(model, options, vllm, models, ours):
    theirs = vllm.refusal(models / model, options)
    found = ours(models / model, options, vllm.version)
    assert (found is None) == (theirs is None), f"vLLM: {theirs}\nours: {found}"
