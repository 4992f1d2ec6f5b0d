"""How Megatron shares documents among training, validation and test, and what of it would not end well.

The arithmetic is that of `megatron/core/datasets/blended_megatron_dataset_config.py` and `..._builder.py`:
the shares are normalised and summed up, and each bound is rounded to a document. Of a share that is more than
nothing but gets no document, Megatron counts epochs until they hold enough tokens: for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

__all__ = ["DEFAULT", "conflicts", "named", "shares"]

DEFAULT = "969, 30, 1"
"""What Megatron takes for `data_path` where no split is given."""

_NAMES = ("training", "validation", "test")
_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")


def named(options: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield option and prefix of every dataset that Megatron options name, without the weights."""
    for option in ("data_path", *_PER_SPLIT):
        yield from ((option, prefix) for prefix, _ in _blend(options, option))


def _blend(options: Mapping[str, Any], option: str) -> list[tuple[str, float | None]]:
    """Return prefixes and their weights, None where they have none."""
    words = options.get(option) or ()
    words = words.split() if isinstance(words, str) else [str(word) for word in words]
    # Either prefixes alone, or weights and prefixes in turn.
    if len(words) > 1 and len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        return [(prefix, float(weight)) for weight, prefix in zip(words[::2], words[1::2], strict=True)]
    return [(word, None) for word in words]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def shares(split: str, count: int) -> tuple[int | None, ...]:
    """Return how many of `count` documents training, validation and test get; None for one that is off.

    Args:
        split: up to three numbers of any scale, such as `98,2,0`.
        count: documents (of one sequence each; else sequences) of one dataset.

    Raises:
        ValueError: it is not such numbers.
    """
    parts = _parts(split)
    *_, total = accumulate(parts)  # not sum(), which rounds better than Megatron
    bounds = accumulate((part / total for part in parts), initial=0.0)
    return tuple(
        None if last <= first else round(last * count) - round(first * count)
        for first, last in pairwise(bounds)
    )


def _parts(split: str) -> list[float]:
    parts = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 0 < len(parts) <= 3 or not sum(parts):
        raise ValueError(f"{split!r} is not up to three numbers, one of them above 0")
    return parts + [0.0] * (3 - len(parts))


def conflicts(options: Mapping[str, Any], counts: Mapping[str, int]) -> list[str]:
    """Say which shares of the data would be empty, and which options exclude each other.

    Args:
        options: Megatron options.
        counts: documents of each dataset, by prefix, where they are known.

    Returns:
        One sentence for each problem.
    """
    per_split = [option for option in _PER_SPLIT if options.get(option)]
    if per_split and options.get("split"):
        problem = f"split: {options['split']}: {per_split[0]} names the data of one split already"
        return [f"{problem}: remove the split, or give data_path alone"]
    split = str(options.get("split") or DEFAULT)
    problems = [
        f"{option}: weight {weight:g} of {prefix}: must be above 0: leave the dataset out"
        for option in ("data_path", *_PER_SPLIT)
        for prefix, weight in _blend(options, option)
        if weight is not None and not weight > 0
    ]
    for option, prefix in named(options):
        count = counts.get(prefix)
        if count == 0:
            problems.append(f"{option}: {prefix}: holds no document: leave it out")
        elif count is not None and option == "data_path":
            try:
                problems += _empty(prefix, split, count)
            except ValueError as error:
                return [f"split: {error}: give numbers such as 98,2,0"]
    return problems


def _empty(prefix: str, split: str, count: int) -> list[str]:
    parts = _parts(split)
    return [
        f"split: {split}: {name} gets {part / sum(parts):.2%} of {count:,} documents of {prefix}, which is "
        "none, and Megatron would count epochs of it for ever: give it a larger share or 0, or more documents"
        for name, part, share in zip(_NAMES, parts, shares(split, count), strict=True)
        if share is not None and share <= 0
    ]
