"""How fast training is: `flagscale-train run`, the same Megatron arguments by hand, and plain transformers.

    python benchmarks/train.py [--shape cpu-25m] [--rounds 3] [--steps 12] [--without-transformers]
    python benchmarks/train.py --shape qwen3-0.6b [--fp8] [a.b=c ...]      # on one GPU

In an environment with flagscale-train[megatron]. Each round runs all three in turn, so that a busy machine
hurts all alike; each is a process of its own and trains on mock data or random ids from random weights:

- run: `flagscale-train run` with supervisor, events and checkpoint keeping (one save, not counted);
- by hand: the words of its plan given to `megatron.training.pretrain()`, with nothing of ours around it but
  what this device cannot train without;
- transformers: the same shape and batch, sdpa attention, torch's AdamW, clipped gradients. On a GPU its
  weights and moments are bfloat16 where Megatron keeps float32 too, which is to its advantage.

Tokens per second are those of the median step after the first third of the steps. On a GPU the rate of a
bfloat16 matmul of 8192 x 8192 x 8192 is measured in the same run, and the model's FLOP/s by Megatron's own
formula are shown beside it. Bounds: run / by hand >= 0.99; on a CPU run / transformers >= 1.0; of the matmul
ceiling 55 % in bfloat16 and 65 % in fp8. Exits 1 when one is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "cpu-25m": {
        "layers": 8, "hidden": 384, "ffn": 1024, "heads": 6, "groups": 2, "head": 64, "vocab": 16384,
        "seq": 256, "micro": 4, "batch": 8, "tied": False,
    },
    "qwen3-0.6b": {
        "layers": 28, "hidden": 1024, "ffn": 3072, "heads": 16, "groups": 8, "head": 128, "vocab": 151936,
        "seq": 4096, "micro": 8, "batch": 32, "tied": True,
        "peer_micro": 4,  # its logits in float32 take 10 GiB
    },
    "llama3-8b-8-layers": {
        "layers": 8, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8, "head": 128, "vocab": 128256,
        "seq": 4096, "micro": 2, "batch": 16, "tied": False,
    },
}  # fmt: skip
OVERHEAD_BOUND, PEER_BOUND, CEILING_BOUND, CEILING_BOUND_FP8 = 0.99, 1.0, 0.55, 0.65
STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")

EXPERIMENT = """
defaults: [_self_, {{train: shape}}]
experiment:
  exp_name: benchmark
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
  num_layers: {layers}
  hidden_size: {hidden}
  ffn_hidden_size: {ffn}
  num_attention_heads: {heads}
  group_query_attention: true
  num_query_groups: {groups}
  kv_channels: {head}
  qk_layernorm: true
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
  optimizer: {{lr: 1.0e-4, min_lr: 1.0e-5, clip_grad: 1.0, weight_decay: 0.1}}
data:
  mock_data: true
  tokenizer: {{tokenizer_type: NullTokenizer, vocab_size: {vocab}}}
"""
BY_HAND = """
import sys
from flagscale_train.worker.session import prepare
from flagscale_train.worker.settings import Settings

def main():
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
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
shape, steps = json.loads(sys.argv[1]), int(sys.argv[2])
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
config = Qwen3Config(
    vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
    num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head"],
    num_key_value_heads=shape["groups"], tie_word_embeddings=shape["tied"],
    max_position_embeddings=shape["seq"], use_cache=False,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
micro = shape.get("peer_micro", shape["micro"])
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
left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
best = 0.0
for _ in range(5):
    torch.cuda.synchronize(); started = time.perf_counter()
    for _ in range(20):
        left @ right
    torch.cuda.synchronize()
    best = max(best, 20 * 2 * 8192**3 / (time.perf_counter() - started))
print(best)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-25m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--fp8", action="store_true", help="fp8 with delayed scaling (GPU, Transformer Engine)"
    )
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    with tempfile.TemporaryDirectory(prefix="flagscale-benchmark-") as name:
        return measure(given, shape, Path(name))


