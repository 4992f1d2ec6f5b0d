"""Whether Transformer Engine's layers train the same model as the plain torch ones, on one real GPU.

    python benchmarks/transformer_engine.py [--only CASE ...] [--fp32] [--jobs 4] [--json FILE]

In an environment with flagscale-train[megatron], flagscale-convert and Transformer Engine, on a host of one
GPU; nothing is downloaded. Models of random weights train three steps and go to Hugging Face and back, which
gives checkpoints that either kind of layers loads. From these every case trains twice by `flagscale-train
run`, once on each kind of layers, on the same text or chats. Printed are the largest relative differences of
loss and gradient norm, and the attention that Transformer Engine took.

In bfloat16 each rounds elsewhere, hence the bounds; a case that names another must differ from that one twice
as much as its own two sides differ, or it would not be seen whether its option does anything. Exits 1 when a
bound is broken. Without a GPU both sides have plain layers, which proves this script and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUNDS = {"bf16": (5e-4, 2e-2), "fp32": (1e-4, 3e-3)}
"""Of the relative differences of any step's loss and gradient norm. Products in fp32 are TF32 with
Transformer Engine."""
EXPERTS_FACTOR = 3.0
"""How much looser they are for experts: a router chooses by sums that are rounded otherwise."""
SEQ = 256

EXPERIMENT = """
defaults: [_self_, {{train: {model}}}]
experiment:
  exp_name: {model}
  exp_dir: {folder}/exp
  task: {{type: train, backend: megatron}}
  runner: {{nproc_per_node: 1}}
  envs: {{OMP_NUM_THREADS: 1, NVTE_DEBUG: 1, NVTE_DEBUG_LEVEL: 2}}
"""
TRAIN = """
system:
  use_distributed_optimizer: true
  num_workers: 0
  log_interval: 1
  {precision}
  checkpoint: {{save_interval: 100000}}
model:
  num_layers: 2
  hidden_size: 256
  ffn_hidden_size: 512
  num_attention_heads: 4
  normalization: RMSNorm
  swiglu: true
  disable_bias_linear: true
  position_embedding_type: rope
  untie_embeddings_and_output_weights: true
  seq_length: {seq}
  max_position_embeddings: {seq}
  attention_dropout: 0.0
  hidden_dropout: 0.0
  init_method_std: 0.06
  train_iters: {steps}
  micro_batch_size: 1
  global_batch_size: 8
  eval_interval: 100000
  eval_iters: 0
  optimizer: {{lr: 2.0e-3, lr_decay_style: constant, clip_grad: 1.0, weight_decay: 0.1}}
  {more}
data:
  data_path: {folder}/text
  split: 1,0,0
  tokenizer: {{tokenizer_type: HuggingFaceTokenizer, tokenizer_model: {folder}/tokenizer}}
