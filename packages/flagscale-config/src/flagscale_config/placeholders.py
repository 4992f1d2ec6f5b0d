"""Values that only say that a value is missing: `xxx`, `<master_ip>`, `x.x.x.x`.

FlagScale's examples use them instead of OmegaConf's `???`. Left in, they fail on the cluster, or worse: `xxx`
is a valid folder name. They are reported as required from the user, as `???` is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flagscale_config.findings import Findings
from flagscale_config.places import Path, dotted
from flagscale_config.resolve import MISSING

__all__ = ["without_placeholders"]

_PLACEHOLDER = re.compile(
    r"[xX]{3,}"  # xxx
    r"|[xX]{1,3}(\.[xX]{1,3}){3}(:[xX0-9]+)?"  # x.x.x.x
    r"|<[\w .-]*\b\w*(ip|host|hostname|addr|address|port|path|dir|user|interface)\w*>"  # <master_ip>
    r"|(your|ip|IP|network)[ _-](interface|path|address)",  # "IP interface"
)
_PATH = re.compile(r"/path/to(/.*)?|.*/(your|path)[_-](to|path|model|data)[_/-].*|.*<[\w-]+>/.*")
_FREE_TEXT = ("prompts", "negative_prompt", "prompt", "before_start", "after_stop", "help")


def without_placeholders(data: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Return the data with placeholders as `MISSING`, each of them reported; their keys likewise."""
    return {key: _cleaned(value, (key,), findings) for key, value in data.items()}


def _cleaned(value: Any, path: Path, findings: Findings) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _cleaned(item, (*path, key), findings)
            for key, item in value.items()
            if not _is_missing_name(key, (*path, key), findings)
        }
    if isinstance(value, list):
        return [_cleaned(item, (*path, index), findings) for index, item in enumerate(value)]
    if not isinstance(value, str) or _is_free_text(path):
        return value
    if _PLACEHOLDER.fullmatch(value.strip()):
        cure = f"set it in the file or pass {dotted(path)}=..."
        message = f"{value!r} is a placeholder: required from the user; {cure}"
        findings.error("config/required", path, message, value)
        return MISSING
    if _PATH.fullmatch(value):
        findings.note("config/required", path, "looks like a placeholder; set it to a path of yours", value)
    return value


def _is_missing_name(key: str, path: Path, findings: Findings) -> bool:
    """Report a placeholder that stands for a host's name."""
    if not _PLACEHOLDER.fullmatch(key):
        return False
    findings.error(
        "config/required", path, f"{key!r} is a placeholder: the name of a host is required from the user"
    )
    return True


def _is_free_text(path: Path) -> bool:
    return any(part in _FREE_TEXT for part in path)
