"""Judges every step before its update: a loss or gradient norm that is no number, or a loss that jumps.

Megatron stops at a gradient that is no number and otherwise updates. Here the user says what happens: `stop`
(nothing is updated and the run fails), `skip` (the update is dropped, training goes on) or `roll_back`
(training starts again from the newest whole checkpoint and leaves out the data seen since, as in PaLM,
arXiv 2204.02311, section 5.1). All ranks decide from the same numbers, so they decide alike.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from typing import Any

from megatron.training import get_args, training

from flagscale_train.worker import losses
from flagscale_train.worker.recorder import Recorder
from flagscale_train.worker.refusal import Refusal
from flagscale_train.worker.settings import Settings

__all__ = ["BadStep", "Guard", "RollBack"]

_WINDOW = 16
"""Good steps whose mean loss is what a spike is measured against."""
_MEGATRON_RISE = 9.0
"""What `check_for_spiky_loss` alone means: ten times the loss, Megatron's factor."""


class BadStep(Refusal):
    """The training must not go on; the weights are those before the step."""


class RollBack(Exception):
    """The training must start again from its newest whole checkpoint."""

    def __init__(self, iteration: int, reason: str) -> None:
        """Name the step that was bad and why."""
        super().__init__(f"step {iteration}: {reason}")
        self.iteration = iteration


class Guard:
    """Stands between the gradients and the update."""

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        """Act as `settings` say and report through `recorder`."""
        self._settings = settings
        self._recorder = recorder
        self._good: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0
        self._grad_norm: float | None = None

    def attach(self) -> None:
        """Wrap Megatron's train step, unless nothing is to be judged; call once, before `pretrain()`."""
        if self._settings.on_bad_step == "off":
            return
        real = training.train_step

        @functools.wraps(real)
        def train_step(*arguments: Any, **named: Any) -> Any:
            optimizer = named["optimizer"] if "optimizer" in named else arguments[3]
            if "step_with_ready_grads" not in vars(optimizer):
                self._stand_before(optimizer)
            losses.forget()
            return real(*arguments, **named)

        training.train_step = train_step

    def _stand_before(self, optimizer: Any) -> None:
        norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> Any:
            self._grad_norm = norm()
            return self._grad_norm

        def step_with_ready_grads() -> bool:
            grad_norm = norm() if self._grad_norm is None else self._grad_norm
            self._grad_norm = None
            return self._allows(float(grad_norm or 0.0)) and update()

        optimizer.get_grad_norm = get_grad_norm
        optimizer.step_with_ready_grads = step_with_ready_grads

    def _allows(self, grad_norm: float) -> bool:
        """Decide about one update.

        Raises:
            BadStep: the run is to stop.
            RollBack: the run is to start again from its checkpoint.
        """
        loss = losses.mean_loss()
        reason = self._fault(loss, grad_norm)
        if reason is None:
            self._good.append(loss)
            self._in_a_row = 0
            return True
        iteration = get_args().curr_iteration + 1
        self._in_a_row += 1
        action, patience = self._settings.on_bad_step, self._settings.bad_step_patience
        if action == "roll_back" and self._settings.num_roll_backs < patience:
            raise RollBack(iteration, reason)
        if action == "skip" and self._in_a_row <= patience:
            self._recorder.write("notice", text=f"step {iteration} is left out: {reason}")
            return False
        after = {
            "stop": "bad_steps.action skip or roll_back goes on instead",
            "skip": f"{patience} steps before it were left out already",
            "roll_back": f"it was rolled back {patience} times already",
        }[action]
        raise BadStep(f"step {iteration}: {reason}: stopped before the update; {after}")

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        """Say what is wrong with a step, None if nothing is."""
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {what} is {value}"
        rise = self._settings.spike_threshold
        if rise is None and get_args().check_for_spiky_loss:
            rise = _MEGATRON_RISE
        if rise is None or not self._good:
            return None
        usual = sum(self._good) / len(self._good)
        if loss <= usual * (1 + rise):
            return None
        return (
            f"the loss {loss:.4f} is {loss / usual - 1:.0%} above {usual:.4f}, the mean of the last "
            f"{len(self._good)} steps (more than {rise:.0%} is a spike)"
        )
