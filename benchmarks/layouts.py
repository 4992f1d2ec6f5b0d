"""Whether every layout trains the same model on real GPUs, and how fast: two devices against one.

    python benchmarks/layouts.py [--steps 20] [--only tensor ...] [--fp32]

In an environment with flagscale-train[megatron] and Transformer Engine, on a host of two GPUs (on a CPU it
runs too, with Megatron's plain layers). One checkpoint of random weights is saved; every layout starts from
it by `flagscale-train run` and trains on the same mock documents. Printed are the largest differences of
loss and gradient norm from the one-process run, and the tokens per second of both. In bfloat16 sums taken
in another order differ, so the bound is on the relative error of the loss; the exact comparison is in the
tests of flagscale-train, in float32. A router of experts chooses by such sums, and on a GPU not even the
same layout twice gives the same losses: for experts the difference of that (`again`) stands beside, and
there is no bound. Exits 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

BOUND = {"bf16": 1e-3, "fp32": 1e-5}
"""Of the relative difference of any step's loss."""
SEQ, MICRO, BATCH = 1024, 2, 16

EXPERIMENT = """
defaults: [_self_, {{train: {model}}}]
experiment:
  exp_name: layouts
  exp_dir: {folder}/exp
  task: {{type: train, backend: megatron}}
  runner: {{nproc_per_node: 1}}
"""
TRAIN = """
system:
  use_distributed_optimizer: true
  num_workers: 0
  log_interval: 1
  {precision}
  checkpoint: {{save_interval: 100000}}
model:
  num_layers: 4
  hidden_size: 1024
  ffn_hidden_size: 2816
  num_attention_heads: 16
  kv_channels: 64
  normalization: RMSNorm
  swiglu: true
  disable_bias_linear: true
  position_embedding_type: rope
  untie_embeddings_and_output_weights: true
  seq_length: {seq}
  max_position_embeddings: {seq}
  attention_dropout: 0.0
  hidden_dropout: 0.0
  train_iters: 1
  micro_batch_size: {micro}
  global_batch_size: {batch}
  eval_interval: 100000
  eval_iters: 0
  optimizer: {{lr: 3.0e-4, lr_decay_style: constant, clip_grad: 1.0, weight_decay: 0.1}}
  {more}
data:
  mock_data: true
  tokenizer: {{tokenizer_type: NullTokenizer, vocab_size: 32000}}
"""
DENSE = "group_query_attention: true\n  num_query_groups: 4\n  qk_layernorm: true"
EXPERTS = """group_query_attention: true
  num_query_groups: 4
  num_experts: 8
  moe_router_topk: 2
  moe_ffn_hidden_size: 1024
  moe_router_load_balancing_type: aux_loss
  moe_aux_loss_coeff: 0.01
  moe_grouped_gemm: true
  moe_token_dispatcher_type: alltoall"""
LATENT = """multi_latent_attention: true
  q_lora_rank: 256
  kv_lora_rank: 128
  qk_head_dim: 64
  qk_pos_emb_head_dim: 32
  v_head_dim: 64
  rope_type: rope
  no_rope_fusion: true"""
MODELS = {"dense": DENSE, "experts": EXPERTS, "latent": LATENT}
TWO = "experiment.runner.nproc_per_node=2"
SYSTEM = "+train.system."
TENSOR = [TWO, f"{SYSTEM}tensor_model_parallel_size=2"]
LAYOUTS = {
    "dense": {
        "data": [TWO, f"{SYSTEM}overlap_grad_reduce=true", f"{SYSTEM}overlap_param_gather=true"],
        "tensor": TENSOR,
        "sequence": [*TENSOR, f"{SYSTEM}sequence_parallel=true"],
        "pipeline": [TWO, f"{SYSTEM}pipeline_model_parallel_size=2"],
        "context": [TWO, f"{SYSTEM}context_parallel_size=2"],
    },
    "experts": {
        "again": [],
        "data-experts": [TWO],
        "expert": [TWO, f"{SYSTEM}expert_model_parallel_size=2"],
    },
    "latent": {"tensor-latent": TENSOR},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], metavar="LAYOUT")
    parser.add_argument("--fp32", action="store_true", help="without bfloat16")
    parser.add_argument("--sizes", default=f"{SEQ},{MICRO},{BATCH}", help="sequence, micro-batch, batch")
    given = parser.parse_args()
    precision = "fp32" if given.fp32 else "bf16"
    seq, micro, batch = map(int, given.sizes.split(","))
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="flagscale-layouts-") as name:
        folder = Path(name)
        (folder / "train").mkdir()
        for model, layouts in LAYOUTS.items():
            chosen = [layout for layout in layouts if not given.only or layout in given.only]
            if not chosen:
                continue
            fields = {"precision": "" if given.fp32 else "bf16: true", "more": MODELS[model]}
            text = TRAIN.format(**fields, seq=seq, micro=micro, batch=batch)
            (folder / "train" / f"{model}.yaml").write_text(text)
            file = folder / f"{model}.yaml"
            file.write_text(EXPERIMENT.format(folder=folder / model, model=model))
            train(file, folder / model / "seed", [])
            seed = folder / model / "seed" / "checkpoints"
            begin = [f"train.model.train_iters={given.steps}", f"+train.system.checkpoint.load={seed}"]
            begin += ["+train.system.checkpoint.finetune=true", f"{SYSTEM}no_save_optim=true"]
            single = train(file, folder / model / "one", begin)
            tell(f"{model}: one", single, single, batch * seq)
            for layout in chosen:
                found = train(file, folder / model / layout, [*begin, *layouts[layout]])
                far = tell(f"{model}: {layout}", found, single, batch * seq)
                worst = max(worst, 0.0 if model == "experts" else far)
    is_met = worst <= BOUND[precision]
    print(f"largest relative difference of a loss {worst:.1e}, bound {BOUND[precision]:.0e}")
    return int(not is_met)


def train(file: Path, folder: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Run one training and return its steps."""
    words = [str(file), f"experiment.exp_dir={folder}", *overrides]
    environment = {**os.environ, "FLAGSCALE_STATE_DIR": str(file.parent / "state")}
    command = [sys.executable, "-m", "flagscale_train.cli", "run", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    lines = (folder / "runs" / "latest" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def tell(name: str, found: list[dict[str, float]], single: list[dict[str, float]], tokens: int) -> float:
    """Print one row; return the largest relative difference of a loss."""
    pairs = list(zip(found, single, strict=True))
    loss = max(abs(one["loss"] - other["loss"]) / other["loss"] for one, other in pairs)
    norm = max(abs(one["grad_norm"] - other["grad_norm"]) / other["grad_norm"] for one, other in pairs)
    rate = median(tokens / step["step_time_s"] for step in found[len(found) // 3 :])
    print(
        f"{name:<24} loss {found[0]['loss']:.4f} -> {found[-1]['loss']:.4f}   differences: loss {loss:.1e}, "
        f"gradient norm {norm:.1e}   {rate:,.0f} tokens/s",
        flush=True,
    )
    return loss


if __name__ == "__main__":
    raise SystemExit(main())
