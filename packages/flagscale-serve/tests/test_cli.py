"""The command line: what it prints and how it exits, without starting anything."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

import flagscale_serve

VERBS = ("plan", "run", "status", "logs", "stop", "list", "chat", "generate")


def test_help_names_every_verb(shell):
    done = shell("--help")
    assert done.returncode == 0
    assert all(f"    {verb}" in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(shell, verb):
    done = shell(verb, "--help")
    assert done.returncode == 0
    assert "usage: flagscale-serve" in done.stdout


def test_importing_pulls_no_framework():
    code = (
        "import sys, flagscale_serve.cli, flagscale_serve; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'httpx', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    assert all(hasattr(flagscale_serve, name) for name in flagscale_serve.__all__)
    assert callable(flagscale_serve.plan)
    assert callable(flagscale_serve.chat)


def test_version_is_the_distributions(shell):
    try:
        version = importlib.metadata.version("flagscale-serve")
    except importlib.metadata.PackageNotFoundError:
        version = flagscale_serve.__version__  # run from the source tree
    assert shell("--version").stdout == f"flagscale-serve {version}\n"


def test_a_closed_pipe_for_output_and_errors_leaves_the_exit_code(shell, model_dir):
    shell.mode("dies")
    assert shell("run", model_dir, "--detach").returncode == 4
    for words, code in (
        (("plan", model_dir), 0),
        (("plan", model_dir, "--python", "/no/such/python"), 3),
        (("status", model_dir), 4),
    ):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write) as nobody:
            done = subprocess.run(
                [sys.executable, "-m", "flagscale_serve.cli", *words],
                stdout=nobody,
                stderr=nobody,
                env={**os.environ, **shell.env, "PYTHONUNBUFFERED": ""},
                cwd=shell.home,
                timeout=shell.patience_s,
                check=False,
            )
        assert done.returncode == code


def test_plan_shows_everything_and_starts_nothing(shell, model_dir):
    done = shell("plan", model_dir)
    assert done.returncode == 0, done.stderr
    assert "ready when POST http://127.0.0.1" in done.stdout
    assert "HF_HUB_OFFLINE=1" in done.stdout
    assert not (shell.home / "state").exists()
    as_json = shell("plan", model_dir, "--json")
    assert json.loads(as_json.stdout)["processes"][0]["name"] == "model"


def test_a_router_chooses_as_it_is_told(shell, serve_file, model_dir):
    item = f"serve_id: a, engine: vllm, engine_args: {{model: {model_dir}}}, resources: {{num_replicas: 2}}"
    path = serve_file(f"- {{{item}}}")
    for words, policy in (((), "power_of_two"), (("--policy", "cache_aware"), "cache_aware")):
        processes = json.loads(shell("plan", path, "--json", *words).stdout)["processes"]
        argv = next(one["argv"] for one in processes if one["name"] == "a-router")
        assert argv[argv.index("--policy") + 1] == policy


def test_plan_of_a_model_that_is_not_whole_is_shown_and_exits_2(shell, model_dir):
    (model_dir / "model.safetensors").write_bytes(b"")
    done = shell("plan", model_dir, "--json")
    assert json.loads(done.stdout)["kind"] == "serve"
    assert done.returncode == 2
    assert "cut short" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "no/such/thing"], 2, "no such model directory, serve file, recipe or run"),
        (["run", "Qwen/Qwen3-0.6B"], 2, "`hf download Qwen/Qwen3-0.6B --local-dir DIR`"),
        (["run", "missing.yaml"], 2, "missing.yaml"),
        (["status", "missing.yaml"], 2, "missing.yaml"),
        (["run"], 2, "required"),
        (["run", "{model}", "a.b=c"], 2, "a: unknown key"),
        (["run", "{model}", "max_modl_len=64"], 2, "did you mean max_model_len?"),
        (
            ["run", "{model}", "--max-model-len", "64"],
            2,
            "written max_model_len=VALUE behind a model, and ++serve.0.engine_args.max_model_len=VALUE",
        ),
        (["run", "--config-path", "conf", "--config-name=x"], 2, "run CONFIG_PATH/CONFIG_NAME.yaml"),
        (["serve", "{model}"], 2, "no command 'serve': use `flagscale-serve run`"),
        (["tune", "{model}"], 2, "required: --try"),
        (["chat", "{model}", "--complete"], 2, "message: nothing to say"),
        ([], 2, "Serve language models"),
        (["run", "{model}", "--port", "70000"], 2, "70000"),
        (["plan", "{model}", "--policy", "round_robin"], 2, "policy: round_robin: no router is started"),
        (
            ["plan", "{model}", "--policy", "cheapest"],
            2,
            "policy: 'cheapest': unknown: give one of power_of_two",
        ),
        (["run", "{model}", "--max-restarts", "-1"], 2, "max_restarts -1"),
        (["run", "{model}", "--engine", "llamafile"], 2, "llamafile"),
        (["run", "{model}", "--python", "/no/such/python"], 3, "/no/such/python"),
        (["run", "{model}", "--python", "/bin/true"], 3, "give --python the interpreter"),
        (["run", "{model}", "--port", "0"], 2, "give 1 to 65535"),
        (["run", ""], 2, "empty: give a value, or leave it out"),
        (["run", "{model}", "--host", ""], 2, "--host: empty"),
        (["run", "{model}", "--python", " "], 2, "--python: empty"),
        (["run", "{model}", "--engine", ""], 2, "--engine: empty"),
        (["run", "{model}", "--run-dir", ""], 2, "--run-dir: empty"),
        (["run", "{model}", "--run-dir", "{model}"], 2, "holds other files: give --run-dir a new or empty"),
        (["run", "{model}", "--no-wait"], 2, "add --detach, or leave it out"),
        (["logs", "-n", "-1"], 2, "give a whole number, 0 or more"),
        (["stop", ""], 2, "empty"),
        (["stop", "--grace", "-1"], 2, "give seconds, 0 or more"),
        (["stop", "--grace", "nan"], 2, "'nan': give a number"),
        (["chat", "http://[::1", "-m", "x"], 2, "not an address: write it as http://HOST:PORT"),
        (["chat", "http://", "-m", "x"], 2, "not an address"),
        (["chat", "http://127.0.0.1:99999", "-m", "x"], 2, "not an address"),
        (["chat", "-m", "x", "--temperature", "nan"], 2, "'nan': give a number"),
        (["chat", "-m", " "], 2, "message: nothing to say"),
        (["chat", "-m", "\udcff"], 2, "message: not UTF-8 text"),
        (
            ["chat", "http://127.0.0.1:1", "-m", "x", "--api-key", "k\u00e9y"],
            2,
            "api_key: holds a line break",
        ),
        (["chat", "http://127.0.0.1:1", "-m", "x", "--api-key", "key\n"], 2, "api_key: holds a line break"),
        (["bench", "http://127.0.0.1:1", "--api-key", "k\u00e9y"], 2, "api_key: holds a line break"),
        (["bench", "http://127.0.0.1:1", "--warmups", "-1"], 2, "num_warmups: -1: 0 or more is needed"),
        (["generate", "{model}/config.json", "out", "--system", ""], 2, "system: nothing to say"),
        (["bench", "http://127.0.0.1:1", "--out", "/proc/x"], 2, "out: /proc/x"),
        (["generate", "in", "out", "--temperature", "hot"], 2, "'hot': give a number"),
        (["bench", "--concurrency", "1,,2"], 2, "'1,,2': give whole numbers, such as 1,8,32"),
        (["status"], 3, "no service is running"),
        (["status", "{model}"], 3, "no run of this model is known"),
        (["stop", "{model}"], 3, "no run of this model is known"),
    ],
)
def test_mistakes_are_told_without_a_traceback(shell, model_dir, words, code, message):
    done = shell(*(word.format(model=model_dir) for word in words))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert shell.engine_pids() == []


def test_an_engine_that_is_not_installed_is_named_with_its_cure(shell, model_dir):
    shell.env["FAKE_MISSING"] = "fastapi"
    done = shell("run", model_dir)
    assert done.returncode == 3
    assert (
        "has no fastapi: install it there with `pip install 'flagscale-serve[transformers]'`" in done.stderr
    )


def test_an_engine_is_found_on_the_python_path_but_not_in_the_working_directory(shell, model_dir):
    for name in ("vllm", "torch"):
        (shell.home / name).mkdir()
        (shell.home / name / "__init__.py").touch()
    (shell.home / "vllm-9.9.dist-info").mkdir()
    (shell.home / "vllm-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n"
    )
    words = ("plan", model_dir, "--engine", "vllm", "--python", sys.executable)
    here = shell(*words)
    assert here.returncode == 3
    assert "has no vllm" in here.stderr
    shell.env["PYTHONPATH"] = os.pathsep.join([str(shell.home), os.environ.get("PYTHONPATH", "")])
    assert shell(*words).returncode == 0


def test_yaml_mistakes_have_a_place(shell, serve_file):
    path = serve_file("- serve_id: a\n  engine_args: {model: /m, max_modellen: 5}\n")
    done = shell("run", path)
    assert done.returncode == 2
    assert "demo.yaml:2:" in done.stderr
    assert "max_model_len" in done.stderr


def test_a_head_size_without_cpu_kernel_is_refused_before_start(shell, model_dir):
    (model_dir / "config.json").write_text(json.dumps({"architectures": ["X"], "head_dim": 16}))
    done = shell("run", model_dir, "--engine", "vllm")
    assert done.returncode == 2
    assert "head_dim: 16: vLLM on a CPU has attention for 32, 64" in done.stderr


def test_a_file_is_run_in_its_own_folder_and_found_again(shell, serve_file, model_dir):
    path = serve_file(
        f"- serve_id: one\n  engine_args: {{model: {model_dir}}}\n",
        experiment="cmds:\n  before_start: export FROM_USER=yes\n",
    )
    done = shell("run", path, "serve.0.engine_args.served_model_name=my-name", "--detach")
    assert done.returncode == 2  # a key that the file lacks is added with `+`
    done = shell("run", path, "+serve.0.engine_args.served_model_name=my-name", "--detach")
    assert done.returncode == 0, done.stderr
    status = shell.the_status(path)
    assert status["run_dir"].startswith(str(shell.home / "outputs" / "runs" / "2"))
    assert (shell.home / "outputs" / "runs" / "latest").resolve() == shell.home / status["run_dir"]
    assert status["instances"][0]["model"] == "my-name"
    assert shell.engine_argv()[1:3] == [str(model_dir), "my-name"]
    assert shell("stop", path).returncode == 0


def test_the_recipe_asks_for_the_model(shell):
    from importlib.resources import files

    recipe = files("flagscale_serve").joinpath("recipes/qwen3/conf/0_6b.yaml")
    done = shell("plan", recipe)
    assert done.returncode == 2
    assert "serve.0.engine_args.model" in done.stderr
    assert "required" in done.stderr


def test_options_of_a_model_are_those_of_a_file(shell, model_dir):
    words = ("max-model-len=64", "served_model_name=mine", "serve.0.engine_args.dtype=float32")
    done = shell("plan", model_dir, *words, "--engine", "vllm", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    (argv,) = (one["argv"] for one in plan["processes"])
    said = [argv[argv.index(name) + 1] for name in ("--max-model-len", "--served-model-name", "--dtype")]
    assert said == ["64", "mine", "float32"]
    assert str(model_dir) in argv
    places = [row["place"] or "" for row in plan["facts"]["instances"][0]["options"]]
    assert any("max_model_len=64" in place for place in places)
    # A run is found by its model, whatever options it has.
    assert shell("run", model_dir, *words, "--detach").returncode == 0
    status = shell.the_status(model_dir, *words)
    assert (status["name"], status["instances"][0]["model"]) == (model_dir.name, "mine")
    assert status["run_dir"].startswith(shell.env["FLAGSCALE_STATE_DIR"])
    assert shell("stop", model_dir).returncode == 0
