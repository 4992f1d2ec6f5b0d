"""Rendered chats packed into sequences of one length, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split

from flagscale_train.worker.chats import Chats

__all__ = ["PackedChats", "pack"]


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put items into as few boxes as best-fit decreasing finds (arXiv 2404.10830).

    Args:
        sizes: of the items, each from 1 to `room`.
        room: of a box.

    Returns:
        The items of each box by index, ascending; the boxes by their first item. The same for the same sizes.
    """
    boxes: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    some = 0  # bit n is set while a box has room for n
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        fitting = some >> sizes[item]
        if fitting:
            left = sizes[item] + (fitting & -fitting).bit_length() - 1  # the least that is enough
            box = with_room[left].pop()
            if not with_room[left]:
                some ^= 1 << left
        else:
            left, box = room, len(boxes)
            boxes.append([])
        boxes[box].append(item)
        with_room[left - sizes[item]].append(box)
        some |= 1 << left - sizes[item]
    return sorted(sorted(box) for box in boxes)


class PackedChats(torch.utils.data.Dataset[dict[str, Any]]):
    """Sequences of chats in an order that depends on the seed and the place alone.

    A chat of n tokens takes n - 1 places: each predicts the next token, and the last predicts nothing. So no
    place predicts across chats. What is longer than a sequence is cut at its end.
    """

    def __init__(
        self, files: Sequence[tuple[Chats, range]], split: Split, *, length: int, num_samples: int | None,
        seed: int, masks: bool,
    ) -> None:  # fmt: skip
        """Pack chats.

        Args:
            files: rendered files and which of their chats to take.
            split: which split it is; only that for training is shuffled, anew in every epoch.
            length: of a sequence, in tokens.
            num_samples: sequences asked for, over all epochs; None for one epoch.
            seed: of the order.
            masks: give attention masks, for plain layers, and not the bounds of the chats, for Transformer
                Engine.
        """
        self.index_split = split  # Megatron's loader tells by it whose batch size holds
        self._length, self._seed, self._masks = length, seed, masks
        found = [(chats, index) for chats, indices in files for index in indices]
        sizes = [int(chats.ends[index + 1] - chats.ends[index]) - 1 for chats, index in found]
        # An answer may lie behind the cut, and then there is nothing to learn.
        kept = [place for place, (chats, index) in enumerate(found) if chats[index][1][1 : length + 1].any()]
        self.num_chats, self.num_dropped = len(kept), len(found) - len(kept)
        self.num_cut = sum(sizes[place] > length for place in kept)
        sizes = [min(sizes[place], length) for place in kept]
        self._boxes = [[found[kept[item]] for item in box] for box in pack(sizes, length)]
        self.fill = sum(sizes) / max(1, length * len(self._boxes))
        self._num_samples = num_samples or len(self._boxes)
        self._shuffled: tuple[int, np.ndarray] | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""
        return len(self._boxes)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sequence.

        Returns:
            `tokens`, `labels`, `position_ids` (from 0 in every chat) and `loss_mask` (1 where the assistant's
            tokens are predicted), each [length]; and either `attention_mask`, [1, length, length], true where
            a key is hidden, or `cu_seqlens`, [length + 1], where each chat begins, padded by the length.
        """
        epoch, place = divmod(index, len(self._boxes))
        if self.index_split is Split.train:
            place = int(self._order(epoch)[place])
        return self._sequence([chats[index] for chats, index in self._boxes[place]])

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != epoch:
            chance = np.random.default_rng((self._seed, epoch))
            self._shuffled = (epoch, chance.permutation(len(self._boxes)))
        return self._shuffled[1]

    def _sequence(self, chats: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        length = self._length
        tokens, labels, positions, owner = (np.zeros(length, dtype=np.int64) for _ in range(4))
        counts = np.zeros(length, dtype=np.float32)
        bounds = np.full(length + 1, length, dtype=np.int32)
        end = bounds[0] = 0
        for number, (ids, is_answer) in enumerate(chats, start=1):
            size = min(len(ids) - 1, length)
            place = slice(end, end + size)
            tokens[place], labels[place] = ids[:size], ids[1 : size + 1]
            counts[place] = is_answer[1 : size + 1]
            positions[place], owner[place] = np.arange(size), number
            end += size
            bounds[number] = end
        positions[end:] = np.arange(length - end)
        sample = {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(counts),
            "position_ids": torch.from_numpy(positions),
        }
        if not self._masks:
            return sample | {"cu_seqlens": torch.from_numpy(bounds)}
        hidden = np.triu(np.ones((length, length), dtype=bool), 1) | (owner[:, None] != owner[None])
        return sample | {"attention_mask": torch.from_numpy(hidden)[None]}
