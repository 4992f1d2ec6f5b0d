"""Logits of a checkpoint, computed by Megatron itself: plan it and run it to its end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flagscale_hw as hw
from flagscale_config import Experiment, load, render_megatron
from flagscale_train.checkpoints import choose
from flagscale_train.chips import PLAIN_LAYERS
from flagscale_train.data.writing import require_writable
from flagscale_train.errors import InvalidInput, NotFound, RunFailed
from flagscale_train.events import FILE_NAME, Progress, read
from flagscale_train.findings import Findings, examine
from flagscale_train.plan import checkpoint_dir, options_for, process_for

__all__ = ["compute_logits", "reference_options"]

_SAVING = (
    "save",
    "save_interval",
    "save_retain_interval",
    "tensorboard_dir",
    "wandb_project",
    "wandb_save_dir",
)
_SHARING = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "sequence_parallel",
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
    "use_distributed_optimizer",
    "overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "dist_ckpt_optim_fully_reshardable", "exit_signal_handler",
    "global_batch_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout", "recompute_granularity", "recompute_method", "recompute_num_layers",
    "moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion",
    "moe_shared_expert_overlap",
)  # fmt: skip
_PRECISION = (
    "bf16",
    "fp16",
    "fp8_format",
    "fp8_recipe",
    "fp8_param_gather",
    "fp4_format",
    "attention_softmax_in_fp32",
)


def compute_logits(
    source: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    tokens: Path,
    output: Path,
    checkpoint: Path | None = None,
) -> Path:
    """Compute the fp32 logits of an experiment's newest whole checkpoint with one process.

    Args:
        source: experiment file or recipe name, which describes the model.
        overrides: Hydra overrides.
        tokens: JSON file with a list of equally long lists of token ids.
        output: safetensors file to write, with one tensor `logits` of shape [batch, sequence, vocabulary].
        checkpoint: directory of checkpoints to use; the experiment's own by default.

    Returns:
        `output`.

    Raises:
        InvalidInput: the tokens are wrong, or `output` cannot be written.
        NotFound: there is no whole checkpoint.
        RunFailed: Megatron failed; the message names the cause and the log.
    """
    experiment = load(source, list(overrides), task="train")
    _check_tokens(tokens, experiment)
    require_writable(output)
    root = checkpoint.resolve() if checkpoint else Path(checkpoint_dir(experiment))
    if choose(root).path is None:
        raise NotFound(
            f"{root}: no whole checkpoint in it: train and save one first, or name another with --load"
        )
    machine = hw.detect()
    planned = _plan(experiment, machine, examine(experiment), (tokens.resolve(), output.resolve(), root))
    run_dir = Path(experiment.exp_dir) / "logits" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run = hw.launch(planned, run_dir, detach=False)
    try:
        ended = run.wait()
    except KeyboardInterrupt:
        run.stop(grace_s=0.0)
        raise
    if ended.state != "succeeded":
        error = Progress.of(read(run_dir / FILE_NAME)).error
        cause = error.get("text") if error else ended.reason
        raise RunFailed(f"logits: {cause}: see {run_dir / 'logs' / 'logits.log'}")
    return output


def _check_tokens(path: Path, experiment: Experiment) -> None:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"--tokens: {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"--tokens: {path}: not JSON ({error}): a list of lists of token ids is expected"
        ) from None
    if not _is_batch(rows):
        raise InvalidInput(
            f"--tokens: {path}: not a list of equally long, non-empty lists of token ids of at least 0"
        )
    limit = experiment.train.options.get("max_position_embeddings") if experiment.train else None
    if limit is not None and len(rows[0]) > limit:
        raise InvalidInput(
            f"--tokens: {path}: {len(rows[0])} tokens in a row: the model takes at most {limit}"
        )


def _is_batch(rows: Any) -> bool:
    if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)):
        return False
    same = len({len(row) for row in rows}) == 1
    return same and all(type(token) is int and token >= 0 for row in rows for token in row)


def _plan(
    experiment: Experiment, machine: hw.Machine, findings: Findings, paths: tuple[Path, Path, Path]
) -> hw.Plan:
    """Plan one process on plain torch layers in fp32, the reference that other engines are compared with."""
    tokens, output, root = paths
    options = reference_options(experiment, machine, findings) | {
        "load": str(root),
        "no_load_optim": True,
        "no_load_rng": True,
    }
    launcher = (
        "-m",
        "flagscale_train.worker.torchrun",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=1",
    )
    own = (f"--flagscale-tokens={tokens}", f"--flagscale-output={output}")
    extra = experiment.train.extra_args if experiment.train else ()
    argv = (
        sys.executable,
        *launcher,
        "-m",
        "flagscale_train.worker.logits",
        *own,
        *render_megatron(options),
        *extra,
    )
    environment = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "FLAGSCALE_EVENTS": f"{{run_dir}}/{FILE_NAME}",
        "FLAGSCALE_PLATFORM": hw.runtime(machine.chip).torch_device,
        "OMP_NUM_THREADS": str(machine.num_cpus),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_COMPILE_DISABLE": "1",
        **experiment.envs,
    }
    process = process_for(experiment, name="logits", argv=argv, environment=environment)
    return hw.Plan(kind="logits", name=experiment.name, processes=(process,))


def reference_options(experiment: Experiment, machine: hw.Machine, findings: Findings) -> dict[str, Any]:
    """Return the Megatron options of an experiment's model on one process, in fp32 and plain torch layers.

    Args:
        experiment: describes the model.
        machine: where it runs.
        findings: what was found of its files.

    Raises:
        InvalidInput: the experiment does not train, or an option cannot be followed.
    """
    # Without optional packages the plan uses plain layers; data that were deleted since are no problem here.
    plain = replace(findings, installed=frozenset(), problems=(), data_max_token=None)
    options = options_for(_alone(experiment), machine, plain)
    for name in (*_SAVING, *_SHARING, *_PRECISION):
        options.pop(name, None)
    return options | {"micro_batch_size": 1}


def _alone(experiment: Experiment) -> Experiment:
    """Return the experiment without what only matters to a layout, so that no conflict is seen in it."""
    train = experiment.train
    if train is None:
        raise InvalidInput(
            f"{experiment.source}: experiment.task.type: {experiment.task.type}: a train task is expected"
        )
    left_out = {*_SHARING, *_PRECISION, *PLAIN_LAYERS}
    options = {name: value for name, value in train.options.items() if name not in left_out}
    return experiment.model_copy(update={"train": train.model_copy(update={"options": options})})
