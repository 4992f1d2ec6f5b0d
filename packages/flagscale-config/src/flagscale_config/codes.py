"""Every error code: what it means, an example that produces it, and the cure.

One registry, `data/codes.toml`, for three readers: `flagscale-config explain CODE`, the pages under
`docs/config/errors` (made by `scripts/config_pages.py`), and the test that runs each example and refuses a
code that is not listed. A code never changes its meaning; a new kind of mistake gets a new one.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files

from flagscale_config.errors import ConfigError, Problem

__all__ = ["Code", "code_named", "codes"]

_KIND = "config/"


@dataclass(frozen=True, kw_only=True)
class Code:
    """One kind of problem."""

    code: str
    """Stable, such as `config/unknown-key`."""
    title: str
    """A few words, as a heading."""
    meaning: str
    """When it is reported, and why it is one."""
    cure: str
    """What to do."""
    files: Mapping[str, str] = field(default_factory=dict)
    """An example: files by path, the experiment file first."""
    command: str = ""
    """The command line that shows it, without `flagscale-config`; `check` of the first file by default."""

    @property
    def words(self) -> str:
        """The command line of the example; empty when there is none."""
        return self.command or " ".join(["check", *list(self.files)[:1]] if self.files else [])


@functools.cache
def codes() -> Mapping[str, Code]:
    """Return every code by its name, in alphabetical order."""
    text = files("flagscale_config").joinpath("data", "codes.toml").read_text(encoding="utf-8")
    found: dict[str, Code] = {}
    for name, about in sorted(tomllib.loads(text).items()):
        fields = {key: " ".join(text.split()) for key, text in about.items() if isinstance(text, str)}
        found[f"{_KIND}{name}"] = Code(code=f"{_KIND}{name}", files=about.get("files", {}), **fields)
    return found


def code_named(name: str) -> Code:
    """Return what is known of a code; `config/` may be left out.

    Raises:
        ConfigError: there is no such code.
    """
    bare = {code.removeprefix(_KIND): code for code in codes()}
    wanted = name.removeprefix(_KIND)
    if wanted in bare:
        return codes()[bare[wanted]]
    near = get_close_matches(wanted, bare, 1, 0.6)
    meant = bare[near[0]] if near else None
    hint = f"did you mean {meant}?" if meant else f"known: {', '.join(bare)}"
    problem = Problem(
        code="config/value",
        key=name,
        message=f"no such code; {hint}",
        allowed=tuple(codes()),
        suggestion=meant,
    )
    raise ConfigError([problem])
