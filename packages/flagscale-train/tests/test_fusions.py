"""The loss of large vocabularies against torch's own."""

import pytest

pytestmark = pytest.mark.megatron

SCRIPT = """
import os, sys
import torch
from flagscale_train.worker import fusions

ranks = 2
rank = 0 if os.fork() else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=ranks)
torch.manual_seed(5)
whole = (9 * torch.randn(7, 3, 24)).requires_grad_()
target, weight = torch.randint(0, 24, (7, 3)), torch.randn(7, 3)
expected = torch.nn.functional.cross_entropy(whole.view(-1, 24), target.view(-1), reduction="none").view(7, 3)
(expected * weight).sum().backward()
assert expected.max() > 1
part = whole.detach().chunk(ranks, dim=-1)[rank].clone().requires_grad_()
off = 0
for fusions._INDEXABLE in (2**31, 3 * 12 * 4 + 1):  # whole, and in pieces of 4 and 3
    part.grad = None
    losses = fusions.vocab_parallel_cross_entropy(part, target, torch.distributed.group.WORLD)
    (losses * weight).sum().backward()
    gradient = whole.grad.chunk(ranks, dim=-1)[rank]
    off = max(off, (losses - expected).abs().max(), (part.grad - gradient).abs().max())
half = fusions.vocab_parallel_cross_entropy(part.bfloat16(), target, torch.distributed.group.WORLD)
assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.3
if rank:
    os._exit(off > 1e-5)
assert os.wait()[1] == 0
print(off.item())
"""


def test_the_loss_of_a_split_vocabulary_is_that_of_the_whole(said_by):
    assert float(said_by(SCRIPT)[-1]) < 1e-5
