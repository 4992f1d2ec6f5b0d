"""train x chip: every recipe plans on the chip's host, or says why it cannot.

The facts that depend on the chip are the same for every recipe, and on record. How many devices a recipe
takes is checked by its own arithmetic, so that recipes may come and go.
"""

import re
from collections import Counter

from flagscale_hw import runtime
from flagscale_train import InvalidInput, plan

REFERENCE = ("qwen3/tiny", "qwen3/0_6b", "llama3/8b")
"""Recipes whose number of devices is on record."""
NOT_OF_THE_CHIP = {
    "CUDA_DEVICE_MAX_CONNECTIONS", "FLAGSCALE_EVENTS", "OMP_NUM_THREADS", "PYTHONSAFEPATH",
    "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM", "FLAGSCALE_PEAK_FLOPS",
}  # fmt: skip
OPTIONS = ("distributed_backend", "transformer_impl")
OF_NO_CHIP = {
    "need more hosts": re.compile(
        r"one copy of the model takes|offers \d+ \w+ devices|no hostfile was followed"
    ),
    "of another trainer": re.compile(r"experiment\.task\.(entrypoint|backend|type)"),
}
"""Refusals that have nothing to do with the chip: the same on every one of them."""


def test_cell(chip, machine, experiments, golden, record_property):
    facts = {"collective_backend": runtime(chip).collective_backend}
    counts = Counter()
    unexpected = []
    for name, experiment in experiments("train").items():
        try:
            made = plan(experiment, machine, python="python")
        except InvalidInput as refusal:
            if refused_for_the_chip(refusal, chip):
                counts["refused"] += 1
                same(facts, "refusal", str(refusal).splitlines()[0], name)
            elif chip == "cpu" and "needs a GPU: remove it to train on a CPU" in str(refusal):
                counts["need a GPU"] += 1
            else:
                kinds = [kind for kind, text in OF_NO_CHIP.items() if text.search(str(refusal))]
                unexpected += [] if kinds else [f"{name}: {refusal}"]
                counts.update(kinds[:1])
            continue
        counts["planned"] += 1
        examine(facts, made, machine, experiment, name)
    assert unexpected == []
    assert counts["planned"] + counts["refused"] > 0
    assert not (counts["planned"] and counts["refused"]), counts
    golden("train", facts)
    record_property("note", ", ".join(f"{number} {what}" for what, number in counts.items() if number))


def refused_for_the_chip(refusal, chip):
    return str(refusal).startswith(f"chip: {chip}: ")


def same(facts, key, value, name):
    assert facts.setdefault(key, value) == value, f"{name}: {key}"


def examine(facts, made, machine, experiment, name):
    (process,) = made.processes
    layout = made.facts["layout"]
    assert layout["processes"] == layout["data"] * layout["tensor"] * layout["pipeline"] * layout["context"]
    if machine.chip != "cpu":
        assert layout["processes"] == (experiment.runner.nproc_per_node or len(machine.devices))
        assert len(made.facts["devices"]) == layout["processes"]
    variable = runtime(machine.chip).visible_devices_variable
    users = {*experiment.envs, *NOT_OF_THE_CHIP}
    selection = {
        key: process.env[key]
        for key in (variable, "CUDA_DEVICE_ORDER")
        if key in process.env and key not in users
    }
    if layout["processes"] < len(machine.devices):
        assert variable in selection, name
    environment = {
        key: value for key, value in process.env.items() if key not in users and key not in selection
    }
    for key, value in environment.items():
        same(facts.setdefault("environment", {}), key, value, name)
    options = made.facts["megatron_options"]
    assert made.facts["collective_backend"] == facts["collective_backend"]
    for key in OPTIONS:
        if key not in experiment.train.options:
            same(facts.setdefault("options", {}), key, options.get(key), name)
    if name in REFERENCE:
        facts.setdefault("reference", {})[name] = {"layout": layout, "selection": selection}