"""
GROUPED = "kv_channels: 64\n  group_query_attention: true\n  num_query_groups: 2\n  qk_layernorm: true"
LATENT = """multi_latent_attention: true
  q_lora_rank: 96
  kv_lora_rank: 64
  qk_head_dim: 64
  qk_pos_emb_head_dim: 32
  v_head_dim: 64
  rope_type: rope
  no_rope_fusion: true
  qk_layernorm: true"""
EXPERTS = """num_experts: 8
  moe_router_topk: 2
  moe_ffn_hidden_size: 128
  moe_token_dispatcher_type: alltoall
  moe_aux_loss_coeff: 0.01"""
BALANCED = "moe_router_load_balancing_type: aux_loss"
SIGMOID = """moe_router_load_balancing_type: seq_aux_loss
  moe_layer_freq: "[0]*1+[1]*1"
  moe_shared_expert_intermediate_size: 128
  moe_router_score_function: sigmoid
  moe_router_topk_scaling_factor: 2.5
  moe_router_enable_expert_bias: true
  moe_router_bias_update_rate: 0.001
  mtp_num_layers: 1
  mtp_loss_scaling_factor: 0.3"""
MODELS = {
    "dense": [GROUPED],
    "experts": [GROUPED, EXPERTS, BALANCED],
    "deepseek": [LATENT, EXPERTS, SIGMOID],
}
SYSTEM, MODEL, DATA = "+train.system.", "+train.model.", "+train.data."
PLAIN = f"{MODEL}transformer_impl=local"
DOCUMENTS = [f"{DATA}reset_attention_mask=true", f"{DATA}reset_position_ids=true"]
TWO_EACH = "train.model.micro_batch_size=2"
CHATS = [f"{DATA}sft=true", "train.data.data_path={folder}/chats.jsonl"]
LORA = [f"{MODEL}peft_type=lora", f"{MODEL}lora_dim=8", f"{MODEL}lora_out_init_method=normal"]

EVERY_LAYER = f"{MODEL}lora_target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]"
GROUPED_PRODUCTS = f"{MODEL}moe_grouped_gemm=true"


@dataclass(frozen=True)
class Case:
    """One training on both kinds of layers."""

    model: str
    overrides: tuple[str, ...] = ()
    unlike: str | None = None
    """Another case of the same weights, which must give other losses."""
    steps: int | None = None
    """How many are compared: the sign of an expert's load moves its bias, and then each side chooses other
    experts."""
    needs_gpu: tuple[str, ...] = ()
    """Further overrides that a CPU refuses."""


CASES = {
    "plain": Case("dense"),
    "documents": Case("dense", (*DOCUMENTS,), "plain"),
    "documents-two": Case("dense", (*DOCUMENTS, TWO_EACH), "plain"),
    "chats": Case("dense", (*CHATS,)),
    "lora": Case("dense", (*LORA,), "plain"),
    "lora-chats": Case("dense", (*LORA, *CHATS), "chats"),
    "experts": Case("experts"),
    "experts-grouped": Case("experts", needs_gpu=(GROUPED_PRODUCTS,)),
    "experts-lora": Case("experts", (*LORA,), "experts"),
    "experts-lora-each": Case("experts", (*LORA, EVERY_LAYER), "experts-lora"),
    "experts-lora-grouped": Case(
        "experts", (*LORA, EVERY_LAYER), "experts-lora", needs_gpu=(GROUPED_PRODUCTS,)
    ),
    "deepseek": Case("deepseek", steps=1),
    "deepseek-lora": Case("deepseek", (*LORA,), "deepseek"),
    "deepseek-documents": Case("deepseek", (*DOCUMENTS,), "deepseek", steps=1),
    "deepseek-documents-two": Case("deepseek", (*DOCUMENTS, TWO_EACH), "deepseek", steps=1),
}
Steps = list[dict[str, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--fp32", action="store_true", help="without bfloat16")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave what is made there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flagscale-layers-") as name:
        rows = measure((given.keep or Path(name)).resolve(), given)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(not tell(rows, "fp32" if given.fp32 else "bf16"))


def measure(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every case on both kinds of layers; a training that fails is a figure too."""
    from flagscale_hw import detect

    has_gpu = detect().chip != "cpu"
    cases = {name: CASES[name] for name in CASES if name in given.only}
    models = {case.model for case in cases.values()}
    write_inputs(folder, models, "" if given.fp32 else "bf16: true")
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda model: make_weights(folder, model), sorted(models)))
        sides: dict[tuple[str, str], Any] = {}
        for name, case in cases.items():
            words = [word.format(folder=folder) for word in case.overrides]
            words += [*(case.needs_gpu if has_gpu else ()), f"train.model.train_iters={given.steps}"]
            words.append(f"{SYSTEM}checkpoint.pretrained_checkpoint={folder / case.model / 'weights'}")
            for side, choice in (("plain", [PLAIN]), ("engine", [])):
                target = folder / name / side
                sides[name, side] = pool.submit(train, folder, case.model, target, [*words, *choice])
    return [row(name, sides[name, "plain"].result(), sides[name, "engine"].result()) for name in cases]


