"""Convert model checkpoints between Hugging Face and Megatron without a GPU.

`inspect` looks, `make_plan` decides, `convert` writes, `verify` compares. No process group, no Megatron, no
more memory for a larger model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flagscale_convert.__about__ import __version__
from flagscale_convert.errors import (
    ConvertError,
    DestinationRefused,
    SourceDamaged,
    SourceNotFound,
    UnsafePickle,
    Unsupported,
    WriteFailed,
)

if TYPE_CHECKING:
    from flagscale_convert.adapter import ExportedAdapter, export_adapter, merge_adapter
    from flagscale_convert.architecture import Architecture, RopeScaling
    from flagscale_convert.configuration import Configuration, config
    from flagscale_convert.execution import Progress, Report, convert
    from flagscale_convert.families import FAMILIES, Family
    from flagscale_convert.inspection import Inspection, inspect
    from flagscale_convert.parallel import ParallelLayout
    from flagscale_convert.plan import Plan, make_plan
    from flagscale_convert.verification import Difference, VerifyReport, verify

__all__ = [
    "FAMILIES",
    "Architecture",
    "Configuration",
    "ConvertError",
    "DestinationRefused",
    "Difference",
    "ExportedAdapter",
    "Family",
    "Inspection",
    "ParallelLayout",
    "Plan",
    "Progress",
    "Report",
    "RopeScaling",
    "SourceDamaged",
    "SourceNotFound",
    "UnsafePickle",
    "Unsupported",
    "VerifyReport",
    "WriteFailed",
    "__version__",
    "config",
    "convert",
    "export_adapter",
    "inspect",
    "make_plan",
    "merge_adapter",
    "verify",
]

_HOMES = {
    "Architecture": "architecture",
    "Configuration": "configuration",
    "Difference": "verification",
    "ExportedAdapter": "adapter",
    "FAMILIES": "families",
    "Family": "families",
    "Inspection": "inspection",
    "ParallelLayout": "parallel",
    "Plan": "plan",
    "Progress": "execution",
    "Report": "execution",
    "RopeScaling": "architecture",
    "VerifyReport": "verification",
    "config": "configuration",
    "convert": "execution",
    "export_adapter": "adapter",
    "inspect": "inspection",
    "make_plan": "plan",
    "merge_adapter": "adapter",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line answers `--help` without numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
