"""What the stand-ins for vendors' plug-ins share: a device type of torch whose work is done by the CPU.

A plug-in must come before Megatron, and before anything asks torch.cuda for a device. What was imported when,
and what the process saw then, goes to the file that `STANDIN_JOURNAL` names.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import Backend, ProcessGroupGloo


def note(what, **seen):
    words = {"what": what, "megatron": "megatron.core" in sys.modules, **seen}
    with Path(os.environ["STANDIN_JOURNAL"]).open("a") as journal:
        journal.write(json.dumps(words) + "\n")


class Device:
    """Like `torch.npu`: what torch.cuda has too, and devices of its own."""

    def __init__(self, count):
        self._count = count

    def is_available(self):
        return self._count > 0

    def device_count(self):
        return self._count

    def __getattr__(self, name):
        return getattr(torch.cuda, name)


def add(name, variable, collectives):
    """Add a device type whose devices are those that `variable` selects, and its collectives."""
    visible = os.environ.get(variable)
    note(f"torch.{name}", visible=visible)
    setattr(torch, name, Device(len(visible.split(",")) if visible else 2))
    Backend.register_backend(collectives, ProcessGroupGloo, devices=["cpu"])


def let_cuda_mean(name):
    """Let torch.cuda mean the device type, as vendors' hooks do: here the CPU once more."""
    from flagscale_train.worker import cpu

    note(f"torch.cuda means {name}")
    for redirect in cpu.REDIRECTS:
        setattr(redirect.owner, redirect.name, redirect.to)
