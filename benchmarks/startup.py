"""How long a user waits before anything happens: imports and `--help`, against an empty Python.

    python benchmarks/startup.py            # in an environment with the five packages

Prints seconds (best of N, interleaved so that a busy machine hurts all alike)
and the ratio to an empty Python.
Bounds: import of flagscale_hw 20 ms, of flagscale_config 350 ms over an empty Python; any `--help` 0.6 s.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 10
BOUNDS = {"import flagscale_hw": 0.020, "import flagscale_config": 0.350}
HELP_BOUND_S = 0.6


def seconds(argv: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    scripts = Path(sys.executable).parent
    cases = {"python -c pass": [sys.executable, "-c", "pass"]}
    cases |= {name: [sys.executable, "-c", name] for name in BOUNDS}
    for package in ("config", "hw", "train", "serve", "convert"):
        cases[f"flagscale-{package} --help"] = [str(scripts / f"flagscale-{package}"), "--help"]
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(ROUNDS):
        for name, argv in cases.items():
            best[name] = min(best[name], seconds(argv))
    empty, late = best["python -c pass"], []
    for name, taken in best.items():
        bound = BOUNDS[name] + empty if name in BOUNDS else HELP_BOUND_S
        late += [name] if taken > bound else []
        print(f"{name:28} {taken:6.3f} s   {taken / empty:5.1f} x empty Python   bound {bound:.3f} s")
    print("within all bounds" if not late else f"too slow: {', '.join(late)}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
