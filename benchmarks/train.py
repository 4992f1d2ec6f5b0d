"""How fast training is: `flagscale-train run`, the same Megatron arguments by hand, and plain transformers.

    python benchmarks/train.py [--shape cpu-25m] [--rounds 3] [--steps 12] [--json FILE]
    python benchmarks/train.py --shape qwen3-0.6b --shape llama3-8b-8-layers --shape mixtral-2-layers
    python benchmarks/train.py --shape qwen3-0.6b --fp8 [a.b=c ...]

In an environment with flagscale-train[megatron]. Each round runs all three in turn, so that a busy machine
hurts all alike; each is a process of its own and trains on mock data or random ids from random weights, and
saves nothing:

- run: `flagscale-train run` with supervisor and events;
- by hand: the words of its plan given to `megatron.training.pretrain()`, with nothing of ours around it but
  what this device cannot train without and the same two fusions;
- megatron alone (on a GPU): the same without our fusions, Megatron's own loss and sums of gradients;
- transformers: the same shape and batch, sdpa attention, torch's AdamW, clipped gradients. On a GPU its
  weights and moments are bfloat16 where Megatron keeps float32 too, which is to its advantage.

Tokens per second are those of the median step after the first third of the steps. After each round the rate
of a square matmul (8192 in bfloat16 on a GPU, 2048 in float32 on a CPU) is measured, the best being the
ceiling; the model's FLOP/s by Megatron's own formula stand beside it. Bounds: run / by hand >= 0.99; run /
transformers >= 1.0; on a GPU, of the matmul ceiling 55 % in bfloat16 and 65 % in fp8. Exits 1 when one is
broken. The tiny shapes say that the benchmark works and nothing about speed: they have no bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model and its batch. `peer` names the same architecture in transformers."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    seq: int
    micro: int
    batch: int
    peer: str
    tied: bool = False
    experts: int = 0
    peer_micro: int | None = None
    is_tiny: bool = False


SHAPES = {
    "tiny": Shape(2, 64, 176, 4, 2, 16, 512, 64, 2, 4, "Qwen3", is_tiny=True),
    "tiny-experts": Shape(2, 64, 176, 4, 2, 16, 512, 64, 2, 4, "Mixtral", experts=8, is_tiny=True),
    "cpu-25m": Shape(8, 384, 1024, 6, 2, 64, 16384, 256, 4, 8, "Qwen3"),
    # Its logits in float32 take 10 GiB with transformers, hence the smaller micro-batch.
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, 4096, 8, 32, "Qwen3", tied=True, peer_micro=4),
    # Weights, gradients and Adam's moments take 18 bytes a parameter: 50 GB here, 57 GB below.
    "llama3-8b-8-layers": Shape(8, 4096, 14336, 32, 8, 128, 128256, 4096, 1, 16, "Llama"),
    "mixtral-2-layers": Shape(2, 4096, 14336, 32, 8, 128, 32000, 4096, 2, 16, "Mixtral", experts=8),
}
ALONE = "megatron alone"
KINDS = ("run", "by hand", ALONE, "transformers")
OVERHEAD_BOUND, PEER_BOUND, CEILING_BOUND, CEILING_BOUND_FP8 = 0.99, 1.0, 0.55, 0.65
STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")

EXPERIMENT = """
defaults: [_self_, {{train: shape}}]
experiment:
  exp_name: benchmark
  exp_dir: {folder}/exp
  task: {{type: train, backend: megatron}}
  runner: {{nproc_per_node: 1, checkpoints: {{enabled: false}}}}
"""
TRAIN = """
system:
  use_distributed_optimizer: true
  num_workers: 0
  log_interval: 1
  {precision}
model:
  num_layers: {layers}
  hidden_size: {hidden}
  ffn_hidden_size: {ffn}
  num_attention_heads: {heads}
  group_query_attention: true
  num_query_groups: {groups}
  kv_channels: {head}
  qk_layernorm: {qk_norm}
  normalization: RMSNorm
  norm_epsilon: 1.0e-6
  swiglu: true
  disable_bias_linear: true
  position_embedding_type: rope
  rotary_base: 1000000
  untie_embeddings_and_output_weights: {untied}
  seq_length: {seq}
  max_position_embeddings: {seq}
  attention_dropout: 0.0
  hidden_dropout: 0.0
  train_iters: {steps}
  micro_batch_size: {micro}
  global_batch_size: {batch}
  eval_interval: 100000
  eval_iters: 0
  {fusion}
  {experts}
  optimizer: {{lr: 1.0e-4, min_lr: 1.0e-5, clip_grad: 1.0, weight_decay: 0.1}}
data:
  mock_data: true
  tokenizer: {{tokenizer_type: NullTokenizer, vocab_size: {vocab}}}
"""
EXPERTS = """num_experts: {experts}
  moe_router_topk: 2
  moe_token_dispatcher_type: alltoall
  moe_router_load_balancing_type: aux_loss
  moe_aux_loss_coeff: 0.02"""
BY_HAND = """
import sys
from flagscale_train.worker import fusions
from flagscale_train.worker.session import prepare
from flagscale_train.worker.settings import Settings

