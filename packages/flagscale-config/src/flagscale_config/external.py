"""A task file that only wraps another project's own program (FlagScale's `kerv` recipes)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from flagscale_config.base import FrozenDict, FrozenMap, Model, Text, Words

__all__ = ["External"]


class External(Model):
    """Another project's program: where it lies, how it is started, what it is told."""

    stage: Text | None = None
    """Name of the step, where a project has several."""
    source_root: Text
    """Folder of the project's checkout."""
    entrypoint: Text
    """Program, relative to `source_root`."""
    launcher: Text = "python"
    """What starts it: `python`, `torchrun`, `accelerate`, ..."""
    work_dir: Text | None = None
    """Working directory; `source_root` by default."""
    python_paths: Words = ()
    """Folders for PYTHONPATH, relative to `source_root`."""
    dependencies: Words = ()
    """Modules that must be importable."""
    env: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """Environment variables."""
    arguments: FrozenMap[str, Any] | tuple[Text, ...] = Field(default_factory=FrozenDict)
    """The program's own arguments, passed as they are: by name, or as words."""
