"""The command line: output, exit codes, and no traceback for anybody's mistake."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flagscale_config import cli, command

WANDB = "+experiment.envs.WANDB_API_KEY=abc123"


def call(*words, env=None):
    """Run the command as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "flagscale_config.cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )


def test_check_of_a_good_file(tiny, capsys):
    assert cli.main(["check", tiny]) == 0
    assert capsys.readouterr().out == "conf/tiny.yaml: ok\n"


def test_check_of_a_bad_file_lists_everything(tiny, capsys):
    layers, unknown = "train.model.num_layers", "train.model.lrr"
    assert cli.main(["check", tiny, f"{layers}=x", f"+{unknown}=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"error: override '+{unknown}=1': {unknown}: unknown key; did you mean lr? [config/unknown-key]",
        f"error: override '{layers}=x': {layers}: must be an integer ('x' given) [config/value]",
        f"{tiny}: 2 errors; for more: flagscale-config explain config/unknown-key",
    ]


def test_an_empty_name_and_an_override_without_key_are_named(tiny, capsys):
    assert cli.main(["check", ""]) == 2
    assert "the name of the file is empty" in capsys.readouterr().err
    assert cli.main(["check", tiny, "=3"]) == 2
    assert "the key is missing" in capsys.readouterr().err


def test_check_as_json(tiny, capsys):
    assert cli.main(["check", "--json", tiny, "+train.model.lrr=1"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    (problem,) = found["problems"]
    assert problem == {
        "code": "config/unknown-key",
        "severity": "error",
        "key": "train.model.lrr",
        "message": "unknown key; did you mean lr?",
        "given": None,
        "allowed": [],
        "suggestion": "lr",
        "file": "",
        "line": 0,
        "column": 0,
        "override": "+train.model.lrr=1",
    }


def test_show_prints_values_and_origins(tiny, capsys):
    assert cli.main(["show", tiny, "--origin", "train.model.num_layers=4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert 'name: "qwen3-tiny"    # conf/tiny.yaml:3:3' in out
    assert "train.options.num_layers: 4    # override 'train.model.num_layers=4'" in out
    assert "train.options.lr: 0.001    # conf/train/tiny.yaml:14:30" in out
    assert "runner.nproc_per_node: 2    # conf/tiny.yaml:7:42" in out


def test_show_all_tells_defaults_from_values(tiny, capsys):
    assert cli.main(["show", tiny, "--origin", "--all"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "runner.ray_port: 6379    # default" in out
    assert "runner.nnodes: 1    # conf/tiny.yaml:7:31" in out
    assert not any(line.startswith("cwd") and "#" in line and "default" not in line for line in out)


def test_show_as_json_holds_the_experiment(tiny, capsys):
    assert cli.main(["show", tiny, "--json", "--origin"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train"]["options"]["num_layers"] == 2
    assert found["origins"]["train.options.num_layers"] == "conf/train/tiny.yaml:5:3"


def test_show_masks_secrets(tiny, capsys):
    words = [
        "show",
        tiny,
        WANDB,
        "+experiment.envs.HF_TOKEN=hf_x",
        "+experiment.envs.TOKENIZERS_PARALLELISM=false",
    ]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "abc123" not in out
    assert "hf_x" not in out
    assert 'envs.WANDB_API_KEY: "***"' in out
    assert 'envs.TOKENIZERS_PARALLELISM: "False"' in out


def test_overrides_and_options_may_be_mixed(tiny, capsys):
    assert cli.main(["show", tiny, "experiment.seed=1", "--json", "experiment.exp_name=x"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seed"], found["name"]) == (1, "x")
    assert cli.main(["show", tiny, "--nonsense"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_deletions_are_overrides(tiny, capsys):
    assert cli.main(["show", tiny, "--json", "~experiment.seed"]) == 0
    assert "seed" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["check", "nothing.yaml"], 2, "error: nothing.yaml: no such file; check the path"),
        (["show", "nothing.yaml"], 2, "error: nothing.yaml: no such file; check the path"),
        (["schema", "nothing"], 2, "invalid choice"),
        (["nonsense"], 2, "invalid choice"),
        ([], 2, "required"),
    ],
)
def test_mistakes_end_with_a_line(words, code, text, tiny):
    done = call(*words)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version_need_nothing(tiny):
    assert call("--version").stdout.startswith("flagscale-config 0.")
    done = call("--help")
    assert done.returncode == 0
    for verb in ("check", "show", "schema", "recipes"):
        assert verb in done.stdout


def test_every_verb_has_help_with_examples_that_run(tiny, project, capsys, monkeypatch):
    project({"conf/small.yaml": Path(tiny).read_text()})
    ran = 0
    for verb in ("check", "show", "explain", "diff", "schema", "migrate", "models", "new", "recipes"):
        assert cli.main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert "exit codes: 0 done" in out
        examples = [line.split()[1:] for line in out.splitlines() if line.startswith("  flagscale-config ")]
        assert examples, verb
        for words in examples:
            if not {"new", ">", "conf/*.yaml"} & set(words):  # a recipe, and what a shell does
                assert cli.main(words) == 0, words
                ran += 1
    assert ran > 10


def test_schema_is_compared_with_a_file(tiny, tmp_path, capsys):
    assert cli.main(["schema", "experiment"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "schema.json"
    path.write_text(text)
    assert cli.main(["schema", "experiment", "--check", str(path)]) == 0
    path.write_text(text.replace("qwen", "x").replace('"title": "Train"', '"title": "Trian"'))
    assert cli.main(["schema", "experiment", "--check", str(path)]) == 2
    assert "differs from the contract" in capsys.readouterr().err
    assert cli.main(["schema", "experiment", "--check", str(tmp_path / "none.json")]) == 2


def run_for_nobody(*words, stderr):
    """Run a command whose output goes into a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        return subprocess.run(
            [sys.executable, "-m", "flagscale_config.cli", *words],
            stdout=out,
            stderr=out if stderr is subprocess.STDOUT else stderr,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # where it is set, nothing is left for the exit
            timeout=120,
            check=False,
        )


@pytest.mark.parametrize("words", [("schema", "experiment"), ("--help",)])
def test_a_closed_pipe_is_quiet(words):
    done = run_for_nobody(*words, stderr=subprocess.PIPE)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("schema", "experiment"), 0),
        (("--help",), 0),
        (("show", "/no/such/file.yaml"), 2),
        (("--debug", "show", "/no/such/file.yaml"), 2),
        (("--no-such-option",), 2),
        (("check", "/no/such/file.yaml"), 2),
        (("check", "/no/such/file.yaml", "/nor/this.yaml", "--json"), 2),
    ],
)
def test_a_closed_pipe_for_output_and_errors_leaves_the_exit_code(words, code):
    assert run_for_nobody(*words, stderr=subprocess.STDOUT).returncode == code


def test_a_closed_pipe_does_not_hide_that_a_later_file_is_wrong(tiny):
    for more in ((), ("--json",), ("--quiet",)):
        assert (
            run_for_nobody("check", tiny, "/no/such/file.yaml", *more, stderr=subprocess.PIPE).returncode == 2
        )


def test_a_full_disk_behind_the_output_is_named():
    with Path("/dev/full").open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "flagscale_config.cli", "schema", "experiment"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.stderr == (
        "error: writing: No space left on device: the output is not whole: make room and run again\n"
    )
    assert done.returncode == 4


def test_letters_that_the_locale_lacks_are_escaped():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    code = (
        "from flagscale_config import command; raise SystemExit(command.run(lambda _: print('\\xfc') or 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **plain},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("\\xfc\n", "", 0)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_bug(closed, tiny):
    line = f'"{sys.executable}" -m flagscale_config.cli check {tiny} {closed}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stderr, done.returncode) == ("", 0)


class Refused(Exception):
    exit_code = 3


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Refused("not found\nat all"), 3, "error: not found\nerror: at all\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(2), 2, ""),
        (SystemExit("no"), 2, "error: no\n"),
        (
            RuntimeError("odd"),
            1,
            "error: bug in flagscale: RuntimeError: odd; run again with --debug and report it\n",
        ),
    ],
)
def test_the_frame_maps_exceptions_to_exit_codes(error, code, text, capsys):
    def main(words):
        raise error

    assert command.run(main, []) == code
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback_and_is_not_passed_on(capsys):
    seen = []

    def main(words):
        seen.append(words)
        raise Refused("x")

    assert command.run(main, ["a", "--debug", "b", "--", "--debug"]) == 3
    assert seen == [["a", "b", "--", "--debug"]]
    assert "Traceback" in capsys.readouterr().err


def test_debug_by_environment(capsys, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_DEBUG", "1")

    def main(words):
        raise Refused("x")

    command.run(main, [])
    assert "Traceback" in capsys.readouterr().err


def test_the_frame_runs_in_other_threads_too():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(command.run(lambda words: 0, [])))
    thread.start()
    thread.join(60)
    assert codes == [0]