def measure(given: argparse.Namespace, shape: dict[str, Any], folder: Path) -> int:
    from flagscale_hw import detect

    on_gpu = detect().chip != "cpu"
    experiment = write(folder, shape, given, on_gpu=on_gpu)
    kinds = ["run", "by hand"] + ([] if given.without_transformers else ["transformers"])
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    teraflops = 0.0
    for number in range(given.rounds):
        for kind in kinds:
            target = folder / f"{kind.replace(' ', '-')}-{number}"
            words = [str(experiment), f"experiment.exp_dir={target}", *given.overrides]
            text = {"run": run, "by hand": by_hand}.get(kind, lambda *_: "")(words, target, folder)
            text = text or peer(shape, given.steps)
            rates[kind].append(tokens_per_second(text, shape))
            if kind == "run":
                teraflops = max(teraflops, flops_of(target))
            print(f"round {number + 1}: {kind:<12} {rates[kind][-1]:12,.0f} tokens/s", flush=True)
    return tell(rates, teraflops, on_gpu=on_gpu, fp8=given.fp8)


def write(folder: Path, shape: dict[str, Any], given: argparse.Namespace, *, on_gpu: bool) -> Path:
    """Write the experiment of a shape, in the precision and with the fusions of the device."""
    precision = "bf16: true" if on_gpu else ""
    if given.fp8:
        precision += "\n  fp8_format: hybrid\n  fp8_recipe: delayed"
    fusion = "cross_entropy_loss_fusion: true" if on_gpu else ""
    text = TRAIN.format(
        **shape,
        untied=str(not shape["tied"]).lower(),
        steps=given.steps,
        precision=precision,
        fusion=fusion,
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


def peer(shape: dict[str, Any], steps: int) -> str:
    return checked([sys.executable, "-c", PEER, json.dumps(shape), str(steps)], dict(os.environ))


def checked(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ...: exit {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def tokens_per_second(text: str, shape: dict[str, Any]) -> float:
    times_ms = [float(value) for value in STEP.findall(text)]
    return shape["batch"] * shape["seq"] * 1e3 / median(times_ms[len(times_ms) // 3 :])


def flops_of(target: Path) -> float:
    """Return TFLOP/s of the median step, as the events have it."""
    events = map(json.loads, (target / "runs" / "latest" / "events.jsonl").read_text().splitlines())
    steps = [event["tflops_per_device"] for event in events if event["event"] == "step"]
    return median(steps[len(steps) // 3 :])


def tell(rates: dict[str, list[float]], teraflops: float, *, on_gpu: bool, fp8: bool) -> int:
    rows = [("run / by hand", ratio(rates, "by hand"), OVERHEAD_BOUND)]
    if "transformers" in rates:
        rows.append(("run / transformers", ratio(rates, "transformers"), PEER_BOUND))
    if on_gpu:
        ceiling = float(checked([sys.executable, "-c", CEILING], dict(os.environ))) / 1e12
        print(f"{teraflops:.0f} TFLOP/s; matmul ceiling in bfloat16 {ceiling:.0f} TFLOP/s")
        rows.append(
            ("of the matmul ceiling", teraflops / ceiling, CEILING_BOUND_FP8 if fp8 else CEILING_BOUND)
        )
    print(f"median tokens/s: {', '.join(f'{kind} {median(found):,.0f}' for kind, found in rates.items())}")
    for name, value, bound in rows:
        print(f"{name:<24} {value:6.3f}   bound {bound:.2f}   {'met' if value >= bound else 'BROKEN'}")
    return int(any(value < bound for _, value, bound in rows))


def ratio(rates: dict[str, list[float]], other: str) -> float:
    """Return the median over the rounds of run's rate by the other's of the same round."""
    return median(ours / theirs for ours, theirs in zip(rates["run"], rates[other], strict=True))


if __name__ == "__main__":
    started = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - started:.0f} s")
    raise SystemExit(code)
