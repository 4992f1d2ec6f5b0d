"""Many trainings in little time: import torch and Megatron once, then fork the workers of one after another.

`python forked_workers.py JOBS.json`: a list of objects with `name`, `entry` (a module of the worker), `argv`
(Megatron's words), `processes`, `env` and `log`; and, where wanted, `plant` (a step and what its losses are
multiplied by), `bounded` (true where attention is to be told of bounds, as Transformer Engine's is) and
`fails` (true where the job must fail). Each worker is the real one, `main()` of that
module; only torchrun is left out, whose starting of interpreters costs many times what these models take to
train. Ends with the number of jobs that did not end as they must.
"""

import itertools
import json
import os
import signal
import sys
import traceback
from pathlib import Path


def main(path):
    jobs = json.loads(Path(path).read_text())
    # Read once by torch and OpenMP, so it must be there before they are.
    os.environ.update(TORCH_COMPILE_DISABLE="1", OMP_NUM_THREADS="1")
    from flagscale_train.worker import cpu

    cpu.install()
    import megatron.training  # noqa: F401

    from flagscale_train.worker import (  # noqa: F401
        datasets,
        guard,
        layers,
        logits,
        model,
        recorder,
        resume,
        session,
        step,
    )

    entries = {"session": session.main, "logits": logits.main}
    from torch.distributed import TCPStore

    failed = 0
    for job in jobs:
        # The parent keeps the store, as torchrun does: a port that is only looked up can be taken by another
        # process before the first worker listens on it, and the other workers would wait for ever.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = [_fork(job, rank, store.port, entries[job["entry"]]) for rank in range(job["processes"])]
        failed += _any_failed(workers) != job.get("fails", False)
    return failed


def _any_failed(workers):
    """Wait for all; when one fails, kill the others, who would wait for it."""
    has_failed, alive = False, set(workers)
    while alive:
        worker, status = os.wait()
        alive.discard(worker)
        if status and not has_failed:
            has_failed = True
            for other in alive:
                os.kill(other, signal.SIGKILL)
    return has_failed


def _fork(job, rank, port, work):
    worker = os.fork()
    if worker:
        return worker
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        count = str(job["processes"])
        os.environ.update(
            job["env"],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=count,
            LOCAL_WORLD_SIZE=count,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        sys.argv = ["flagscale_train.worker", *job["argv"]]
        if "plant" in job:
            _plant(*job["plant"])
        if job.get("bounded"):
            _attend_within_bounds()
        code = work()
    except BaseException:  # noqa: BLE001 -- nothing may return into the parent's work
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _plant(iteration, factor):
    """Multiply the losses of one step, counted from 1, or of all; a word, for JSON has no nan."""
    from megatron.training import get_args

    from flagscale_train.worker import step

    real = step._fold

    def fold(mask, losses):
        is_here = iteration in (None, get_args().curr_iteration + 1)
        return real(mask, losses * float(factor) if is_here else losses)

    step._fold = fold


def _attend_within_bounds():
    """Stand in for Transformer Engine's attention: each document alone, of [tokens, heads, width]."""
    import torch

    from flagscale_train.worker import layers

    real = layers.Attention.forward

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **options):
        assert attention_mask is None
        assert packed_seq_params.qkv_format == "thd"
        places = list(itertools.pairwise(packed_seq_params.cu_seqlens_q.tolist()))
        assert max(last - first for first, last in places) == packed_seq_params.max_seqlen_q
        found = [
            real(self, *(each[first:last, None] for each in (query, key, value)), None)
            for first, last in places
        ]
        return torch.cat(found)[:, 0]

    layers.Attention.forward = forward


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
