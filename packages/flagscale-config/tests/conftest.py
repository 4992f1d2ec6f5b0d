import textwrap
from pathlib import Path

import pytest

TINY = {
    "conf/tiny.yaml": """
        defaults: [_self_, {train: tiny}]
        experiment:
          exp_name: qwen3-tiny
          exp_dir: outputs/${experiment.exp_name}
          seed: 42
          task: {type: train, backend: megatron}
          runner: {backend: torchrun, nnodes: 1, nproc_per_node: 2}
          envs: {OMP_NUM_THREADS: 1}
        action: run
        hydra: {run: {dir: "${experiment.exp_dir}/hydra"}}
        """,
    "conf/train/tiny.yaml": """
        system:
          tensor_model_parallel_size: 1
          checkpoint: {save_interval: 10}
        model:
          num_layers: 2
          hidden_size: 64
          num_attention_heads: 4
          seq_length: 128
          max_position_embeddings: 128
          micro_batch_size: 1
          global_batch_size: 4
          train_iters: 10
          norm_epsilon: 1e-5
          optimizer: {lr_scheduler: {lr: 1e-3}}
        data:
          data_path: corpus
        """,
}


COVERED = pytest.StashKey[list[str]]()
"""How many options of the real parsers the tables hold, one line each; printed at the end of a run."""


@pytest.fixture
def covered(request):
    """Return the list of lines to print at the end."""
    return request.config.stash.setdefault(COVERED, [])


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(COVERED, []):
        terminalreporter.write_line(f"options in the table: {line}")


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files below a folder and return the path of the first."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else textwrap.dedent(content).lstrip("\n").encode()
        path.write_bytes(raw)
    return folder / next(iter(files))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that writes files into an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda files: write(tmp_path, files)


@pytest.fixture
def tiny(project):
    """Return the path of a small training experiment, relative to the working directory."""
    project(TINY)
    return "conf/tiny.yaml"


@pytest.fixture
def edited(project):
    """Return a function that writes the small experiment with one text of one file replaced."""

    def edit(name: str, old: str, new: str) -> str:
        assert old in TINY[name]
        project({**TINY, name: TINY[name].replace(old, new)})
        return "conf/tiny.yaml"

    return edit
