"""Processes of real megatron-core on the CPU that save and load in its per-rank format.

Reads a request (JSON) with parallel sizes and jobs. `save` writes the same random model as `--ckpt-format
torch` and as `torch_dist`. `load` loads a per-rank checkpoint strictly into a model full of NaN, saves that
as `torch_dist`, and loads the model once more from `torch_dist`, which must give the same on every rank.
Names of files and contents come from Megatron's own trainer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron_process import adapt_megatron, adapt_to_cpu, build, fill, sharded


def make(args: argparse.Namespace, sizes: dict[str, Any]) -> list[Any]:
    from megatron.core import parallel_state

    chunks = sizes["virtual_pipeline_model_parallel_size"]
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), sizes["pipeline_model_parallel_size"]
    models = []
    for chunk in range(chunks or 1):
        is_last_chunk = chunk == (chunks or 1) - 1
        options = {"vp_stage": chunk} if chunks else {}
        models.append(
            build(
                args,
                sizes["tensor_model_parallel_size"],
                sizes={**sizes, "pipeline_dtype": torch.float32},
                pre_process=stage == 0 and chunk == 0,
                post_process=stage == stages - 1 and is_last_chunk,
                **options,
            )
        )
    return models


def arguments(job: dict[str, Any], sizes: dict[str, Any]) -> argparse.Namespace:
    run = {"no_save_optim": True, "no_save_rng": True, "transformer_impl": "local"}
    return argparse.Namespace(**{**job["args"], **sizes, **run})


def chunk_names(models: list[Any]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]


def save_torch_dist(models: list[Any], args: argparse.Namespace, path: str) -> None:
    from megatron.core import dist_checkpointing

    folder = Path(path) / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    state = {
        "args": args,
        "iteration": 7,
        "checkpoint_version": 3.0,
        "content_metadata": {"singleton_local_shards": False},
        **{name: sharded(model) for name, model in zip(chunk_names(models), models, strict=True)},
    }
    dist_checkpointing.save(state, str(folder))


def save(job: dict[str, Any], sizes: dict[str, Any]) -> None:
    from megatron.training import checkpointing

    args = arguments(job, sizes)
    models = make(args, sizes)
    fill(models)
    save_torch_dist(models, args, job["path"] + "-dist")
    args.ckpt_format = "torch"
    state = checkpointing.generate_state_dict(args, models, None, None, None, iteration=7)
    name = checkpointing.get_checkpoint_name(job["path"], 7)
    checkpointing.ensure_directory_exists(name)
    torch.save(state, name)


def load(job: dict[str, Any], sizes: dict[str, Any]) -> None:
    from megatron.training import checkpointing

    name = checkpointing.get_checkpoint_name(job["path"], 0, release=True)
    state = torch.load(name, map_location="cpu", weights_only=False)
    models = make(state["args"], sizes)
    for key, model in zip(chunk_names(models), models, strict=True):
        forget(model)
        model.load_state_dict(state[key], strict=True)
    save_torch_dist(models, state["args"], job["path"] + "-loaded")
    compare_torch_dist(models, job["path"] + "-dist")


def forget(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))


def compare_torch_dist(models: list[Any], path: str) -> None:
    """Load the same model from `torch_dist`, with default strictness: every rank must get the same."""
    from megatron.core import dist_checkpointing

    from_ranks = [{name: value.clone() for name, value in model.named_parameters()} for model in models]
    for model in models:
        forget(model)
    names = chunk_names(models)
    wanted = {name: sharded(model) for name, model in zip(names, models, strict=True)}
    loaded = dist_checkpointing.load(wanted, f"{path}/release")
    for name, model, expected in zip(names, models, from_ranks, strict=True):
        model.load_state_dict(loaded[name], strict=True)
        for parameter, value in model.named_parameters():
            assert torch.equal(value, expected[parameter]), parameter


def main(path: str) -> None:
    adapt_to_cpu()
    adapt_megatron()
    from megatron.core import parallel_state, tensor_parallel

    request = json.loads(Path(path).read_text())
    torch.distributed.init_process_group("gloo")
    for group in request["groups"]:
        sizes = group["sizes"]
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes["tensor_model_parallel_size"],
            pipeline_model_parallel_size=sizes["pipeline_model_parallel_size"],
            virtual_pipeline_model_parallel_size=sizes["virtual_pipeline_model_parallel_size"],
            expert_model_parallel_size=sizes["expert_model_parallel_size"],
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        for job in group["jobs"]:
            (save if job["do"] == "save" else load)(job, sizes)
            torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint writer starts a process that imports this file again
    main(sys.argv[1])
