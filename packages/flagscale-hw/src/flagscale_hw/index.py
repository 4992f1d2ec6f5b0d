"""The index of runs on this machine: one small pointer per run, so that listing needs no search."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

__all__ = ["index_dir", "remember", "remembered"]


def index_dir() -> Path:
    """Return where pointers live: `$FLAGSCALE_STATE_DIR/runs`, else `flagscale/runs` of the XDG state."""
    own = os.environ.get("FLAGSCALE_STATE_DIR")
    if own:
        return Path(own) / "runs"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "flagscale" / "runs"


def remember(run_id: str, run_dir: Path) -> None:
    """Add a run.

    Raises:
        OSError: the index cannot be written; the run itself does not depend on it.
    """
    folder = index_dir()
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{run_id}"
    beside.write_text(json.dumps({"run_id": run_id, "dir": str(run_dir)}), encoding="utf-8")
    beside.replace(folder / f"{run_id}.json")


def remembered() -> list[Path]:
    """Return the directories of all known runs; pointers to runs that are gone are dropped on the way."""
    try:
        pointers = sorted(index_dir().glob("*.json"))
    except OSError:
        return []
    return [found for found in map(_follow, pointers) if found is not None]


def _follow(pointer: Path) -> Path | None:
    try:
        data = json.loads(pointer.read_text(encoding="utf-8"))
        run_dir = Path(data["dir"])
        recorded = json.loads((run_dir / "supervisor.json").read_text(encoding="utf-8"))
        if recorded["run_id"] == data["run_id"]:
            return run_dir
    except PermissionError:
        return None  # unreadable for us is not gone
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(OSError):
        pointer.unlink()
    return None
