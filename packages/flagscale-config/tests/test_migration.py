"""Old files are rewritten where they lie: comments and layout stay, the meaning stays, twice is once."""

import json

import pytest

from flagscale_config import ConfigError, check, cli, load, migrate

OLD = {
    "conf/old.yaml": """\
# An old file
defaults:
  - train: old   # the task

experiment:
  exp_name: old
  exp_dir: ./outputs   # where
  load: None
  task: {type: train, backend: megatron}
  deploy:
    port: 8000   # a port
    use_fs_serve: false
  runner:
    type: torchrun
    nnodes: 1

    nproc_per_node: 8
  # set the environment
  envs:
    A: ${env:HOME}
    HF_TOKEN: abcdefgh
  shell_cmds: null

action: run
""",
    "conf/train/old.yaml": """\
system:
  micro-batch-size: 2
  checkpoint:
    use_dist_ckpt: false   # gone
    save_interval: 100
    load: ${experiment.load}
  use_mcore_models: true
model:
  num_layers: 4   # layers
  hidden_size: 256
  num_attention_heads: 4
  seq_length: 512
  max_position_embeddings: 512
  seq_length: 512
  ffn_hidden_size: None
  train_iters: 100
  optimizer: {lr-scheduler: {min-lr: 1e-5, lr: 1e-4}}
data:
  data_path: ${data_path:??}
  tokenizer: {legacy_tokenizer: true, tokenizer_type: QwenTokenizerFS, tokenizer_path: "${path:??}"}
""",
}
NEW = {
    "conf/old.yaml": """\
# An old file
defaults:
  - train: old   # the task
  - _self_

experiment:
  exp_name: old
  exp_dir: ./outputs   # where
  load: null
  task: {type: train, backend: megatron}
  runner:
    backend: torchrun
    nnodes: 1

    nproc_per_node: 8
    deploy:
      port: 8000   # a port
      use_fs_serve: false
  # set the environment
  envs:
    A: ${oc.env:HOME}
    HF_TOKEN: abcdefgh

action: run
""",
    "conf/train/old.yaml": """\
system:
  micro_batch_size: 2
  checkpoint:
    save_interval: 100
    load: ${experiment.load}
model:
  num_layers: 4   # layers
  hidden_size: 256
  num_attention_heads: 4
  seq_length: 512
  max_position_embeddings: 512
  ffn_hidden_size: null
  train_iters: 100
  optimizer: {lr-scheduler: {min_lr: 1e-5, lr: 1e-4}}
data:
  data_path: ???
  tokenizer: {tokenizer_type: HuggingFaceTokenizer, tokenizer_model: '???'}
""",
}
GIVEN = ("train.data.data_path=corpus", "train.data.tokenizer.tokenizer_path=here")


@pytest.fixture
def old(project):
    project(OLD)
    return "conf/old.yaml"


def texts(folder):
    return {name: (folder / name).read_text() for name in OLD}


def same(one, two):
    """Compare experiments, without what tells about the files themselves."""
    skipped = {"notes", "shortcuts"}
    return one.model_dump(exclude=skipped) == two.model_dump(exclude=skipped)


def test_old_spellings_are_rewritten_and_nothing_else(old, tmp_path):
    changed = migrate(old, write=True)
    assert texts(tmp_path) == NEW
    assert [each.path.name for each in changed] == ["old.yaml", "old.yaml"]
    assert not [note for note in check(old) if note.severity == "note"]


def test_twice_is_once(old, tmp_path):
    migrate(old, write=True)
    assert migrate(old, write=True) == ()
    assert texts(tmp_path) == NEW


def test_the_result_loads_to_the_same_experiment(old, project):
    mended = OLD["conf/train/old.yaml"].replace("  seq_length: 512\n  ffn", "  ffn")
    project({**OLD, "conf/train/old.yaml": mended})  # a duplicate key is an error, not an experiment
    before = load(old, GIVEN)
    migrate(old, write=True)
    after = load(old, [word.replace("tokenizer_path", "tokenizer_model") for word in GIVEN])
    assert same(before, after)