def write_inputs(folder: Path, models: set[str], precision: str) -> None:
    """Write text of short documents, chats, a tokenizer with a chat template, and the experiments."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghij", k=chance.randrange(2, 7))) for _ in range(200)]
    texts = [" ".join(chance.choices(words, k=chance.randrange(5, 40))) for _ in range(2000)]
    (folder / "train").mkdir(parents=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with (folder / "chats.jsonl").open("w") as chats:
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chats.write(json.dumps({"messages": said}) + "\n")
    text, tokenizer = str(folder / "text.jsonl"), str(folder / "tokenizer")
    checked(["data", "train-tokenizer", text, "--vocab-size", "512", "--output", tokenizer], folder)
    checked(["data", "tokenize", text, "--tokenizer", tokenizer, "--output", str(folder / "text")], folder)
    (folder / "tokenizer" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for model in models:
        fields = {"folder": folder, "model": model, "precision": precision, "seq": SEQ, "steps": 3}
        described = TRAIN.format(**fields, more="\n  ".join(MODELS[model]))
        (folder / "train" / f"{model}.yaml").write_text(described)
        (folder / f"{model}.yaml").write_text(EXPERIMENT.format(**fields))


def make_weights(folder: Path, model: str) -> None:
    """Save weights whose norms are no longer ones, by names that both kinds of layers have."""
    from flagscale_convert import convert, make_plan

    trained = folder / model / "seed"
    found = train(folder, model, trained, [PLAIN, "train.model.optimizer.lr=0.02"])
    if isinstance(found, str):
        raise SystemExit(f"the weights of {model}: {found}")
    convert(make_plan(trained / "checkpoints", folder / model / "hf", to="hf"))
    convert(make_plan(folder / model / "hf", folder / model / "weights", to="torch_dist"))


def train(folder: Path, model: str, target: Path, overrides: list[str]) -> dict[str, Any] | str:
    """Run one training; return its steps, layers and attention, or how it failed."""
    words = ["run", str(folder / f"{model}.yaml"), f"experiment.exp_dir={target}", *overrides]
    try:
        checked(words, target)
    except SystemExit as failure:
        return str(failure)
    ran = target / "runs" / "latest"
    events = [json.loads(line) for line in (ran / "events.jsonl").read_text().splitlines()]
    logs = "".join(log.read_text() for log in (ran / "logs").glob("*.log"))
    return {
        "layers": next(event["layers"] for event in events if "layers" in event),
        "attention": sorted(set(re.findall(r"Selected backend = (\w+)", logs))),
        "steps": [event for event in events if event["event"] == "step"],
    }


def checked(words: list[str], target: Path) -> None:
    environment = {**os.environ, "FLAGSCALE_STATE_DIR": str(target / "state")}
    command = [sys.executable, "-m", "flagscale_train.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-3000:]}")


def row(name: str, plain: dict[str, Any] | str, engine: dict[str, Any] | str) -> dict[str, Any]:
    """Compare the two sides of a case."""
    failed = {kind: found for kind, found in (("plain", plain), ("engine", engine)) if isinstance(found, str)}
    if isinstance(plain, str) or isinstance(engine, str):
        return {"case": name, "failed": failed}
    first = slice(CASES[name].steps)
    loss, norm = (
        furthest(plain["steps"][first], engine["steps"][first], what) for what in ("loss", "grad_norm")
    )
    return {"case": name, "loss": loss, "grad_norm": norm, "plain": plain, "engine": engine}


def furthest(one: Steps, other: Steps, what: str) -> float:
    """Return the largest relative difference of any step."""
    return max(abs(a[what] - b[what]) / abs(b[what]) for a, b in zip(one, other, strict=True))


def tell(rows: list[dict[str, Any]], precision: str) -> bool:
    """Print a table; return whether every case is within its bounds."""
    by_name = {found["case"]: found for found in rows}
    are_met = []
    for found in rows:
        case = CASES[found["case"]]
        if "failed" in found:
            for side, text in found["failed"].items():
                print(f"{found['case']:<24} FAILED with {side} layers: {text}")
            are_met.append(False)
            continue
        factor = EXPERTS_FACTOR if case.model in ("experts", "deepseek") else 1.0
        loss_bound, norm_bound = (bound * factor for bound in BOUNDS[precision])
        is_met = found["loss"] <= loss_bound and found["grad_norm"] <= norm_bound
        other = by_name.get(case.unlike or "", {})
        told = ""
        if "plain" in other:
            apart = furthest(found["plain"]["steps"], other["plain"]["steps"], "loss")
            told = f"   {apart:.1e} from {case.unlike}"
            is_met &= apart > 2 * found["loss"]
        steps, layers = found["engine"]["steps"], [found[side]["layers"] for side in ("plain", "engine")]
        print(
            f"{found['case']:<24} {'OK       ' if is_met else 'DIFFERENT'} loss {found['loss']:.1e} gradient "
            f"norm {found['grad_norm']:.1e}{told}   ({' and '.join(layers)}; loss {steps[0]['loss']:.4f} -> "
            f"{steps[-1]['loss']:.4f}; {', '.join(found['engine']['attention'])})"
        )
        are_met.append(is_met)
    print(f"{precision}: bounds {BOUNDS[precision][0]:.0e} and {BOUNDS[precision][1]:.0e}")
    return all(are_met)


if __name__ == "__main__":
    raise SystemExit(main())
