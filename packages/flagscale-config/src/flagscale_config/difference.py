"""What two experiments ask for differently: by resolved value, whatever file and spelling it is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from flagscale_config.compose import compose
from flagscale_config.errors import Origin
from flagscale_config.facts import Fact, facts
from flagscale_config.loader import find
from flagscale_config.masking import masked
from flagscale_config.megatron import is_dropped

__all__ = ["Difference", "diff"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that two experiments do not share; secrets are masked."""

    name: str
    """The same for both: `train.lr`, `serve.<serve_id>.engine_args.port`, else the path in the file."""
    kind: Literal["added", "removed", "changed"]
    before: Any = None
    """None where it is added; the engine's default where only the other side sets it."""
    after: Any = None
    """None where it is removed; the engine's default where only the other side sets it."""
    origin_before: Origin | None = None
    """None where the first experiment does not set it."""
    origin_after: Origin | None = None
    """None where the second experiment does not set it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as JSON can hold it."""
        origins = {
            name: str(origin) if origin is not None else None
            for name, origin in (("origin_before", self.origin_before), ("origin_after", self.origin_after))
        }
        known = {"name": self.name, "kind": self.kind, "before": self.before, "after": self.after}
        return {**known, **origins}


def diff(
    one: str | PathLike[str],
    two: str | PathLike[str],
    overrides_one: Sequence[str] = (),
    overrides_two: Sequence[str] = (),
) -> tuple[Difference, ...]:
    """Return what two experiments ask for differently, in the order of the second; empty when nothing.

    A value that one side leaves to the engine equals the engine's default written out by the other. The files
    need be neither complete nor right.

    Raises:
        ConfigError: files cannot be composed.
    """
    before, after = _values(one, overrides_one), _values(two, overrides_two)
    names = [*after, *(name for name in before if name not in after)]
    found = (_difference(name, before.get(name), after.get(name)) for name in names)
    return tuple(difference for difference in found if difference is not None)


def _values(source: str | PathLike[str], overrides: Sequence[str]) -> Mapping[str, Fact]:
    """Return what an experiment says, without what says nothing: null, and options that are gone."""
    known = facts(compose(find(source), overrides))
    ours = (fact for fact in known if fact.path[0] not in {"defaults", "hydra", "action"})
    return {fact.name: fact for fact in ours if fact.value not in (None, {}) and not _is_gone(fact)}


def _is_gone(fact: Fact) -> bool:
    return fact.path[0] == "train" and is_dropped(str(fact.path[-1]))


def _default(fact: Fact) -> Any:
    """Return what the engine takes when nothing is said."""
    if fact.option is None:
        return None
    return False if fact.option.kind in {"true", "false"} else fact.option.default


def _difference(name: str, before: Fact | None, after: Fact | None) -> Difference | None:
    known = after or before
    if known is None:
        return None
    old = before.value if before is not None else _default(known)
    new = after.value if after is not None else _default(known)
    if _same(old, new):
        return None
    kind: Literal["added", "removed", "changed"] = "changed"
    if before is None and old is None:
        kind = "added"
    elif after is None and new is None:
        kind = "removed"
    last = str(known.path[-1])
    return Difference(
        name=name,
        kind=kind,
        before=masked({last: old})[last],
        after=masked({last: new})[last],
        origin_before=before.origin if before is not None else None,
        origin_after=after.origin if after is not None else None,
    )


def _same(one: Any, two: Any) -> bool:
    """Whether two values mean the same: `8` and `"8"` do, `1` and `true` do not."""
    if isinstance(one, bool) or isinstance(two, bool):
        return str(one).lower() == str(two).lower()
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(_same(*pair) for pair in zip(one, two, strict=True))
    return bool(one == two) or (one is not None and two is not None and str(one) == str(two))