def test_a_dry_run_shows_the_change_and_writes_nothing(old, tmp_path, capsys):
    assert cli.main(["migrate", old]) == 0
    out = capsys.readouterr().out
    assert "--- conf/old.yaml\n+++ conf/old.yaml\n" in out
    assert "-    A: ${env:HOME}\n+    A: ${oc.env:HOME}\n" in out
    assert "abcdefgh" not in out
    assert "not written; to write: flagscale-config migrate --write conf/old.yaml" in out
    assert texts(tmp_path) == OLD
    assert cli.main(["migrate", old, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "experiment.runner.type: torchrun is a backend" in found[0]["changes"]


def test_the_command_writes_and_says_so(old, tmp_path, capsys):
    assert cli.main(["migrate", "--write", old]) == 0
    assert capsys.readouterr().out.startswith("conf/old.yaml: ")
    assert texts(tmp_path) == NEW
    assert cli.main(["migrate", "--write", old]) == 0
    assert capsys.readouterr().out == "conf/old.yaml: nothing to migrate\n"


def test_other_bytes_stay(project, tmp_path):
    text = (
        "\N{ZERO WIDTH NO-BREAK SPACE}experiment:\r\n  exp_name: x\r\n  task: {type: serve}\r\n  load: None"
    )
    project({"e.yaml": (text + "\r\nserve:\r\n- {serve_id: m}\r\n").encode()})
    migrate("e.yaml", write=True)
    assert (tmp_path / "e.yaml").read_bytes() == (
        text.replace("None", "null") + "\r\nserve:\r\n- {serve_id: m}\r\n"
    ).encode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("runner: {nnodes: 1}, deploy: {port: 1}", "runner: {nnodes: 1, deploy: {port: 1}}"),
        ("deploy: {port: 1}", "runner: {deploy: {port: 1}}"),
        ("shell_cmds: null, seed: 1", "seed: 1"),
        ("seed: 1, shell_cmds: null", "seed: 1"),
        ("runner: {type: torchrun, backend: torchrun}", "runner: {backend: torchrun}"),
        ("runner: {type: torchrun}", "runner: {backend: torchrun}"),
        ("seed: 1, seed: 1", "seed: 1"),
        ("seed: 010, envs: {A: yes, on: off}", "seed: 010, envs: {A: true, on: false}"),
    ],
)
def test_mappings_in_braces_are_edited_too(before, after, project, tmp_path):
    shape = "experiment: {{exp_name: x, task: {{type: serve}}, {}}}\nserve: [{{serve_id: m}}]\n"
    project({"e.yaml": shape.format(before)})
    migrate("e.yaml", write=True)
    assert (tmp_path / "e.yaml").read_text() == shape.format(after)


def test_a_key_given_twice_with_different_values_is_refused(old, project, tmp_path, capsys):
    twice = OLD["conf/train/old.yaml"].replace("  seq_length: 512\n  ffn", "  seq_length: 1024\n  ffn")
    project({**OLD, "conf/train/old.yaml": twice})
    assert cli.main(["migrate", "--write", old]) == 2
    assert capsys.readouterr().err == (
        "error: conf/train/old.yaml:14:3: train.model.seq_length: duplicate key; first given at line 12; "
        "keep one: the values differ, and only you know which is meant [config/duplicate-key]\n"
    )
    assert texts(tmp_path) == {**OLD, "conf/train/old.yaml": twice}


def test_a_block_without_a_runner_gets_one(project, tmp_path):
    head = "experiment:\n  exp_name: x\n  task: {type: serve}\n"
    project({"e.yaml": head + "  deploy:\n    port: 1 # p\nserve: [{serve_id: m}]\n"})
    migrate("e.yaml", write=True)
    assert (tmp_path / "e.yaml").read_text() == (
        head + "  runner:\n    deploy:\n      port: 1 # p\nserve: [{serve_id: m}]\n"
    )


def test_a_mapping_that_loses_its_only_key_stays_a_mapping(project, tmp_path):
    text = OLD["conf/train/old.yaml"].replace("    save_interval: 100\n    load: ${experiment.load}\n", "")
    project({**OLD, "conf/train/old.yaml": text})
    migrate("conf/old.yaml", write=True)
    assert "  checkpoint:\n    {}   # gone\n" in (tmp_path / "conf/train/old.yaml").read_text()


def test_a_file_that_cannot_be_written_leaves_all_as_they_were(old, tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "conf"))

    monkeypatch.setattr("flagscale_config.migration.tempfile.mkstemp", refuse)
    with pytest.raises(ConfigError, match="Permission denied; nothing was changed"):
        migrate(old, write=True)
    assert texts(tmp_path) == OLD
    assert [path.name for path in (tmp_path / "conf").iterdir() if path.name.startswith(".")] == []


def test_files_that_cannot_be_read_are_refused(project, capsys):
    project({"e.yaml": "a: [\n"})
    assert cli.main(["migrate", "e.yaml"]) == 2
    assert "[config/syntax]" in capsys.readouterr().err
