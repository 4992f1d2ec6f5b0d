"""Trainings for `forked_workers.py`, in the words a plan gives its workers, and what their events say."""

import json

from flagscale_config import load, render_megatron
from flagscale_hw import detect
from flagscale_train.findings import examine
from flagscale_train.logits import reference_options
from flagscale_train.plan import options_for, plan

__all__ = ["curve", "events", "logits_job", "train_job", "worst"]


def train_job(experiment, folder, overrides, *, changes=None, without=()):
    """Describe one training below `folder`.

    Args:
        experiment: file of the experiment.
        folder: where its checkpoints, events and log go.
        overrides: Hydra overrides.
        changes: Megatron options that no override can give.
        without: Megatron options to leave out.
    """
    found = load(experiment, [f"experiment.exp_dir={folder}", *overrides], task="train")
    machine = detect()
    options = options_for(found, machine, examine(found)) | (changes or {})
    for name in ("tensorboard_dir", *without):
        options.pop(name, None)
    folder.mkdir(parents=True, exist_ok=True)
    process = plan(found, machine).processes[0]
    return {
        "name": folder.name,
        "entry": "session",
        "processes": found.runner.nproc_per_node or 1,
        "argv": list(render_megatron(options)),
        "env": {**process.env, "FLAGSCALE_EVENTS": str(folder / "events.jsonl")},
        "log": str(folder / "log"),
    }


def logits_job(experiment, folder, overrides, *, checkpoint, tokens):
    """Describe the computation of a checkpoint's logits by one process, into `folder / "logits"`."""
    found = load(experiment, [f"experiment.exp_dir={folder}", *overrides], task="train")
    options = reference_options(found, detect(), examine(found))
    options |= {"load": str(checkpoint), "no_load_optim": True, "no_load_rng": True}
    asked = folder / "tokens.json"
    asked.write_text(json.dumps(tokens))
    own = [f"--flagscale-tokens={asked}", f"--flagscale-output={folder / 'logits'}"]
    return {
        "name": f"{folder.name}-logits",
        "entry": "logits",
        "processes": 1,
        "argv": [*own, *render_megatron(options)],
        "env": {"FLAGSCALE_PLATFORM": "cpu"},
        "log": str(folder / "logits.log"),
    }


def events(folder, kind):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def curve(folder):
    """Return iteration, loss and gradient norm of each step."""
    return [(step["iteration"], step["loss"], step["grad_norm"]) for step in events(folder, "step")]


def worst(ours, theirs):
    """Return the largest difference between two curves of the same steps."""
    assert [step for step, *_ in ours] == [step for step, *_ in theirs]
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) for mine, other in pairs for a, b in zip(mine, other, strict=True))
