"""The command line without a training: words, exit codes, messages."""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec

import pytest

from flagscale_hw.testing import Faults, faked_host
from flagscale_train import findings
from flagscale_train.cli import main, parser
from flagscale_train.findings import examine


@dataclass
class Place:
    """Where a tensor lies, as torch's checkpoint metadata have it."""

    relative_path: str
    offset: int
    length: int


@dataclass
class Metadata:
    """Stands for torch's own."""

    storage_data: dict


@pytest.fixture(autouse=True)
def _as_if_installed(monkeypatch):
    """These tests run where torch and megatron are absent; only planning needs them named."""
    real = findings.importlib.util.find_spec
    monkeypatch.setattr(
        findings.importlib.util,
        "find_spec",
        lambda name: ModuleSpec(name, None) if name in ("torch", "megatron") else real(name),
    )


def said(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_plan_shows_what_would_run_and_starts_nothing(experiment_file, tmp_path, capsys):
    assert main(["plan", str(experiment_file)]) == 0
    out, _ = said(capsys)
    assert "tiny: 1 processes on" in out
    assert "--num-layers 2" in out
    assert "-m flagscale_train.worker" in out
    assert not (tmp_path / "exp").exists()


def test_what_the_chips_tool_did_not_say_is_a_warning(experiment_file, capsys, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_HW_TIMEOUT", "0.5")
    with faked_host("nvidia", 8, faults=Faults(hang=True)):
        assert main(["plan", str(experiment_file), "--json"]) == 0
    out, err = said(capsys)
    assert err.startswith("warning: nvidia: nvidia-smi: no answer within 0.5 s; it was killed")
    assert err == f"warning: {json.loads(out)['facts']['warnings'][0]}\n"


def test_plan_as_json_is_the_plan(experiment_file, capsys):
    assert main(["plan", str(experiment_file), "train.model.train_iters=3", "--json"]) == 0
    made = json.loads(said(capsys)[0])
    argv = made["processes"][0]["argv"]
    assert argv[argv.index("--train-iters") + 1] == "3"


def test_overrides_may_stand_after_options(experiment_file, capsys):
    assert main(["plan", "--json", str(experiment_file), "--debug", "train.model.train_iters=3"]) == 0
    assert '"--train-iters",\n        "3"' in said(capsys)[0]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["plan", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["status", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["plan", "EXPERIMENT", "train.model.num_layer=3"], 2, "num_layer"),
        (["plan", "EXPERIMENT", "experiment.task.type=serve"], 2, "serve"),
        (["plan", "EXPERIMENT", "train.data.data_path=/none/x"], 2, "/none/x.bin is missing"),
        (["plan", "EXPERIMENT", "+train.system.load=/none/ckpt"], 2, "/none/ckpt: no whole checkpoint"),
        (["plan", "EXPERIMENT", "--jsno"], 2, "unrecognized arguments: --jsno"),
        (["status", "EXPERIMENT"], 3, "never run"),
        (["stop", "EXPERIMENT"], 3, "never run"),
        (["logs", "EXPERIMENT"], 3, "never run"),
        (["status", "FOLDER"], 3, "no run in it"),
        (["logits", "EXPERIMENT", "--tokens", "none.json", "--output", "o"], 2, "none.json: no such file"),
        (["fly"], 2, "invalid choice"),
    ],
)
def test_a_mistake_is_one_clear_line_and_a_code(experiment_file, tmp_path, capsys, words, code, text):
    places = {"EXPERIMENT": str(experiment_file), "FOLDER": str(tmp_path)}
    assert main([places.get(word, word) for word in words]) == code
    _, err = said(capsys)
    assert text in err
    assert "Traceback" not in err


def test_logits_without_a_checkpoint(experiment_file, tmp_path, capsys):
    tokens = tmp_path / "t.json"
    for text, code, why in (
        ("[[1, 2], [3, 4]]", 3, "no whole checkpoint"),
        ("[[1, 2], [3]]", 2, "equally long"),
        ("[[1, -2]]", 2, "at least 0"),
        ("[]", 2, "non-empty"),
        ("{", 2, "not JSON"),
        (json.dumps([list(range(33))]), 2, "at most 32"),
    ):
        tokens.write_text(text)
        assert (
            main(["logits", str(experiment_file), "--tokens", str(tokens), "--output", str(tmp_path / "o")])
            == code
        )
        assert why in said(capsys)[1]


def test_logits_that_cannot_be_written_are_refused_before_they_are_computed(
    experiment_file, tmp_path, capsys
):
    tokens = tmp_path / "t.json"
    tokens.write_text("[[1]]")
    where = str(tokens / "o")
    assert main(["logits", str(experiment_file), "--tokens", str(tokens), "--output", where]) == 2
    assert f"--output: {where}: cannot be written" in said(capsys)[1]


def test_a_finished_training_says_so_and_starts_nothing(experiment_file, tmp_path, capsys):
    data = Place("__0_0.distcp", 0, 10)
    newest = tmp_path / "exp" / "checkpoints" / "iter_0000020"
    newest.mkdir(parents=True)
    (newest / ".metadata").write_bytes(pickle.dumps(Metadata({"a": data})))
    (newest / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (newest / "__0_0.distcp").write_bytes(bytes(10))
    assert main(["run", str(experiment_file)]) == 0
    out, _ = said(capsys)
    assert f"trained to its last step already: {newest}" in out
    assert "larger train.model.train_iters" in out
    assert not (tmp_path / "exp" / "runs").exists()


def test_missing_packages_are_named_with_the_cure(experiment_file, capsys, monkeypatch):
    monkeypatch.setattr(findings.importlib.util, "find_spec", lambda name: None)
    assert main(["run", str(experiment_file)]) == 2
    assert "pip install 'flagscale-train[megatron]'" in said(capsys)[1]


def test_weighted_data_paths_are_prefixes_not_weights(experiment_file, tmp_path):
    from flagscale_config import load

    data = tmp_path / "data" / "counting"
    experiment = load(experiment_file, [f"train.data.data_path=[30,{data},70,{tmp_path}/none]"])
    problems = [text for text in examine(experiment).problems if "data_path" in text]
    assert len(problems) == 1
    assert "none.bin is missing" in problems[0]


def test_list_is_empty_at_first(capsys):
    assert main(["list", "--json"]) == 0
    assert json.loads(said(capsys)[0]) == []


def test_the_flags_are_these():
    """Removing or renaming one of these breaks users: change this list on purpose only."""

    def flags(of):
        found = {flag for action in of._actions for flag in action.option_strings if flag.startswith("--")}
        return sorted(found - {"--help"})

    def verbs(of):
        return next(action.choices for action in of._actions if hasattr(action, "choices") and action.choices)

    assert {name: flags(verb) for name, verb in verbs(parser()).items()} == {
        "plan": ["--as", "--chip", "--claim", "--image", "--json", "--slurm"],
        "run": ["--chip", "--detach", "--on", "--slurm"],
        "stop": ["--grace"],
        "logits": ["--load", "--output", "--tokens"],
        "status": ["--json"],
        "logs": ["--follow"],
        "report": ["--output"],
        "list": ["--json"],
        "data": [],
    }
    assert {name: flags(verb) for name, verb in verbs(verbs(parser())["data"]).items()} == {
        "tokenize": [
            "--eod",
            "--json",
            "--key",
            "--no-eod",
            "--output",
            "--overwrite",
            "--tokenizer",
            "--workers",
        ],
        "inspect": ["--check", "--count", "--json", "--tokenizer"],
        "merge": ["--output", "--overwrite"],
        "train-tokenizer": ["--json", "--key", "--output", "--overwrite", "--vocab-size"],
    }


def test_help_imports_no_framework():
    probe = (
        "import sys; from flagscale_train.cli import parser; parser().format_help(); "
        "print([m for m in ('torch', 'megatron', 'pydantic', 'numpy', 'tokenizers', 'rich') if m in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
