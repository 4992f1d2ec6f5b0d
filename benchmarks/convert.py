"""How fast a conversion is: against `cp` of the same bytes, and against loading everything first.

    python benchmarks/convert.py [--gigabytes 1.0] [--rounds 3] [--directory DIR]

In an environment with flagscale-convert, torch and safetensors. Makes a Llama-shaped model of random bfloat16
weights in a temporary directory on the disk to measure. Then it runs, interleaved so that a busy machine
hurts all alike, each in a process of its own that ends with everything on the disk:

- cp: the model copied by `cp`, then synced;
- load: safetensors loaded whole, merged by torch, saved by torch.distributed.checkpoint, as plain scripts do;
- to torch_dist and to hf: `flagscale_convert.convert`.

Seconds do not count the start of Python and the import of libraries. Prints the median of each one's seconds,
its rate over that of `cp` and of `load` (median of the rounds' ratios), and its peak anonymous memory. All
read from a warm page cache. Bounds of the design: 0.80 of `cp` on a quiet disk, 2.5 times `load`, 0.5 GB plus
64 MB per thread and direction. The exit code tells only whether memory held, which no busy disk can spoil.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HIDDEN, FFN, HEADS, HEAD, VOCAB = 2048, 5632, 16, 128, 32000
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN)
WORKERS = 2
MEMORY_BOUND_MB = 500 + 2 * WORKERS * 64
# Anonymous memory only: pages of files that were read or mapped are the kernel's to take back.
MEASURE = """
import os, sys, threading, time
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
"""
COPY = """
import subprocess
started = time.perf_counter()
subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
"""
CONVERT = """
from flagscale_convert import convert, make_plan
started = time.perf_counter()
convert(make_plan(sys.argv[1], sys.argv[2], to=sys.argv[3]), workers=int(sys.argv[4]))
"""
LOAD = """
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
started = time.perf_counter()
tensors, merged = {}, {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    tensors |= load_file(path)
groups = int(sys.argv[4])
for name in [name for name in tensors if name.endswith("q_proj.weight")]:
    parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
    parts = [part.reshape(groups, -1, part.shape[1]) for part in parts]
    merged[name.replace("q_proj", "qkv")] = torch.cat(parts, 1).reshape(-1, parts[0].shape[-1])
for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
    parts = [tensors.pop(name.replace("gate", part)) for part in ("gate", "up")]
    merged[name.replace("gate_proj", "fc1")] = torch.cat(parts)
dcp.save(merged | tensors, checkpoint_id=sys.argv[2], no_dist=True)
"""
REPORT = """
os.sync()
print(time.perf_counter() - started, peak)
"""


def make_model(folder: Path, gigabytes: float) -> None:
    """Write a model directory of about that size, in two shards."""
    import torch
    from safetensors.torch import save_file

    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    folder.mkdir()

    def new(*size: int) -> torch.Tensor:
        return torch.randint(-20000, 20000, size, dtype=torch.int16).view(torch.bfloat16)

    shards: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": new(VOCAB, HIDDEN)}, {}]
    for layer in range(layers):
        tensors, prefix = shards[2 * layer // layers], f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = new(HIDDEN)
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = new(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = new(FFN, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = new(HIDDEN, FFN)
    shards[1] |= {"model.norm.weight": new(HIDDEN), "lm_head.weight": new(VOCAB, HIDDEN)}
    files = {f"model-{number}-of-2.safetensors": shard for number, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        save_file(shard, folder / file, {"format": "pt"})
    weight_map = {name: file for file, shard in files.items() for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))


def run(name: str, source: Path, output: Path) -> tuple[float, float]:
    """Run one contender; give seconds, and peak memory in MB (of `cp`: of the process that starts it)."""
    python = [sys.executable, "-W", "ignore", "-c"]
    argv = {
        "cp": [*python, MEASURE + COPY + REPORT, str(source), str(output)],
        "load": [*python, MEASURE + LOAD + REPORT, str(source), str(output), "", str(HEADS)],
        "to torch_dist": [
            *python,
            MEASURE + CONVERT + REPORT,
            str(source),
            str(output),
            "torch_dist",
            str(WORKERS),
        ],
        "to hf": [*python, MEASURE + CONVERT + REPORT, str(source), str(output), "hf", str(WORKERS)],
    }[name]
    os.sync()
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(output)
    seconds, kib = map(float, done.stdout.split())
    return seconds, kib * 1024 / 1e6


def main() -> int:
    """Measure and print; 1 when memory was beyond its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to measure (default: the system's temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        make_model(root / "hf", options.gigabytes)
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, time" + CONVERT,
                root / "hf",
                root / "mc",
                "torch_dist",
                str(WORKERS),
            ],
            check=True,
        )
        size = sum(path.stat().st_size for path in (root / "hf").iterdir()) / 1e9
        sources = {"cp": "hf", "load": "hf", "to torch_dist": "hf", "to hf": "mc"}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
        for number in range(options.rounds):
            for name, source in sources.items():
                found[name].append(run(name, root / source, root / f"out-{number}"))
    print(f"{size:.2f} GB, {options.rounds} rounds, {WORKERS} threads; ratios are medians over the rounds")
    peak = 0.0
    for name, rounds in found.items():
        over = {
            other: median(theirs / ours for (theirs, _), (ours, _) in zip(found[other], rounds, strict=True))
            for other in ("cp", "load")
        }
        memory = max(megabytes for _, megabytes in rounds)
        peak = max(peak, memory) if name.startswith("to ") else peak
        print(
            f"{name:14} {median(seconds for seconds, _ in rounds):7.2f} s   {over['cp']:5.2f} x cp"
            f"   {over['load']:5.2f} x load   {memory:7.0f} MB"
        )
    print(f"peak memory {peak:.0f} MB, bound {MEMORY_BOUND_MB} MB")
    return 0 if peak <= MEMORY_BOUND_MB else 1


if __name__ == "__main__":
    sys.exit(main())
