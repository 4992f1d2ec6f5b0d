"""Adam for devices without Transformer Engine against torch's own, computed in float64."""

import pytest

torch = pytest.importorskip("torch")
adam = pytest.importorskip("flagscale_train.worker.adam", exc_type=ImportError)

pytestmark = pytest.mark.megatron

SHAPES = ((333, 77), (4096,), (5,))
RATE, DECAY, BETAS, EPS, STEPS = 1e-2, 0.1, (0.9, 0.95), 1e-8, 20


def trained(make, dtype):
    """Update the same weights by the same gradients, and return the weights.

    No gradient is near 0, where its sign, which is all that counts in a first step, is one of rounding.
    """
    random = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float32).to(dtype))
        for shape in SHAPES
    ]
    optimizer = make(parameters, lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPS)
    for _ in range(STEPS):
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=random, dtype=torch.float32)
            parameter.grad = (drawn + drawn.sign()).to(dtype)
        optimizer.step()
    return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


class Uncorrected(torch.optim.Optimizer):
    """AdamW as published (arXiv 1711.05101) without the correction of its means."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            for name, gradient, beta in zip(
                ("mean", "square"), (weight.grad, weight.grad**2), BETAS, strict=True
            ):
                state[name] = beta * state.get(name, torch.zeros_like(weight)) + (1 - beta) * gradient
            weight.mul_(1 - RATE * DECAY)
            weight.sub_(RATE * state["mean"] / (state["square"].sqrt() + EPS))


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, torch.optim.AdamW),
        ({"adam_w_mode": False}, torch.optim.Adam),
        ({"bias_correction": False}, Uncorrected),
    ],
    ids=["decoupled", "coupled", "uncorrected"],
)
def test_adam_updates_as_published(options, reference):
    ours = trained(lambda parameters, **named: adam.Adam(parameters, **named, **options), torch.float32)
    theirs = trained(reference, torch.float64)
    assert (ours - theirs).abs().max() < 1e-5


def test_steps_are_kept_in_the_group_where_megatron_saves_them():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = adam.Adam([parameter])
    for _ in range(2):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}
