"""A tiny experiment in FlagScale's two-level layout, and its data."""

import json
import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from flagscale_train.data.indexed import IndexedWriter

sys.path.append(str(Path(__file__).parent))  # for `trainings`, which tests share
VOCAB = 512

EXPERIMENT = """
defaults:
  - _self_
  - train: tiny
experiment:
  exp_name: tiny
  exp_dir: {exp_dir}
  task: {{type: train, backend: megatron}}
  runner: {{nproc_per_node: 1}}
  envs: {{OMP_NUM_THREADS: 1}}
action: run
"""

TRAIN = """
system:
  use_distributed_optimizer: true
  num_workers: 0
  log_interval: 1
  checkpoint: {{save_interval: 5}}
model:
  num_layers: 2
  hidden_size: 64
  ffn_hidden_size: 176
  num_attention_heads: 4
  group_query_attention: true
  num_query_groups: 2
  kv_channels: 16
  qk_layernorm: true
  normalization: RMSNorm
  swiglu: true
  disable_bias_linear: true
  position_embedding_type: rope
  seq_length: 32
  max_position_embeddings: 32
  attention_dropout: 0.0
  hidden_dropout: 0.0
  train_iters: 20
  micro_batch_size: 2
  global_batch_size: 8
  eval_interval: 10
  eval_iters: 1
  optimizer:
    lr: 1.0e-3
    min_lr: 1.0e-4
    lr_warmup_iters: 2
    lr_decay_iters: 25
    lr_decay_style: cosine
    clip_grad: 1.0
data:
  data_path: {data}
  split: 90,10,0
  tokenizer: {{tokenizer_type: NullTokenizer, vocab_size: 512}}
"""


def _write_data(prefix, *, documents=200, seed=1):
    """Write documents that can be learned: each counts up in a small step."""
    chance = random.Random(seed)
    with IndexedWriter(prefix, "H") as writer:
        for _ in range(documents):
            start, step = chance.randrange(VOCAB), chance.randrange(1, 4)
            ids = [(start + step * place) % VOCAB for place in range(chance.randrange(20, 80))]
            writer.add(array("H", ids).tobytes(), [len(ids)])


def _write_experiment(folder):
    """Write the experiment and its data below `folder`; return the experiment file."""
    (folder / "conf" / "train").mkdir(parents=True)
    _write_data(folder / "data" / "counting")
    path = folder / "conf" / "tiny.yaml"
    path.write_text(EXPERIMENT.format(exp_dir=folder / "exp"))
    (folder / "conf" / "train" / "tiny.yaml").write_text(TRAIN.format(data=folder / "data" / "counting"))
    return path


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAGSCALE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def experiment_file(tmp_path):
    return _write_experiment(tmp_path)


@pytest.fixture(scope="session")
def write_experiment():
    return _write_experiment


@pytest.fixture(scope="session")
def run_forked():
    """Run jobs of `forked_workers.py` in one process that imports Megatron once."""

    def run(folder, jobs):
        request = folder / "jobs.json"
        request.write_text(json.dumps(jobs))
        script = Path(__file__).with_name("forked_workers.py")
        done = subprocess.run(
            [sys.executable, script, request], capture_output=True, text=True, timeout=1500, check=False
        )
        logs = "".join(f"\n{job['name']}:\n{tail(Path(job['log']))}" for job in jobs)
        assert done.returncode == 0, f"{done.stderr[-2000:]}{logs}"

    def tail(log):
        lines = log.read_text(errors="replace").splitlines() if log.exists() else ["no log"]
        return "\n".join(line for line in lines[-12:] if "rror" in line)

    return run


@pytest.fixture
def said_by(tmp_path):
    """Run a script in a process of its own, told of a file where its ranks may meet; return its lines."""

    def run(script):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "store"],
            env={**os.environ, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return run


@pytest.fixture(scope="session")
def recorded_experiment():
    """Two runs as they were: one whose supervisor was killed, one that resumed and finished."""
    return Path(__file__).with_name("recorded") / "killed-and-resumed"
