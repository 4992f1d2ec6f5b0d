"""How fast block-scaled fp8 weights become bfloat16: on one core, against torch and against copying.

    python benchmarks/dequantise.py [--rounds 9]

In an environment with flagscale-convert and torch. Takes a weight of DeepSeek-V3's size (7168 columns, blocks
of 128 x 128) in memory, and runs, interleaved, on one thread:

- copy: the same bytes of fp8 copied once;
- torch: the published formula in torch, float32 times scale, rounded;
- ours: `flagscale_convert.fp8.Dequantised`, 16 MB of bfloat16 at a time, as a conversion reads it.

Prints GB of fp8 per second of processor time (median over the rounds) and the ratio to torch, after it has
compared the results bit by bit. Bound of the design: 0.4 GB/s per core.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from flagscale_convert.fp8 import Dequantised  # noqa: E402
from flagscale_convert.tensors import TensorInfo  # noqa: E402

ROWS, COLUMNS, BLOCK, BUFFER = 8192, 7168, 128, 16 << 20


class InMemory:
    """The weight and its scales as a source."""

    def __init__(self, codes: np.ndarray, scales: np.ndarray) -> None:
        self._held = {"weight": codes, "weight_scale_inv": scales.view(np.uint8)}
        self._infos = {
            "weight": TensorInfo("F8_E4M3", codes.shape),
            "weight_scale_inv": TensorInfo("F32", scales.shape),
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return self._infos

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        out[...] = self._held[name][start : start + len(out)]


def by_torch(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    for row in range(0, len(codes), BLOCK):
        wide = scales[row // BLOCK].repeat_interleave(BLOCK)
        out[row : row + BLOCK] = (codes[row : row + BLOCK].float() * wide).bfloat16()
    return out


def by_ours(source: Dequantised, out: np.ndarray) -> np.ndarray:
    step = BUFFER // (2 * COLUMNS)
    for row in range(0, ROWS, step):
        source.read_rows("weight", row, out[row : row + step])
    return out


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 127, (ROWS, COLUMNS), np.uint8)
    scales = generator.random((ROWS // BLOCK, COLUMNS // BLOCK), np.float32)
    source = Dequantised(InMemory(codes, scales), (BLOCK, BLOCK), "BF16", where="memory")
    eights = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    # Memory is taken once: a conversion, too, fills the same buffer again and again.
    out = np.zeros((ROWS, 2 * COLUMNS), np.uint8)
    theirs = torch.zeros(codes.shape, dtype=torch.bfloat16)
    again = codes.copy()
    by_torch(eights, torch.from_numpy(scales), theirs)
    assert np.array_equal(by_ours(source, out), theirs.view(torch.uint8).numpy()), "results differ"
    works = {
        "copy": lambda: np.copyto(again, codes),
        "torch": lambda: by_torch(eights, torch.from_numpy(scales), theirs),
        "ours": lambda: by_ours(source, out),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds(work))
    print(f"{codes.size / 1e9:.3f} GB of fp8, {rounds} rounds, one thread; equal bit by bit")
    for name, found in taken.items():
        rate = codes.size / median(found) / 1e9
        print(f"{name:<6} {rate:6.2f} GB/s   {median(taken['torch']) / median(found):5.2f} x torch")


if __name__ == "__main__":
    main()
