"""What lies behind the first error of a training, for people: the error table.

An error says what a library could not do, rarely why. Each row below knows by which texts one kind of failure
shows itself in torch, NCCL, Megatron and the operating system, what is likely behind it, and what to change.
The first row that fits is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cause", "abort", "explain"]

_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class Cause:
    """A kind of failure that is known."""

    name: str
    """For programs, such as `device-memory`."""
    likely: str
    """What is likely behind it."""
    advice: str
    """What to change."""


_TABLE: tuple[tuple[Cause, tuple[str, ...]], ...] = (
    (
        Cause(
            "device-memory",
            "the memory of a device is full",
            "lower micro_batch_size or seq_length, recompute (recompute_granularity: full), share the "
            "optimizer (use_distributed_optimizer: true), or raise tensor_model_parallel_size or "
            "pipeline_model_parallel_size",
        ),
        (
            r"OutOfMemoryError",
            r"\b(CUDA|HIP|NPU|MUSA|XPU|HPU|MLU) out of memory",
            r"CUBLAS_STATUS_ALLOC_FAILED",
            r"[Cc][Uu][Dd][Aa] (error|failure).*out of memory",
        ),
    ),
    (
        Cause(
            "host-memory",
            "the memory of the host, or the limit of its container, is full; or somebody killed the process",
            "look at `dmesg` or the container's limit; start fewer processes on a host, lower num_workers, "
            "or train a smaller model",
        ),
        (
            r"DefaultCPUAllocator",
            r"[Cc]annot allocate memory|can't allocate memory",
            r"\bMemoryError\b",
            r"std::bad_alloc",
            r"signal 9 \(SIGKILL\)",
            r"exited with code 137\b",
            r"Out of memory: Killed process|oom[-_]kill",
        ),
    ),
    (
        Cause(
            "collective-timeout",
            "a rank did not come to a collective operation in time: it hangs, has died, or works longer than "
            "the others (index of a large dataset, slow disk)",
            "look for the rank that is named nowhere or wrote nothing last; if it only works longer, raise "
            "distributed_timeout_minutes",
        ),
        (
            r"collective operation timeout",
            r"HCCL.*timeout",
            r"NCCL.*timed? ?out",
            r"Timed out waiting \d+ms for (recv|send) operation",
        ),
    ),
    (
        Cause(
            "port-in-use",
            "another process listens on the port at which the processes meet",
            "end that one (`flagscale-train list` shows your runs), or give another "
            "experiment.runner.master_port",
        ),
        (r"EADDRINUSE", r"[Aa]ddress already in use"),
    ),
    (
        Cause(
            "other-model",
            "the checkpoint was written by a model of another shape",
            "give the model's options as it was trained, or another load or exp_dir",
        ),
        (
            r"a checkpoint of another model",
            r"size mismatch for ",
            r"shape mismatch|[Gg]lobal shape",
            r"(Missing|Unexpected) key.*state_dict",
        ),
    ),
    (
        Cause(
            "newer-checkpoint",
            "the checkpoint was written for a newer Megatron than the one installed",
            "convert it with `flagscale-convert run ... --megatron-version 0.17`, or update megatron-core",
        ),
        (r"Common file .* does not exist",),
    ),
    (
        Cause(
            "truncated-file",
            "a file, of a checkpoint most likely, is cut off or damaged",
            "delete the checkpoint that holds it: the newest one that is whole is taken then",
        ),
        (
            r"PytorchStreamReader failed|failed finding central directory",
            r"unexpected EOF|Ran out of input|pickle data was truncated",
            r"InvalidHeader|MetadataIncomplete|HeaderTooLarge",
        ),
    ),
    (
        Cause(
            "missing-package",
            "a package or a chip's plug-in is missing in the training environment, or is of another version",
            "install it for the interpreter that `flagscale-train plan` shows; `flagscale-hw doctor --for "
            "train` says what the chip needs",
        ),
        (
            r"No module named '",
            r"Failed to load the backend extension",
            r"cannot import name '",
            r"PackageNotFoundError",
        ),
    ),
    (
        Cause(
            "binary-mismatch",
            "a compiled package was built for another torch, driver or chip",
            "install the versions that belong together; `flagscale-hw doctor --for train` says which",
        ),
        (
            r"undefined symbol",
            r"GLIBC(XX)?_[\d.]+' not found",
            r"no kernel image is available",
            r"driver version is insufficient",
            r"cannot open shared object file",
        ),
    ),
    (
        Cause(
            "vocabulary",
            "an id of the data is beyond the vocabulary",
            "tokenize the data with this tokenizer; `flagscale-train data inspect PREFIX --count --tokenizer "
            "DIR` compares them",
        ),
        (r"index out of range in self", r"device-side assert", r"[Ii]ndex out of bounds|srcSelectDimSize"),
    ),
    (
        Cause(
            "disk-full",
            "the disk, or the quota on it, is full",
            "make room; experiment.runner.checkpoints.keep_last deletes old checkpoints",
        ),
        (r"No space left on device", r"File too large", r"Disk quota exceeded"),
    ),
    (
        Cause(
            "shared-memory",
            "the shared memory of a container is too small for the data loaders or for NCCL",
            "start the container with a larger --shm-size, or set num_workers: 0",
        ),
        (r"\bBus error\b|SIGBUS", r"shared memory", r"/dev/shm"),  # noqa: S108 -- text of an error
    ),
    (
        Cause(
            "data-ended",
            "the data ended before the training",
            "give more data, fewer train_iters, or weights to the datasets of a blend, which then repeat",
        ),
        (r"\bStopIteration\b",),
    ),
    (
        Cause(
            "empty-dataset",
            "a dataset of a blend has the weight 0, or not one whole sequence in its share",
            "leave it out of data_path, or give weights to all",
        ),
        (r"_ > 0, weights\)",),
    ),
    (
        Cause(
            "interconnect",
            "NCCL cannot talk between the devices or hosts",
            "run with NCCL_DEBUG=WARN in experiment.envs and read the first warning; check "
            "NCCL_SOCKET_IFNAME and the fabric",
        ),
        (r"nccl\w*Error", r"NCCL error", r"unhandled (system|cuda) error"),
    ),
    (
        Cause(
            "unreachable",
            "a host or process cannot be reached by the others, or one of them has ended",
            "look for an earlier error on another host; check names, firewall and interfaces of the hosts",
        ),
        (
            r"connectFullMesh",
            r"[Cc]onnection (refused|timed out|reset|closed)",
            r"No route to host",
            r"Name or service not known",
        ),
    ),
)
_KNOWN = tuple((cause, re.compile("|".join(patterns))) for cause, patterns in _TABLE)

_ABORTS = re.compile(
    r"Watchdog caught collective operation timeout.*|terminate called after throwing an instance of .*"
    r"|Fatal Python error: .*|Out of memory: Killed process.*|what\(\):\s+.*"
)
"""What a process that aborts writes without a traceback of Python's."""


def explain(error: str) -> Cause | None:
    """Return what is likely behind an error; None for one that is not known.

    Args:
        error: the first error of a run, as `status` tells it.
    """
    return next((cause for cause, pattern in _KNOWN if pattern.search(error)), None)


def abort(logs: Iterable[Path]) -> str:
    """Return what the first process that aborted said of it; empty if none did."""
    for log in logs:
        try:
            with log.open("rb") as stream:
                stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
                found = _ABORTS.search(stream.read().decode(errors="replace"))
        except OSError:
            continue
        if found:
            return found[0].strip()[:400]
    return ""
