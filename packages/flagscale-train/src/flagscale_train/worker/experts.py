"""Lets a training of experts resume on another number of expert-parallel ranks with its optimizer's state.

With more than one such rank Megatron has two optimizers, one of the experts and one of everything else; with
one rank it has one of all. Their tensors are stored by the names of the weights, so they fit whatever the
number. The parameter groups do not: they are stored by optimizer and looked up by what they are for. They
tell of learning rate, weight decay and step, which experts and others share, so they are dealt anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys

__all__ = ["share_state"]

_ONLY_WHERE = "is_expert_parallel"
"""What tells the groups of experts from others, and is not told with one rank."""


def share_state() -> None:
    """Let optimizers load what another number of them saved; call once, before training."""
    real = ChainedOptimizer.load_state_dict

    def load_state_dict(self: Any, state: Any) -> None:
        real(self, _dealt(state, self.chained_optimizers))

    ChainedOptimizer.load_state_dict = load_state_dict


def _dealt(state: Any, optimizers: list[Any]) -> Any:
    """Return a state as the optimizers expect it; what was saved by as many is left as it is.

    Args:
        state: of one optimizer, or of several by number; here what is no tensor lies where it was saved, and
            the tensors where they were asked for.
        optimizers: those that will load it.
    """
    if not isinstance(state, Mapping):
        return state
    by_number = [state[key] for key in sorted(key for key in state if isinstance(key, int))]
    was_one = "optimizer" in state
    if was_one and len(optimizers) > 1:
        saved, loaded = [state], by_number
    elif not was_one and by_number and len(optimizers) == 1:
        saved, loaded = by_number, [state]
    else:
        return state
    groups = [group for each in saved for group in each["optimizer"]["param_groups"]]
    dealt = [
        {
            **{key: value for key, value in saved[0].items() if not isinstance(key, int)},
            "optimizer": {**saved[0]["optimizer"], "param_groups": list(_groups_for(optimizer, groups))},
            "param_state": part["param_state"],
        }
        for optimizer, part in zip(optimizers, loaded, strict=True)
    ]
    return dealt[0] if len(dealt) == 1 else dict(enumerate(dealt))


def _groups_for(optimizer: Any, saved: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a saved group for each of an optimizer's own, whether it was one of experts or not."""
    for own in optimizer.optimizer.param_groups:
        found = next(group for group in saved if _kind(group) == _kind(own))
        yield {**found, _ONLY_WHERE: own[_ONLY_WHERE]}


def _kind(group: Mapping[str, Any]) -> list[Any]:
    names = [name for name in param_group_identifier_keys if name != _ONLY_WHERE]
    return [group.get(name, group.get(f"pre_{name}")) for name in names]