def main():
    if "--no-gradient-accumulation-fusion" in sys.argv:
        fusions.install = lambda: None
    arguments = prepare(Settings.from_environment())
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from flagscale_train.worker import datasets, step
    from flagscale_train.worker.model import configure
    args = arguments()
    container = pretrain_cfg_container_from_args(args, configure(args))
    pretrain(container, datasets.provide, ModelType.encoder_or_decoder, step.forward)

if __name__ == "__main__":
    main()
"""
PEER = """
import json, sys, time
import torch, transformers
shape, steps = json.loads(sys.argv[1]), int(sys.argv[2])
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
experts = {"num_local_experts": shape["experts"], "num_experts_per_tok": 2} if shape["experts"] else {}
config = getattr(transformers, shape["peer"] + "Config")(
    vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
    num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head"],
    num_key_value_heads=shape["groups"], tie_word_embeddings=shape["tied"],
    max_position_embeddings=shape["seq"], use_cache=False, **experts,
)
torch.manual_seed(0)
with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
micro = shape["peer_micro"] or shape["micro"]
count = shape["batch"] // micro
for _ in range(steps):
    started = time.perf_counter()
    for _ in range(count):
        tokens = torch.randint(0, shape["vocab"], (micro, shape["seq"]), device=device)
        (model(tokens, labels=tokens).loss / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"elapsed time per iteration (ms): {1e3 * (time.perf_counter() - started)}", flush=True)
"""
CEILING = """
import time, torch
on_gpu = torch.cuda.is_available()
device, dtype, size, count = ("cuda", torch.bfloat16, 8192, 20) if on_gpu else ("cpu", torch.float32, 2048, 2)
left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
wait = torch.cuda.synchronize if on_gpu else lambda: None
best = 0.0
for _ in range(5):
    wait()
    started = time.perf_counter()
    for _ in range(count):
        left @ right
    wait()
    best = max(best, count * 2 * size**3 / (time.perf_counter() - started))
