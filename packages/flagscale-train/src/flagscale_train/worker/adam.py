"""Adam in the state layout of FusedAdam, in plain torch, for devices without Transformer Engine and Apex.

Megatron falls back to torch's AdamW there. Saving then works, but loading a distributed optimizer's
checkpoint stops in `distrib_optimizer.py`, because torch keeps `step` beside every parameter where Megatron
expects it in the group. This one keeps `step` in the group and `exp_avg`, `exp_avg_sq` in the state, and
takes FusedAdam's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Adam", "use_where_needed"]


class Adam(torch.optim.Optimizer):
    """AdamW, or Adam with L2 regularisation where `adam_w_mode` is false.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the means of gradient and squared gradient.
        eps: added to the root of the second mean.
        weight_decay: decoupled from the gradient unless `adam_w_mode` is false.
        **options: `adam_w_mode` and `bias_correction` (both true by default) as in FusedAdam; others are
            ignored.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        correction = bool(options.get("bias_correction", True))
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": correction,
            },
        )
        self.adam_w_mode = bool(options.get("adam_w_mode", True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss first, as in torch; Megatron passes none.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        rate, decay, step = group["lr"], group["weight_decay"], group["step"]
        gradients = [parameter.grad.to(parameter.dtype) for parameter in parameters]
        means, squares = self._state_of(parameters)
        if group["bias_correction"] and parameters[0].device.type == "cpu":
            # One pass over the memory instead of many. Not every chip's plug-in has the kernel.
            fused = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
            steps = [torch.tensor(float(step))] * len(parameters)
            fused(
                parameters, gradients, means, squares, [], steps,
                lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay, eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        if decay and self.adam_w_mode:
            torch._foreach_mul_(parameters, 1 - rate * decay)
        elif decay:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=decay))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        correction1, correction2 = (
            (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        )
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, correction2**0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(parameters, means, denominators, -rate / correction1)

    def _state_of(self, parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]


def use_where_needed() -> bool:
    """Give Megatron this Adam if it found no other; call before a model is built.

    Returns:
        True if it was needed.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return False
    optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = Adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
