"""How long planning takes, and how much memory, for a model of the size of DeepSeek-V3 (671e9 parameters).

    python benchmarks/convert_plan.py [--layers 64] [--experts 256] [--directory DIR]

In an environment with flagscale-convert. Makes a Qwen3-MoE-shaped model directory whose files have true
headers and sizes but no data (they are sparse and take no room). Then it plans the conversion to `torch_dist`
and to a file for each of 8 x 8 expert- and pipeline-parallel ranks, each in a process of its own. Prints
seconds passed, seconds of the processor (the same on a quiet machine) and peak memory. Bounds of the design:
20 s and 1 GB; the exit code tells whether memory held.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, EXPERT_FFN, HEADS, HEAD, VOCAB = 7168, 2048, 128, 128, 129280
FILES = 163
MEMORY_BOUND_MB = 1000
PLAN = """
import resource, sys, time
from flagscale_convert import ParallelLayout, make_plan
sizes = {"torch": ParallelLayout(pipeline_model_parallel_size=int(sys.argv[4]), expert_model_parallel_size=8)}
started, worked = time.perf_counter(), time.process_time()
plan = make_plan(sys.argv[1], sys.argv[2], to=sys.argv[3], parallel=sizes.get(sys.argv[3]))
seconds, worked = time.perf_counter() - started, time.process_time() - worked
assert not plan.problems, plan.problems[:3]
print(seconds, worked, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, plan.num_parameters)
"""


def shapes(layers: int, experts: int) -> dict[str, list[int]]:
    """Name every tensor of the model."""
    found = {"model.embed_tokens.weight": [VOCAB, HIDDEN]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = [HIDDEN]
        for name, rows in (("q", HEADS * HEAD), ("k", 8 * HEAD), ("v", 8 * HEAD)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = [rows, HIDDEN]
        for name in ("q", "k"):
            found[f"{prefix}self_attn.{name}_norm.weight"] = [HEAD]
        found[f"{prefix}self_attn.o_proj.weight"] = [HIDDEN, HEADS * HEAD]
        found[f"{prefix}mlp.gate.weight"] = [experts, HIDDEN]
        for expert in range(experts):
            for name, shape in (("gate", 1), ("up", 1), ("down", 0)):
                size = [EXPERT_FFN, HIDDEN] if shape else [HIDDEN, EXPERT_FFN]
                found[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = size
    return found | {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]}


def make_model(folder: Path, layers: int, experts: int) -> int:
    """Write headers and holes; give the number of tensors."""
    folder.mkdir()
    tensors = list(shapes(layers, experts).items())
    weight_map = {}
    for number in range(FILES):
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        header: dict[str, object] = {}
        position = 0
        for name, shape in tensors[number * len(tensors) // FILES : (number + 1) * len(tensors) // FILES]:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": HEAD,
        "hidden_size": HIDDEN,
        "intermediate_size": 18432,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "moe_intermediate_size": EXPERT_FFN,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return len(tensors)


def main() -> int:
    """Measure and print; 1 when memory was beyond its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--directory", help="where the sparse files go (default: the system's temporary one)")
    options = parser.parse_args()
    peak = 0.0
    stages = "8" if options.layers % 8 == 0 else "1"
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        source = Path(folder) / "hf"
        count = make_model(source, options.layers, options.experts)
        for to in ("torch_dist", "torch"):
            argv = [sys.executable, "-c", PLAN, str(source), str(Path(folder) / "out"), to, stages]
            done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
            seconds, worked, megabytes, parameters = map(float, done.stdout.split())
            peak = max(peak, megabytes)
            print(f"to {to:10} {count} tensors, {parameters:.3g} parameters")
            print(f"  {seconds:.1f} s, {worked:.1f} s of the processor, {megabytes:.0f} MB")
    return 0 if peak <= MEMORY_BOUND_MB else 1


if __name__ == "__main__":
    sys.exit(main())
