"""SGLang and llama.cpp in vLLM's vocabulary, vLLM's versions, and where every option comes from."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from flagscale_config import ConfigError, load
from flagscale_hw.testing import fake_host
from flagscale_serve import InvalidService, of_model, plan
from flagscale_serve.engines import engine_named, engine_names

NVIDIA = fake_host("nvidia", 8)
CPU = fake_host("cpu")


def planned(serve_file, engine: str, args: str, specific: str = "{}", machine=NVIDIA, **more):
    path = serve_file(
        f"- serve_id: a\n  engine: {engine}\n  engine_args: {{model: /m, {args}}}\n"
        f"  engine_args_specific: {{{engine}: {specific}}}\n"
    )
    return plan(load(path), machine, python="py", **more)


def argv_of(*args, **more):
    return " ".join(planned(*args, **more).processes[0].argv)


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("tensor_parallel_size: 4", "--tp-size 4"),
        ("max_model_len: 32k", "--context-length 32000"),
        ("max_num_seqs: 8", "--max-running-requests 8"),
        ("gpu_memory_utilization: 0.8", "--mem-fraction-static 0.8"),
        ("enforce_eager: true", "--disable-cuda-graph"),
        ("enable_prefix_caching: false", "--disable-radix-cache"),
        ("tool_call_parser: hermes", "--tool-call-parser hermes"),
        ("tool_call_parser: hermes, enable_auto_tool_choice: true", "--tool-call-parser hermes"),
        ("tool_call_parser: deepseek_v31", "--tool-call-parser deepseekv31"),
        ("reasoning_parser: deepseek_r1", "--reasoning-parser deepseek-r1"),
        ("served_model_name: org/name", "--served-model-name org/name"),
    ],
)
def test_sglang_is_told_in_its_own_words(serve_file, asked, got):
    argv = argv_of(serve_file, "sglang", asked)
    assert argv.startswith("py -m sglang.launch_server --model-path /m ")
    assert got in argv
    assert argv.count("--model-path") == 1


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("max_model_len: 4096", "--ctx-size 4096"),
        ("max_num_seqs: 4", "--parallel 4"),
        ("kv_cache_dtype: fp8", "--cache-type-k q8_0 --cache-type-v q8_0"),
        ("seed: 3", "--seed 3"),
        ("served_model_name: [a, b]", "--alias a,b"),
    ],
)
def test_llama_cpp_is_told_in_its_own_words(serve_file, asked, got):
    argv = argv_of(serve_file, "llama_cpp", asked, machine=CPU)
    assert argv.startswith("llama-server --model /m --alias ")
    assert got in argv


def test_llama_cpps_key_stays_off_the_command_line(serve_file):
    made = planned(serve_file, "llama_cpp", "api_key: very-secret-key", machine=CPU)
    assert made.processes[0].env["LLAMA_API_KEY"] == "very-secret-key"
    assert "very-secret-key" not in made.to_json()


def test_llama_cpps_devices_are_those_it_divides_its_layers_over(serve_file):
    path = serve_file(
        "- serve_id: a\n  engine: llama_cpp\n  engine_args: {model: /a.gguf, tensor_parallel_size: 2}\n"
        "- serve_id: b\n  engine: llama_cpp\n  engine_args: {model: /b.gguf}\n"
    )
    made = plan(load(path), NVIDIA)
    assert [one.env["CUDA_VISIBLE_DEVICES"] for one in made.processes] == ["0,1", "2"]


def test_speed_options_without_counterpart_are_skipped_aloud(serve_file):
    (warning,) = planned(serve_file, "sglang", "compilation_config: '{}', swap_space: 4").facts["warnings"]
    assert "SGLang has no use for compilation_config: skipped" in warning


@pytest.mark.parametrize(
    ("engine", "asked", "machine", "message"),
    [
        ("sglang", "limit_mm_per_prompt: {image: 1}, logits_processors: [a.b]", NVIDIA, "logits_processors"),
        ("sglang", "enable_auto_tool_choice: true", NVIDIA, "enable_auto_tool_choice"),
        ("sglang", "", CPU, "needs an accelerator"),
        ("sglang", "api_key: k", NVIDIA, "command line only"),
        ("llama_cpp", "tool_call_parser: hermes", CPU, "tool_call_parser"),
        ("llama_cpp", "data_parallel_size: 2", NVIDIA, "num_replicas"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(serve_file, engine, asked, machine, message):
    with pytest.raises(InvalidService, match=message):
        planned(serve_file, engine, asked, machine=machine)


def test_sglangs_own_sizes_count_devices(serve_file):
    with pytest.raises(InvalidService, match=r"a 16"):
        planned(serve_file, "sglang", "", "{tp_size: 8, dp_size: 2}")
    assert planned(serve_file, "sglang", "", "{tp_size: 8, dp_size: 2, enable_dp_attention: true}")


def test_every_option_knows_where_it_comes_from(serve_file):
    made = planned(
        serve_file, "sglang", "max_num_seqs: 8, dtype: half, swap_space: 2", "{max_running_requests: 16}"
    )
    rows = {(row["option"], row["fate"]): row for row in made.facts["instances"][0]["options"]}
    won = rows["max_running_requests", ""]
    assert (won["value"], won["source"]) == (16, "engine_args_specific.sglang")
    assert won["words"] == ["--max-running-requests", "16"]
    lost = rows["max_running_requests", "overridden"]
    assert (lost["value"], lost["source"], lost["asked"]) == (8, "engine_args", "max_num_seqs")
    assert lost["place"].rpartition("/")[2].startswith("demo.yaml:3:")
    assert rows["enable_metrics", ""]["source"] == "default of flagscale-serve"


def test_explain_shows_it(shell, serve_file, model_dir):
    path = serve_file(
        f"- serve_id: a\n  engine: vllm\n  engine_args: {{model: {model_dir}, max_num_seqs: 8}}\n"
        "  engine_args_specific: {vllm: {max_num_seqs: 16}}\n"
    )
    done = shell("plan", path, "--explain", "max_num_seqs")
    assert done.returncode == 0, done.stderr
    assert "max_num_seqs = 16: --max-num-seqs 16\n    from engine_args_specific.vllm (" in done.stdout
    assert "max_num_seqs = 8: overridden\n    from engine_args (" in done.stdout
    assert "kv_cache_memory_bytes" in shell("plan", path, "--explain").stdout
    wrong = shell("plan", path, "--explain", "max_seqs")
    assert wrong.returncode == 2
    assert "no option of this plan" in wrong.stderr


def test_a_null_takes_back_what_we_would_have_chosen(serve_file):
    argv = argv_of(serve_file, "vllm", "", "{max_model_len: null}", machine=CPU)
    assert "--max-model-len auto" in argv  # config leaves nulls out; the default stays
    argv = argv_of(serve_file, "vllm", "max_model_len: 77", machine=CPU)
    assert "--max-model-len 77" in argv
    assert "auto" not in argv


@pytest.mark.parametrize(
    ("version", "is_known"), [("0.25.1", False), ("0.31.0", False), ("0.33.0", True), (None, True)]
)
def test_options_are_those_of_the_engines_version(serve_file, version, is_known):
    """vLLM 0.33 brought `watchdog_config`."""
    versions = {} if version is None else {"vllm": version}
    path = serve_file("- serve_id: a\n  engine: vllm\n  engine_args: {model: /m, watchdog_config: {}}\n")
    experiment = load(path, versions={"vllm": "0.33.0"})
    if is_known:
        assert "--watchdog-config" in plan(experiment, NVIDIA, versions=versions).processes[0].argv
    else:
        with pytest.raises(ConfigError, match=r"new in vllm 0\.33"):
            plan(experiment, NVIDIA, versions=versions)


EXAMPLE = Path(__file__).parent / "engines" / "echo-engine"
CUSTOM = (EXAMPLE / "echo_engine.py").read_text()


def build_wheel(folder: Path, code: str, value: str) -> Path:
    """Write a wheel of the example as its build tool would, without asking a network for that tool."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    name = project["name"].replace("-", "_")
    info = f"{name}-{project['version']}.dist-info"
    (group,) = project["entry-points"]
    wheel = folder / f"{name}-{project['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", code)
        about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/entry_points.txt", f"[{group}]\necho = {value}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package that brings an engine: pure wheels are unpacked, as installers do."""

    def write(code: str = CUSTOM, value: str = "echo_engine:Echo") -> None:
        site = tmp_path / "site"
        with zipfile.ZipFile(build_wheel(tmp_path, code, value)) as archive:
            archive.extractall(site)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        engine_named.cache_clear()

    yield write
    engine_named.cache_clear()
    sys.modules.pop("echo_engine", None)


def test_another_package_brings_an_engine(install, serve_file):
    install()
    assert "echo" in engine_names()
    assert "echo_engine" not in sys.modules
    made = plan(of_model("/m", cwd="/", engine="echo"), CPU)
    assert made.processes[0].argv == ("echo-server", "/m", "--port", "{port:model}")
    experiment = load(serve_file("- serve_id: a\n  engine_args: {model: /m}\n"))
    by_file = plan(experiment, CPU, engine="echo")
    assert by_file.facts["instances"][0]["engine"] == "echo"


@pytest.mark.parametrize(
    ("code", "value", "said"),
    [
        ("raise RuntimeError('no')", "echo_engine:Echo", "cannot be loaded (RuntimeError: no)"),
        (CUSTOM, "echo_engine:Nothing", "cannot be loaded (AttributeError"),
        ("class Echo: name = 'echo'", "echo_engine:Echo", "has no program, modules"),
    ],
)
def test_an_engine_that_is_broken_says_so(install, shell, model_dir, code, value, said):
    install(code, value)
    done = shell("plan", model_dir, "--engine", "echo")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_plan_as_json_has_the_options(shell, model_dir):
    done = shell("plan", model_dir, "--json", "--engine", "vllm")
    (one,) = json.loads(done.stdout)["facts"]["instances"]
    assert {"option", "value", "source", "words"} <= set(one["options"][0])
