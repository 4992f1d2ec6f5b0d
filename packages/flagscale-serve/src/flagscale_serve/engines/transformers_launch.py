"""Start `transformers serve` with the name that clients use; placed in the run directory by the plan.

Usage: transformers_launch.py MODEL_DIR SERVED_NAME [OPTIONS OF `transformers serve`]

The server knows a model only by what it was started with (a path, seen in every answer), lists in
`/v1/models` only what lies in the Hugging Face cache, and fails there when that folder is missing. So the run
gets a cache of its own (`HF_HOME`) in which the model has its name. It runs in the engine's environment:
standard library only.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

__all__ = ["main"]

_REVISION = "0" * 40


def main() -> None:
    """Name the model, then become the server."""
    model, name = Path(sys.argv[1]), sys.argv[2]
    entry = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(_REVISION, encoding="ascii")
    (entry / "snapshots").mkdir(exist_ok=True)
    link = entry / "snapshots" / _REVISION
    # A restarted instance finds the link of its first start.
    link.unlink(missing_ok=True)
    link.symlink_to(model, target_is_directory=True)
    sys.argv = ["transformers", "serve", name, *sys.argv[3:]]
    runpy.run_module("transformers.cli.transformers", run_name="__main__")


if __name__ == "__main__":
    main()
