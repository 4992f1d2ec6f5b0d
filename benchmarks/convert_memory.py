"""A large model converted under a hard limit of memory: proof that the size of the model does not matter.

    python benchmarks/convert_memory.py [--layers 16] [--directory DIR]

In an environment with flagscale-convert; DIR needs as much room as the model has bytes (about 23 GB). The
source is a sparse mixture of eight experts a layer, as `convert_plan.py` makes it. The kernel refuses the
converting process more than 0.5 GB plus 64 MB per thread and direction, so a conversion that ends
has kept the bound.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from convert_plan import make_model

LIMIT_BYTES = 500_000_000 + 2 * 2 * 64_000_000
CONVERT = """
import sys
from flagscale_convert import convert, make_plan
report = convert(make_plan(sys.argv[1], sys.argv[2], to="torch_dist"), workers=2)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.written_bytes / 1e9, report.seconds, peak * 1024 / 1e6)
"""


def limit() -> None:
    """Limit private writable memory; runs in the child."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))


def main() -> int:
    """Convert and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--directory", help="on a disk with room (default: the system's temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        source = Path(folder) / "hf"
        make_model(source, options.layers, 8)
        done = subprocess.run(
            [sys.executable, "-c", CONVERT, str(source), str(Path(folder) / "out")],
            preexec_fn=limit,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        print(f"failed under a limit of {LIMIT_BYTES / 1e6:.0f} MB")
        return 1
    gigabytes, seconds, megabytes = map(float, done.stdout.split())
    print(
        f"{gigabytes:.1f} GB in {seconds:.0f} s, {megabytes:.0f} MB of the {LIMIT_BYTES / 1e6:.0f} MB allowed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
