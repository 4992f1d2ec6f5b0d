"""Build datasets and compute losses as the worker does, from the plan's own words, and save both.

`python blended_batches.py JOBS.json`: a list of objects with `argv` (Megatron's words), `samples` (of each
split), `env` and `out` (a file). Each job is a fork, for Megatron's globals are set once. Saved are the
samples of each split and, where `losses` is true, the loss of every token of each training sample.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def main(path):
    jobs = json.loads(Path(path).read_text())
    os.environ.update(
        TORCH_COMPILE_DISABLE="1", OMP_NUM_THREADS="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"
    )
    from flagscale_train.worker import cpu

    cpu.install()
    import megatron.training  # noqa: F401

    from flagscale_train.worker import datasets, session, settings, step  # noqa: F401

    failed = 0
    for job in jobs:
        child = os.fork()
        if not child:
            try:
                os.environ.update(job["env"])
                _work(job)
            except BaseException:  # noqa: BLE001 -- nothing may return into the parent's work
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        failed += os.waitpid(child, 0)[1] != 0
    return failed


def _work(job):
    import torch
    from megatron.core import parallel_state
    from safetensors.torch import save_file

    from flagscale_train.worker import datasets, refusal, session, settings

    sys.argv = ["worker", *job["argv"]]
    args = session.prepare(settings.Settings.from_environment())()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{job['out']}.store", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    saved = {}
    try:
        built = datasets.provide(job["samples"])
    except refusal.Refusal as refused:
        Path(job["out"]).with_suffix(".refused").write_text(str(refused))
        return
    for name, dataset in zip(("train", "valid", "test"), built, strict=True):
        samples = [dataset[number] for number in range(len(dataset or ()))]
        for key in samples[0] if samples else ():
            saved[f"{name}.{key}"] = torch.stack([torch.as_tensor(sample[key]) for sample in samples])
    if job.get("losses"):
        saved["losses"] = torch.stack([_losses(args, built[0][number]) for number in range(len(built[0]))])
    save_file(saved, job["out"])


def _losses(args, sample):
    """Return the loss of every token, by the worker's own forward step."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from flagscale_train.worker import megatron, step

    model_parallel_cuda_manual_seed(1)  # the same weights each time
    torch.manual_seed(1)
    model = megatron.build_model(args, ProcessGroupCollection.use_mpu_process_groups()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that every key that is seen counts
            parameter.mul_(4)
        losses, _ = step.forward(iter([{key: value[None] for key, value in sample.items()}]), model)
    return losses[0].float()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
