"""What the transformers server can and cannot be asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files

import pytest

from flagscale_config import load
from flagscale_hw.testing import fake_host
from flagscale_serve import EngineMissing, InvalidService, of_model, plan
from flagscale_serve.checks import check_engines

CPU = fake_host("cpu")


def argv_of(serve_file, args: str, specific: str = "{}", machine=CPU):
    path = serve_file(
        "- serve_id: a\n  engine: transformers\n"
        f"  engine_args: {{model: /m, {args}}}\n  engine_args_specific: {{transformers: {specific}}}\n"
    )
    made = plan(load(path), machine, python="py")
    return " ".join(made.processes[0].argv), made.facts["warnings"]


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("dtype: half", "--dtype float16"),
        ("dtype: bfloat16", "--dtype bfloat16"),
        ("trust_remote_code: true", "--trust-remote-code"),
        ("seed: 3", "--default-seed 3"),
        ("quantization: bitsandbytes", "--quantization bnb-4bit"),
        ("uvicorn_log_level: warning", "--log-level warning"),
    ],
)
def test_options_are_translated(serve_file, asked, got):
    argv, warnings = argv_of(serve_file, asked)
    assert got in argv
    assert warnings == []


def test_the_device_follows_the_chip_and_the_engines_own_section_wins(serve_file):
    assert "--device cpu" in argv_of(serve_file, "")[0]
    assert "--device cuda" in argv_of(serve_file, "", machine=fake_host("nvidia", 1))[0]
    argv, _ = argv_of(serve_file, "dtype: half", "{dtype: float32, attn_implementation: eager}")
    assert "--dtype float32" in argv
    assert "float16" not in argv
    assert "--attn-implementation eager" in argv


def test_speed_options_are_skipped_aloud(serve_file):
    argv, (warning,) = argv_of(
        serve_file, "gpu_memory_utilization: 0.9, max_num_seqs: 8, tensor_parallel_size: 1"
    )
    assert warning == "a: `transformers serve` has no use for gpu_memory_utilization, max_num_seqs: skipped"
    assert "gpu" not in argv


@pytest.mark.parametrize(
    "asked",
    [
        "tensor_parallel_size: 2",
        "quantization: fp8",
        "tool_call_parser: hermes",
        "enable_auto_tool_choice: true",
        "chat_template: x.jinja",
        "api_key: secret",
    ],
)
def test_what_changes_the_answers_is_refused(serve_file, asked):
    key = asked.partition(":")[0]
    with pytest.raises(InvalidService, match=rf"{key}.*(transformers serve).*(use|or) .*engine `vllm`"):
        argv_of(serve_file, asked)


def test_what_asks_for_nothing_is_not_refused(serve_file):
    argv_of(serve_file, "enable_auto_tool_choice: false, enable_lora: false")


def test_the_launcher_gives_the_model_its_name(tmp_path, model_dir):
    """It runs in the engine's Python, so it is run here as a script beside a stand-in for the engine."""
    (tmp_path / "transformers" / "cli").mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text("class GenerationMixin:\n    generate = None\n")
    (tmp_path / "uvicorn.py").write_text("class Config:\n    pass\n")
    (tmp_path / "transformers" / "cli" / "__init__.py").touch()
    (tmp_path / "transformers" / "cli" / "transformers.py").write_text(
        "import json, sys; print(json.dumps(sys.argv))"
    )
    script = tmp_path / "launch.py"
    script.write_text(files("flagscale_serve.engines").joinpath("transformers_launch.py").read_text())
    home = tmp_path / "home"
    for _ in range(2):  # a restarted instance finds what its first start left
        done = subprocess.run(
            [sys.executable, script, model_dir, "org/name", "--port", "1"],
            env={**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == ["transformers", "serve", "org/name", "--port", "1"]
    entry = home / "hub" / "models--org--name"
    snapshot = entry / "snapshots" / (entry / "refs" / "main").read_text()
    assert (snapshot / "config.json").read_text() == (model_dir / "config.json").read_text()


def test_a_build_for_cpus_is_refused_where_devices_would_lie_idle(shell, model_dir, monkeypatch):
    python = shell.env["FLAGSCALE_SERVE_PYTHON"]
    for name, value in {**shell.env, "FAKE_VERSION": "0.33.0+cpu"}.items():
        monkeypatch.setenv(name, value)
    service = of_model(str(model_dir), cwd=str(shell.home), engine="vllm")
    assert check_engines(service, python, "cpu") == {"vllm": "0.33.0+cpu"}
    with pytest.raises(EngineMissing, match=r"has vllm 0.33.0\+cpu, which is built for CPUs.* has nvidia"):
        check_engines(service, python, "nvidia")
