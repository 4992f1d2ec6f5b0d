"""Plans: pure, the same for the same input, and equal to the golden files under `golden/`.

`FLAGSCALE_UPDATE_GOLDEN=1 pytest test_plan.py` writes the golden files anew; read what has changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flagscale_config import load
from flagscale_hw.testing import fake_host
from flagscale_serve import InvalidService, Service, of_model, plan

GOLDEN = Path(__file__).parent / "golden"
MACHINES = {"cpu": fake_host("cpu"), "nvidia": fake_host("nvidia", 8)}


def model_service(engine: str) -> Service:
    return of_model("/models/tiny-qwen3", cwd="/home/me", engine=engine)


def check_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("FLAGSCALE_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("chip", MACHINES)
def test_model_directory(chip, engine):
    made = plan(model_service(engine), MACHINES[chip], python="/venv/bin/python")
    # The launcher's text is tested by running it.
    data = json.loads(made.to_json())
    data["files"] = [file["path"] for file in data["files"]]
    check_golden(f"model-{engine}-{chip}.json", json.dumps(data, indent=2, sort_keys=True) + "\n")


def test_the_chip_chooses_the_engine(serve_file):
    experiment = load(serve_file("- serve_id: a\n  engine_args: {model: /models/a}\n"))
    engines = {
        chip: plan(experiment, machine).facts["instances"][0]["engine"] for chip, machine in MACHINES.items()
    }
    assert engines == {"cpu": "transformers", "nvidia": "vllm"}


def test_same_input_same_bytes(serve_file):
    path = serve_file("- serve_id: a\n  engine_args: {model: /models/a, max_num_seqs: 8, dtype: half}\n")
    first, second = (plan(load(path), MACHINES["nvidia"], python="p").to_json() for _ in range(2))
    assert first == second


def test_ready_is_one_token():
    (probe,) = plan(model_service("vllm"), MACHINES["cpu"], ready_timeout_s=7).probes
    assert probe.url == "http://127.0.0.1:{port:model}/v1/completions"
    assert probe.expect == "usage.completion_tokens"
    assert probe.body["max_tokens"] == 1
    assert probe.timeout_s == 7


def test_the_users_environment_and_options_win_over_ours(serve_file):
    path = serve_file(
        """
        - serve_id: a
          engine: vllm
          engine_args: {model: /a, kv_cache_memory_bytes: 64M, enforce_eager: false, max_model_len: 512}
        """,
        experiment="envs:\n  OMP_NUM_THREADS: 7",
    )
    (process,) = plan(load(path), MACHINES["cpu"]).processes
    assert process.env["OMP_NUM_THREADS"] == "7"
    assert "TORCH_COMPILE_DISABLE" not in process.env
    argv = " ".join(process.argv)
    assert "--no-enforce-eager" in argv
    assert "--max-model-len 512" in argv
    assert argv.count("--kv-cache-memory-bytes") == 1
    assert str(MACHINES["cpu"].memory_bytes // 8) not in argv


def test_stages_on_a_cpu_are_warmed_up(serve_file):
    """vLLM makes what a stage receives while it warms up, which eager execution would leave out."""
    item = "- serve_id: a\n  engine: vllm\n  engine_args: {{model: /a, pipeline_parallel_size: 2{}}}\n"
    (process,) = plan(load(serve_file(item.format(""))), MACHINES["cpu"]).processes
    assert "--enforce-eager" not in process.argv
    assert "TORCH_COMPILE_DISABLE" not in process.env
    config = process.argv[process.argv.index("--compilation-config") + 1]
    assert json.loads(config) == {"mode": 2, "backend": "eager"}
    with pytest.raises(InvalidService, match="enforce_eager: true with pipeline_parallel_size 2"):
        plan(load(serve_file(item.format(", enforce_eager: true"))), MACHINES["cpu"])


def test_an_accelerator_gets_none_of_the_cpus_options():
    (process,) = plan(model_service("vllm"), MACHINES["nvidia"]).processes
    assert "--enforce-eager" not in process.argv
    assert not {"OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE", "CUDA_VISIBLE_DEVICES"} & set(process.env)


TWO = """
- serve_id: big
  engine_args: {model: /models/a, tensor_parallel_size: 4}