print(best)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given several times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--fp8", action="store_true", help="fp8 with delayed scaling (GPU, Transformer Engine)"
    )
    parser.add_argument(
        "--only", choices=KINDS, action="append", help="leave the others out; may be given several times"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    given = parser.parse_args()
    results = []
    for name in given.shape or ["cpu-25m"]:
        with tempfile.TemporaryDirectory(prefix="flagscale-benchmark-") as folder:
            results.append(measure(name, given, Path(folder)))
        if given.json is not None:  # after each shape, so that a later one's failure loses nothing
            given.json.write_text(json.dumps(results, indent=2) + "\n")
    return tell(results)


def measure(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all rounds of a shape; return its figures."""
    from flagscale_hw import detect

    machine, shape = detect(), SHAPES[name]
    on_gpu = machine.chip != "cpu"
    experiment = write(folder, shape, given, on_gpu=on_gpu)
    kinds = [kind for kind in KINDS if kind in (given.only or KINDS) and (on_gpu or kind != ALONE)]
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    steps: list[dict[str, Any]] = []
    ceilings: list[float] = []
    for number in range(given.rounds):
        for kind in kinds:
            target = folder / f"{kind.replace(' ', '-')}-{number}"
            words = [str(experiment), f"experiment.exp_dir={target}", *given.overrides]
            if kind == ALONE:
                words.append("++train.system.no_gradient_accumulation_fusion=true")
            start = {"run": run, "by hand": by_hand, ALONE: by_hand}.get(kind)
            text = start(words, target, folder) if start else peer(shape, given.steps)
            rates[kind].append(tokens_per_second(text, shape))
            if kind == "run":
                steps += steps_of(target)
            print(f"{name}, round {number + 1}: {kind:<12} {rates[kind][-1]:12,.0f} tokens/s", flush=True)
        ceilings.append(float(checked([sys.executable, "-c", CEILING], dict(os.environ))) / 1e12)
    teraflops = median(step["tflops_per_device"] for step in steps)
    return {
        "shape": name,
        "model": asdict(shape),
        "precision": "fp8" if given.fp8 else "bf16" if on_gpu else "fp32",
        "overrides": given.overrides,
        "device": machine.visible[0].name if machine.visible else machine.cpu_name,
        "versions": versions(),
        "tokens_per_second": rates,
        "tflops": teraflops,
        "matmul_tflops": max(ceilings),
        "memory_gib": max(step["memory_bytes"] for step in steps) / (1 << 30),
        "ratios": ratios(rates, teraflops / max(ceilings)),
        "bounds": {} if shape.is_tiny else bounds(on_gpu=on_gpu, fp8=given.fp8),
    }


def ratios(rates: dict[str, list[float]], of_ceiling: float) -> dict[str, float]:
    """Return run's rate by each other's, the median over the rounds, and the part of the ceiling."""
    found = {
        f"run / {kind}": median(ours / theirs for ours, theirs in zip(rates["run"], others, strict=True))
        for kind, others in rates.items()
        if kind != "run"
    }
    return {**found, "of the matmul ceiling": of_ceiling}


def bounds(*, on_gpu: bool, fp8: bool) -> dict[str, float]:
    found = {"run / by hand": OVERHEAD_BOUND, "run / transformers": PEER_BOUND}
    if on_gpu:
        found["of the matmul ceiling"] = CEILING_BOUND_FP8 if fp8 else CEILING_BOUND
    return found


def versions() -> dict[str, str]:
    names = ("flagscale-train", "torch", "megatron-core", "transformer-engine", "transformers")
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write(folder: Path, shape: Shape, given: argparse.Namespace, *, on_gpu: bool) -> Path:
    """Write the experiment of a shape, in the precision and with the fusions of the device."""
    precision = "bf16: true" if on_gpu else ""
    if given.fp8:
        precision += "\n  fp8_format: hybrid\n  fp8_recipe: delayed"
    experts = EXPERTS.format(experts=shape.experts) if shape.experts else ""
    if shape.experts and on_gpu:
        experts += "\n  moe_grouped_gemm: true\n  moe_permute_fusion: true"
    known = {name: value for name, value in asdict(shape).items() if name != "experts"}
    text = TRAIN.format(
        **known,
        experts=experts,
        untied=str(not shape.tied).lower(),
        qk_norm=str(shape.peer == "Qwen3").lower(),
        steps=given.steps,
        precision=precision,
        fusion="cross_entropy_loss_fusion: true" if on_gpu else "",
    )
    (folder / "train").mkdir()
    (folder / "train" / "shape.yaml").write_text(text)
    path = folder / "benchmark.yaml"
    path.write_text(EXPERIMENT.format(folder=folder))
    return path


def run(words: list[str], target: Path, folder: Path) -> str:
    environment = {**os.environ, "FLAGSCALE_STATE_DIR": str(folder / "state")}
    command = [sys.executable, "-m", "flagscale_train.cli", "run", *words]
    checked(command, environment)
    return "".join(log.read_text() for log in (target / "runs" / "latest" / "logs").glob("*.log"))


def by_hand(words: list[str], target: Path, folder: Path) -> str:
    """Give the plan's own words to Megatron, without launcher, supervisor, events and checkpoint keeping."""
    from flagscale_train.runs import make_plan

    process = make_plan(words[0], words[1:]).processes[0]
    script = folder / "by_hand.py"
    script.write_text(BY_HAND)
    first = len(process.argv) - 1 - process.argv[::-1].index("flagscale_train.worker")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    port = str(20000 + os.getpid() % 20000)
    environment = {**os.environ, **process.env, **alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment.pop("FLAGSCALE_EVENTS")
    target.mkdir(parents=True)
    return checked([sys.executable, str(script), *process.argv[first + 1 :]], environment)


def peer(shape: Shape, steps: int) -> str:
    return checked([sys.executable, "-c", PEER, json.dumps(asdict(shape)), str(steps)], dict(os.environ))


def checked(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ...: exit {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def tokens_per_second(text: str, shape: Shape) -> float:
    times_ms = [float(value) for value in STEP.findall(text)]
    return shape.batch * shape.seq * 1e3 / median(times_ms[len(times_ms) // 3 :])


def steps_of(target: Path) -> list[dict[str, Any]]:
    """Return the steps after the first third, as the events have them."""
    events = map(json.loads, (target / "runs" / "latest" / "events.jsonl").read_text().splitlines())
    steps = [event for event in events if event["event"] == "step"]
    return steps[len(steps) // 3 :]


def tell(results: list[dict[str, Any]]) -> int:
    """Print a table; return 1 if a bound is broken."""
    print(f"\n{results[0]['device']}; {', '.join(' '.join(item) for item in results[0]['versions'].items())}")
    print(f"| shape | {' | '.join(KINDS)} | TFLOP/s | matmul | of it | run / by hand | GiB |")
    print(f"|{'---|' * 10}")
    for row in results:
        rates = row["tokens_per_second"]
        told = (f"{median(rates[kind]):,.0f}" if kind in rates else "" for kind in KINDS)
        part, hand = row["ratios"]["of the matmul ceiling"], row["ratios"].get("run / by hand", math.nan)
        print(
            f"| {row['shape']}, {row['precision']} | {' | '.join(told)} | {row['tflops']:.4g} "
            f"| {row['matmul_tflops']:.4g} | {part:.1%} | {hand:.3f} | {row['memory_gib']:.1f} |"
        )
    broken = 0
    for row in results:
        for name, bound in row["bounds"].items():
            value = row["ratios"].get(name)
            if value is not None and value < bound:
                broken += 1
                print(f"BROKEN: {row['shape']}: {name}: {value:.3f}, bound {bound:.2f}")
    return int(broken > 0)


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - started:.0f} s")
    raise SystemExit(code)
