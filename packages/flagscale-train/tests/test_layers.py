"""Grouped experts, which no CPU run reaches: Megatron refuses the option without a GPU."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.megatron

SCRIPT = """
import sys
from flagscale_train.worker import cpu
cpu.install()
import torch
from functools import partial
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from flagscale_train.worker.layers import GroupedExperts, TorchLayers

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=3, moe_ffn_hidden_size=8,
    moe_router_topk=2, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
    add_bias_linear=False, use_cpu_initialization=True, bias_activation_fusion=False, init_method_std=0.5,
)
groups = ProcessGroupCollection.use_mpu_process_groups()
make = lambda grouped: TorchLayers().grouped_mlp_modules(grouped)(3, config, pg_collection=groups)
sequential, grouped = make(False), make(True)
assert isinstance(grouped, GroupedExperts) and not isinstance(sequential, GroupedExperts)
grouped.load_state_dict(sequential.state_dict())
counts, results = torch.tensor([4, 0, 7]), []
for experts in (sequential, grouped):
    torch.manual_seed(3)
    hidden = torch.randn(11, 16, requires_grad=True)
    probs = torch.rand(11, requires_grad=True)
    out, bias = experts(hidden, counts, probs)
    assert bias is None
    (out * torch.randn_like(out)).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in experts.parameters()]
    results.append([out, hidden.grad, probs.grad, *grads])
assert results[0][0].abs().max() > 1
print(max((a - b).abs().max().item() for a, b in zip(*results, strict=True)))
"""


def test_grouped_experts_compute_what_sequential_ones_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "store"],
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-5