- serve_id: small
  engine_args: {model: /models/b, pipeline_parallel_size: 2, port: 9000}
"""


def test_instances_share_the_machine(serve_file):
    made = plan(load(serve_file(TWO)), MACHINES["nvidia"])
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in made.processes] == ["0,1,2,3", "4,5"]
    assert dict(made.ports) == {"big": None, "small": 9000}
    assert [probe.url for probe in made.probes] == [
        "http://127.0.0.1:{port:big}/v1/completions",
        "http://127.0.0.1:{port:small}/v1/completions",
    ]
    on_cpu = """
- serve_id: a
  engine_args: {model: /models/a}
- serve_id: b
  engine_args: {model: /models/b}
"""
    made = plan(load(serve_file(on_cpu, name="cpu")), MACHINES["cpu"])
    assert [p.env["OMP_NUM_THREADS"] for p in made.processes] == ["16", "16"]
    assert len({p.env["HF_HOME"] for p in made.processes}) == 2
    assert len(made.files) == 1


def test_more_devices_than_there_are(serve_file):
    with pytest.raises(
        InvalidService, match=r"6 asked for \(big 4, small 2\): this process may use 4 \(nvidia\)"
    ):
        plan(load(serve_file(TWO)), fake_host("nvidia", 4))


@pytest.mark.parametrize(("num", "message"), [(1, "the parallel sizes need 4"), (9, "9 asked for")])
def test_resources_must_fit(serve_file, num, message):
    path = serve_file(
        f"- serve_id: a\n  resources: {{num_gpus: {num}}}\n"
        "  engine_args: {model: /m, tensor_parallel_size: 4}\n"
    )
    with pytest.raises(InvalidService, match=message):
        plan(load(path), MACHINES["nvidia"])


def test_a_cpu_has_no_gpus(serve_file):
    path = serve_file("- serve_id: a\n  engine_args: {model: /m}\n  resources: {num_gpus: 1}\n")
    with pytest.raises(InvalidService, match="no accelerator was found"):
        plan(load(path), MACHINES["cpu"])


def test_a_key_is_never_shown(serve_file):
    path = serve_file(
        "- serve_id: a\n  engine: vllm\n  engine_args: {model: /m, api_key: very-secret-key, host: 0.0.0.0}\n"
    )
    made = plan(load(path), MACHINES["nvidia"])
    assert made.processes[0].env["VLLM_API_KEY"] == "very-secret-key"
    assert made.probes[0].headers["Authorization"] == "Bearer very-secret-key"
    assert made.probes[0].url.startswith("http://127.0.0.1:")
    assert "very-secret-key" not in made.to_json()
    assert "very-secret-key" not in " ".join(made.processes[0].argv)
    assert made.facts["warnings"] == []


@pytest.mark.parametrize(
    ("host", "is_exposed"),
    [("0.0.0.0", True), ("10.1.2.3", True), ("localhost", False), ("127.0.0.2", False)],
)
def test_an_open_door_is_told(serve_file, host, is_exposed):
    path = serve_file(f"- serve_id: a\n  engine_args: {{model: /m, host: {host}}}\n")
    warnings = plan(load(path), MACHINES["cpu"]).facts["warnings"]
    assert any("anybody who reaches this machine" in text for text in warnings) == is_exposed


def test_before_start_runs_in_front_of_the_engine_as_the_users_own_text(serve_file):
    path = serve_file(
        "- serve_id: a\n  engine_args: {model: '/m; rm -rf x'}\n",
        experiment="cmds:\n  before_start: source /env/bin/activate",
    )
    (process,) = plan(load(path), MACHINES["cpu"], python="python").processes
    assert process.argv[:5] == ("bash", "-c", 'source /env/bin/activate\nexec "$@"', "bash", "python")
    assert "/m; rm -rf x" in process.argv


def test_an_unknown_engine_is_refused_with_those_that_are_known(serve_file):
    path = serve_file("- serve_id: a\n  engine_args: {model: /m}\n")
    with pytest.raises(
        InvalidService, match=r"'llamafile': not known: llama_cpp, sglang, transformers, vllm"
    ):
        plan(load(path), MACHINES["cpu"], engine="llamafile")
