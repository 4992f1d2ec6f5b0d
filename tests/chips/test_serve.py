"""serve x chip: every recipe plans on the chip's host with the chip's engine, or says why it cannot."""

import re
from collections import Counter
from pathlib import Path

from flagscale_config import load
from flagscale_hw import Node, Target, runtime
from flagscale_serve import InvalidService, plan

TWO = Path(__file__).with_name("two_services.yaml")
OURS = (
    "PYTHON",
    "HF_",
    "VLLM_NO_USAGE",
    "OMP_NUM",
    "VLLM_API_KEY",
    "VLLM_CPU",
    "VLLM_ENABLE_V1",
    "VLLM_HOST_IP",
)
"""Beginnings of variables that do not depend on the chip, or only on its being a CPU."""
OF_NO_CHIP = {
    "need more devices": re.compile(
        r"devices: \d+ asked for|\d+ devices asked for|resources\.num_gpus|no accelerator was found"
    ),
    "need an accelerator": re.compile(r"engine `sglang`: needs an accelerator"),
}
"""Refusals that have nothing to do with the kind of chip."""


def test_cell(chip, machine, experiments, golden, record_property):
    facts = {"collective_backend": runtime(chip).collective_backend, "vllm": runtime(chip).to_dict()["vllm"]}
    counts = Counter()
    unexpected = []
    for name, experiment in experiments("serve").items():
        try:
            made = plan(experiment, machine, nodes=hosts_of(experiment, machine), python="python")
        except InvalidService as refusal:
            kinds = [kind for kind, text in OF_NO_CHIP.items() if text.search(str(refusal))]
            unexpected += [] if kinds else [f"{name}: {refusal}"]
            counts.update(kinds[:1])
            continue
        counts["planned"] += 1
        examine(facts, made, machine, experiment, name)
    assert unexpected == []
    assert counts["planned"] > 0
    facts["two services"] = two_services(machine)
    golden("serve", facts)
    record_property("note", ", ".join(f"{number} {what}" for what, number in counts.items() if number))


def hosts_of(experiment, machine):
    """Let every host of an experiment be as this one."""
    count = experiment.runner.num_nodes or 1
    if experiment.runner.hostfile is None:
        return ()
    return tuple(Node(target=Target(name=f"host-{rank}"), machine=machine) for rank in range(count))


def examine(facts, made, machine, experiment, name):
    variable = runtime(machine.chip).visible_devices_variable
    engines = {instance["engine"] for instance in made.facts["instances"]}
    asked = {item.engine for item in experiment.serve or () if item.engine} | {experiment.task.backend} - {
        None
    }
    if not asked:
        facts.setdefault("engine", sorted(engines))
        assert facts["engine"] == sorted(engines), name
    taken = [process.env[variable].split(",") for process in made.processes if variable in process.env]
    numbers = [number for numbers in taken for number in numbers]
    assert len(numbers) == len(set(numbers)) <= len(machine.devices), f"{name}: a device is given twice"
    for process in made.processes:
        chips = {
            key: value
            for key, value in process.env.items()
            if key not in experiment.envs
            and key not in (variable, "CUDA_DEVICE_ORDER")
            and not key.startswith(OURS)
        }
        if engines == {"vllm"} and machine.chip != "cpu":
            assert facts.setdefault("environment", chips) == chips, name


def two_services(machine):
    """Which devices two services of 4 and 2 get, or why they cannot run here."""
    variable = runtime(machine.chip).visible_devices_variable
    try:
        made = plan(load(TWO), machine, python="python")
    except InvalidService as refusal:
        return str(refusal)
    return {process.name: process.env[variable] if variable else "" for process in made.processes}
