"""The first error of a run and its likely cause, from logs and events as failed runs leave them."""

import json
import socket
import sys

import pytest

import flagscale_hw as hw
from flagscale_train.causes import abort, explain
from flagscale_train.cli import main
from flagscale_train.events import Journal

CUDA_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.37 GiB. GPU 3 has a total capacity of 79.10 GiB of which 1.21 "
    "GiB is free. Including non-PyTorch memory, this process has 77.88 GiB memory in use."
)
WATCHDOG = (
    "[rank1]:[E1128 10:11:12.131415161 ProcessGroupNCCL.cpp:689] [Rank 1] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=158046, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) "
    "ran for 600012 milliseconds before timing out."
)

ERRORS = {
    f"rank 3: OutOfMemoryError: {CUDA_MEMORY}": "device-memory",
    "rank 0: RuntimeError: NPU out of memory. Tried to allocate 512.00 MiB": "device-memory",
    "rank 1 was killed by signal 9 (SIGKILL), which the kernel does when memory is short": "host-memory",
    "train: exited with code 137": "host-memory",
    f"rank 1 was killed by signal 6 (SIGABRT): {WATCHDOG}": "collective-timeout",
    "rank 0: DistNetworkError: The server socket has failed to listen on any local network address. "
    "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address in use": "port-in-use",
    "rank 0: ModuleNotFoundError: No module named 'torch_npu'": "missing-package",
    "rank 0: RuntimeError: Failed to load the backend extension: torch_musa.": "missing-package",
    "rank 0: ImportError: fused.so: undefined symbol: _ZN3c104cuda9SetDeviceEi": "binary-mismatch",
    "rank 0: Refusal: a checkpoint of another model: num_layers: 3: it has 2": "other-model",
    "rank 0: RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central "
    "directory": "truncated-file",
    "rank 0: CheckpointingException: Common file /c/release/common.pt does not exist": "newer-checkpoint",
    "rank 0: IndexError: index out of range in self": "vocabulary",
    "rank 0: AcceleratorError: CUDA error: device-side assert triggered": "vocabulary",
    "rank 0: OSError: [Errno 28] No space left on device": "disk-full",
    "rank 0: StopIteration: return next(self._sampler_iter)": "data-ended",
    "rank 0: AssertionError: assert all(map(lambda _: _ > 0, weights)) (blended_dataset.py:53)": (
        "empty-dataset"
    ),
    "rank 2: RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
    "dataloader's workers are out of shared memory.": "shared-memory",
    "rank 0: DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled system error": "interconnect",
    "rank 1: RuntimeError: Connection closed by peer [127.0.0.1]:4711": "unreachable",
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_explained(error):
    assert explain(error).name == ERRORS[error]


def test_an_unknown_error_is_left_alone():
    assert explain("rank 0: ValueError: something else") is None
    assert explain("") is None


def failed(tmp_path, command, events=()):
    """Run a training that is only these words, as a real run that fails."""
    run_dir = tmp_path / "exp" / "runs" / "one"
    process = hw.Process(name="train", argv=tuple(map(str, command)), env={}, cwd=str(tmp_path))
    plan = hw.Plan(kind="train", name="t", processes=(process,), stop=hw.StopPolicy(), facts={})
    run = hw.launch(plan, run_dir)
    assert run.wait().state == "failed"
    journal = Journal(run_dir / "events.jsonl")
    for event in events:
        journal.write("error", **event)
    return run_dir


def told(capsys, run_dir, first, likely):
    """Check what every verb that tells of a failure says of it."""
    assert main(["logs", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first error: ")
    assert first in lines[0]
    assert lines[1].startswith(f"likely cause: {likely}")
    assert lines[2].startswith("what to do: ")
    assert main(["status", str(run_dir)]) == 4
    shown = capsys.readouterr().out
    assert first in shown
    assert f"likely cause: {likely}" in shown
    assert main(["status", str(run_dir), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["cause"]["likely"].startswith(likely)
    return lines


def printing(*lines, code=1):
    return [sys.executable, "-c", f"print({chr(10).join(lines)!r}); raise SystemExit({code})"]


def test_memory_that_ends_late_is_the_first_cause_though_a_peer_told_before(tmp_path, capsys):
    """The rank that waits for the one without memory loses its peer and writes first."""
    events = [
        {"rank": 0, "type": "RuntimeError", "text": "Connection closed by peer [127.0.0.1]:4711"},
        {"rank": 1, "type": "OutOfMemoryError", "text": CUDA_MEMORY},
        {"rank": 2, "type": "ValueError", "text": "later"},
    ]
    run_dir = failed(tmp_path, printing("step 99", "Traceback (most recent call last):"), events)
    lines = told(capsys, run_dir, "rank 1: OutOfMemoryError: CUDA out of memory", "the memory of a device")
    assert "step 99" in lines


def test_code_137_is_memory_of_the_host(tmp_path, capsys):
    told(
        capsys,
        failed(tmp_path, printing("step 7", code=137)),
        "exited with code 137",
        "the memory of the host",
    )


def test_an_aborted_rank_tells_what_the_watchdog_said(tmp_path, capsys):
    table = (
        "Root Cause (first observed failure):",
        "  rank      : 1 (local_rank: 1)",
        "  exitcode  : -6 (pid: 9)",
    )
    run_dir = failed(tmp_path, printing(WATCHDOG, *table))
    told(capsys, run_dir, "Watchdog caught collective operation timeout", "a rank did not come")
    assert abort([tmp_path / "none"]) == ""


def test_a_run_that_did_not_fail_has_no_first_error(recorded_experiment, capsys):
    finished = max((recorded_experiment / "runs").glob("[0-9]*"))
    main(["logs", str(finished)])
    assert "first error" not in capsys.readouterr().out


WORKER = """
import os, signal, sys, torch
import torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    {act}
dist.all_reduce(torch.ones(1))
"""
REAL = {
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "rank 1 was killed by signal 9",
        "the memory of the host",
    ),
    "memory": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40,) * 2); torch.empty(1 << 42)",
        "DefaultCPUAllocator: can't allocate memory",
        "the memory of the host",
    ),
    "plug-in": (
        "import torch_npu_of_nobody",
        "No module named 'torch_npu_of_nobody'",
        "a package or a chip's",
    ),
    "vocabulary": (
        "torch.nn.functional.embedding(torch.tensor([9]), torch.ones(4, 2))",
        "index out of range in self",
        "an id of the data is beyond",
    ),
}


def torchrun(folder, script, *options):
    (folder / "worker.py").write_text(script)
    launcher = [sys.executable, "-m", "flagscale_train.worker.torchrun", "--nproc-per-node=2"]
    return [*launcher, *options, folder / "worker.py"]


@pytest.mark.megatron
@pytest.mark.parametrize("name", REAL)
def test_logs_that_torchrun_really_wrote(tmp_path, capsys, name):
    act, first, likely = REAL[name]
    command = torchrun(tmp_path, WORKER.format(act=act), "--standalone", "--local-addr=127.0.0.1")
    told(capsys, failed(tmp_path, command), first, likely)


@pytest.mark.megatron
def test_a_port_that_is_really_in_use(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = (f"--master-port={taken.getsockname()[1]}", "--master-addr=127.0.0.1")
        command = torchrun(tmp_path, "", "--rdzv-backend=static", "--nnodes=1", "--node-rank=0", *address)
        told(capsys, failed(tmp_path, command), "EADDRINUSE", "another process listens")
