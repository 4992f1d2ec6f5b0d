"""Grouped experts, which no CPU run reaches: Megatron refuses the option without a GPU."""

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
from types import SimpleNamespace
from flagscale_train.worker import lora
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


class Products(torch.nn.Module):
    \"\"\"Stands for a layer of Transformer Engine that has the weights of all experts.\"\"\"

    def __init__(self, layers):
        super().__init__()
        for number, layer in enumerate(layers):
            self.register_parameter(f"weight{number}", layer.weight)

    def forward(self, x, counts):
        pairs = zip(x.split(counts), self.parameters(recurse=False))
        return torch.cat([part @ weight.T for part, weight in pairs]), None


class OneForAll(torch.nn.Module):
    \"\"\"Stands for Megatron's experts of such layers.\"\"\"

    def __init__(self, experts):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = (
            Products([getattr(expert, name) for expert in experts]) for name in ("linear_fc1", "linear_fc2")
        )

    def forward(self, hidden, counts, probs):
        gate, up = self.linear_fc1(hidden, counts.tolist())[0].chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up * probs[:, None]
        return self.linear_fc2(inner, counts.tolist())


lora._load_weights = lambda *_: None
options = dict(lora_dim=4, lora_alpha=8, lora_dropout=0.0, lora_dropout_position="pre", seed=1)
options |= dict(lora_in_init_method="kaiming", lora_out_init_method="normal", multi_latent_attention=False)
args = SimpleNamespace(**options, lora_target_modules=["linear_fc1", "linear_fc2"])
results = []
for experts in (sequential, grouped, OneForAll(make(False).local_experts)):
    if isinstance(experts, OneForAll):
        for name in ("linear_fc1", "linear_fc2"):
            for number, expert in enumerate(sequential.local_experts):
                weight = getattr(getattr(experts, name), f"weight{number}")
                weight.data.copy_(getattr(expert, name).weight)
    layer = torch.nn.Module()
    layer.layer_number, layer.mlp = 1, torch.nn.Module()
    layer.mlp.experts, layer.mlp.local_expert_indices = experts, [0, 1, 2]
    chunk = torch.nn.Module()
    chunk.config, chunk.decoder = config, torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    lora.attach([chunk], args)
    torch.manual_seed(3)
    hidden, probs = torch.randn(11, 16, requires_grad=True), torch.rand(11, requires_grad=True)
    out, _ = experts(hidden, counts, probs)
    (out * torch.randn_like(out)).sum().backward()
    adapters = [module for module in chunk.modules() if isinstance(module, lora.Adapter)]
    adapters.sort(key=lambda adapter: adapter.name)
    assert len({adapter.name for adapter in adapters}) == 6
    grads = [each.grad for adapter in adapters for each in (adapter.A, adapter.B)]
    results.append([out, hidden.grad, *(torch.zeros(1) if each is None else each for each in grads)])
assert all(grad.abs().max() > 0.01 for grad in results[0][-4:])
pairs = [pair for other in results[1:] for pair in zip(results[0], other, strict=True)]
print(max((a - b).abs().max().item() for a, b in pairs))
"""


def test_grouped_experts_compute_what_sequential_ones_do_with_adapters_too(said_by):
    alone, adapted = map(float, said_by(SCRIPT)[-2:])
    assert alone < 1e-5
    assert adapted < 1e-5
